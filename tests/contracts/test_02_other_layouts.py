"""Promise 2 for many: a checkpoint of any plan goes on under any other, to the bit where the plan is the same."""

from pathlib import Path

import pytest
import torch
from plans import HYBRID, PLANS, parts, state_of, steps, whole
from sets import slow_unless
from worlds import in_processes

from longfire.checkpoint import folder, saving
from longfire.checkpoint.restoring import load_model_weights, newest
from longfire.checkpoint.saving import Checkpoints
from longfire.config import settings
from longfire.errors import CheckpointError, UserError
from longfire.parallel.mesh import ALONE, Mesh

PAIRS = [
    ("one", "fsdp 8"),
    ("fsdp 4", "one"),
    ("fsdp 4", "fsdp 2"),
    ("tp 2, sequence", "pp 2"),
    ("hsdp 2x2", "fsdp 2 x tp 2"),
    ("pp 2 x fsdp 2 x tp 2", "fsdp 4"),
    ("fsdp 2, offloaded", "tp 2"),
    ("fsdp 2 x cp 2", "cp 2 x tp 2"),
]
SAME = ["fsdp 2", "hsdp 2x2", "fsdp 2 x tp 2", "pp 2 x tp 2"]


def run(rank: int, name: str, folder: Path, count: int, mode: str = "async"):
    """`count` steps from the newest checkpoint or the start, saved; what was said, and what then is on this process."""
    plan = PLANS[name]
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(HYBRID, plan, mesh)
    checkpoints = Checkpoints(folder, settings.Checkpoint(async_mode=mode), mesh)
    checkpoints.restore(state)
    restored = parts(state)
    said = steps(state, count)
    checkpoints.save(state)
    checkpoints.wait()
    return said, restored, parts(state), state.step


def in_a_world(name: str, *arguments):
    processes = PLANS[name].processes
    return (
        [run(0, name, *arguments)]
        if processes == 1
        else in_processes(processes, run, name, *arguments)
    )


QUICK_PAIRS = {("fsdp 4", "one"), ("tp 2, sequence", "pp 2")}


@pytest.mark.parametrize(
    ("saved", "loaded"), slow_unless(lambda saved, loaded: (saved, loaded) in QUICK_PAIRS, PAIRS)
)
def test_another_plan_goes_on(tmp_path, saved, loaded):
    like = run(0, "one", tmp_path / "like", 3)[2]
    true, *_ = run(0, "one", tmp_path / "unbroken", 5)
    before = in_a_world(saved, tmp_path / "run", 3)
    after = in_a_world(loaded, tmp_path / "run", 2)
    left, taken = (
        whole([answer[which] for answer in answers], like)
        for answers, which in ((before, 2), (after, 1))
    )
    for name, numbers in left.items():
        assert torch.equal(numbers, taken[name]), f"{name} is to the bit what was saved"
    for said, _, _, step in after:
        assert step == 5
        for got, wanted in zip(said, true[3:]):
            assert got == pytest.approx(wanted, rel=5e-5)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "fsdp 2", SAME))
def test_the_same_plan_goes_on_to_the_bit(tmp_path, name):
    unbroken = in_a_world(name, tmp_path / "unbroken", 5)
    in_a_world(name, tmp_path / "broken", 3, "disabled")
    broken = in_a_world(name, tmp_path / "broken", 2)
    for (said, _, here, _), (true_said, _, true, _) in zip(broken, unbroken):
        assert said == true_said[3:]
        for name_of, boxes in true.items():
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(here[name_of], boxes)), name_of


def test_readers_find_whole_weights(tmp_path):
    answers = in_a_world("pp 2 x fsdp 2 x tp 2", tmp_path, 2)
    weights = load_model_weights(tmp_path / "step-2")
    like = run(0, "one", tmp_path / "like", 1)[2]
    for name, numbers in whole([answer[2] for answer in answers], like).items():
        if name.startswith("model/"):
            assert torch.equal(weights[name.removeprefix("model/")], numbers)


def failing(rank: int, folder: Path) -> str:
    """Process 1 cannot write its part."""
    state = state_of(HYBRID, PLANS["fsdp 2"], mesh := Mesh.of_degrees({"dp_shard": 2}, "cpu"))
    checkpoints = Checkpoints(folder, settings.Checkpoint(), mesh, patience_seconds=20)
    checkpoints.save(state)
    checkpoints.wait()
    steps(state, 1)
    if rank == 1:
        saving.write_tensors = no_room
    try:
        checkpoints.save(state)
        checkpoints.wait()
    except UserError as error:
        return str(error)
    return "saved"


def no_room(*_) -> None:
    raise OSError(28, "No space left on device")


def test_what_one_process_cannot_write_none_has_saved(tmp_path):
    first, second = in_processes(2, failing, tmp_path)
    assert (
        "process 1: [Errno 28] No space left on device" in first
        and "Complete checkpoints: step-0" in first
    )
    assert "No space left on device" in second
    assert folder.steps(tmp_path) == [0] and newest(tmp_path) == 0


def of_another_model(rank: int, folder: Path) -> str:
    state = state_of(
        ("attention",), PLANS["fsdp 2"], mesh := Mesh.of_degrees({"dp_shard": 2}, "cpu")
    )
    with pytest.raises(CheckpointError, match="is of another model") as error:
        Checkpoints(folder, settings.Checkpoint(), mesh).restore(state)
    return str(error.value)


def test_every_process_refuses_another_model(tmp_path):
    in_a_world("fsdp 2", tmp_path, 1)
    first, second = in_processes(2, of_another_model, tmp_path)
    assert first == second and "has no place in this model" in first
