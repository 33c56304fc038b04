"""checkpoint.py beside its promise (contracts/test_08): going on as if nothing had been, load_step, and readers while it writes."""

import json
import threading

import pytest
import torch
from logged import logged_to
from safetensors import safe_open

from longfire.checkpoint.folder import steps
from longfire.checkpoint.restoring import newest
from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.checkpoint.weights import newest_weights
from longfire.config import settings
from longfire.config.settings import Training
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.errors import CheckpointError
from longfire.optim import make_optimizer
from longfire.training.step import train_step

CPU = torch.device("cpu")
SYNC = settings.Checkpoint(async_mode="disabled")


def fresh(model, **optimizer) -> State:
    return State(model, make_optimizer(model, settings.Optimizer(**optimizer), CPU))


def step(state: State) -> float:
    """One step on a batch that depends on the state's step only."""
    ids_BT = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(state.step))
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.arange(16).expand(2, 16))
    return train_step(state, [batch], 1e-2, Training(), Clock(CPU))["loss"]


SCALES = {
    "embedding_lr_scale": 10.0,
    "head_lr_scale": 2.0,
    "other_lr_scale": 0.1,
    "beta1": 0.8,
    "eps": 1e-10,
    "weight_decay": 0.0,
}


@pytest.mark.parametrize(
    "optimizer", [{"fused": True}, {"fused": False}, {"name": "Adam"}, SCALES], ids=str
)
def test_going_on_is_as_if_nothing_had_been(tmp_path, tiny_model, optimizer):
    """Adam's two means and its step count come back: the losses that follow are the same numbers."""
    unbroken = fresh(tiny_model("gla", "gated_delta_net", "attention"), **optimizer)
    losses = [step(unbroken) for _ in range(6)]
    first = fresh(tiny_model("gla", "gated_delta_net", "attention"), **optimizer)
    again = [step(first) for _ in range(3)]
    Checkpoints(tmp_path, SYNC).save(first)
    second = fresh(tiny_model("gla", "gated_delta_net", "attention", seed=9), **optimizer)
    assert Checkpoints(tmp_path, SYNC).restore(second)
    again += [step(second) for _ in range(3)]
    assert again == losses
    ours, theirs = unbroken.tensors(), second.tensors()
    assert all(ours[name].equal(theirs[name]) for name in ours if not name.startswith("rng"))


def test_learning_rates_by_role_are_of_the_settings_and_not_of_the_checkpoint(tmp_path, tiny_model):
    """A checkpoint of a run without them, as all were before there were any, goes on with those of today."""
    first = fresh(tiny_model())
    step(first)
    Checkpoints(tmp_path, SYNC).save(first)
    second = fresh(tiny_model(seed=9), embedding_lr_scale=0.0, head_lr_scale=3.0)
    assert Checkpoints(tmp_path, SYNC).restore(second)
    before = {
        name: parameter.detach().clone() for name, parameter in second.model.named_parameters()
    }
    step(second)
    step(first)
    plain = dict(first.model.named_parameters())
    for name, parameter in second.model.named_parameters():
        moved, as_first = parameter - before[name], plain[name] - before[name]
        times = {"embed.weight": 0.0, "head.weight": 3.0}.get(name, 1.0)
        torch.testing.assert_close(moved, times * as_first, rtol=1e-3, atol=1e-7, msg=name)


def saved(folder, tiny_model, steps: int = 3, **changes) -> State:
    state, checkpoints = (
        fresh(tiny_model()),
        Checkpoints(folder, settings.Checkpoint(async_mode="disabled", **changes)),
    )
    for _ in range(steps):
        step(state)
        checkpoints.save(state)
    return state


def test_load_step_takes_that_step_and_names_what_there_is(tmp_path, tiny_model):
    saved(tmp_path, tiny_model)
    notes: list[str] = []
    for number in (-1, 3, 2, 1):
        state = fresh(tiny_model(seed=5))
        with logged_to(notes):
            assert Checkpoints(tmp_path, settings.Checkpoint(load_step=number)).restore(state)
        assert (state.step, state.rows_consumed, state.tokens) == (
            (3, 6, 96) if number < 0 else (number, 2 * number, 32 * number)
        )
        assert f"step-{state.step}" in notes[-1] and f"{state.tokens} tokens" in notes[-1]
    with pytest.raises(CheckpointError, match="step-7: no such checkpoint; the folder has steps 1"):
        Checkpoints(tmp_path, settings.Checkpoint(load_step=7)).restore(fresh(tiny_model()))


@pytest.mark.parametrize("keep", [0, 2])
def test_what_lies_beyond_load_step_is_no_longer_the_newest(tmp_path, tiny_model, keep):
    """A run that went back to step 2 and saved step 3 resumes from there, and keep_latest_k does not forget it for later ones."""
    saved(tmp_path, tiny_model, steps=5, keep_latest_k=5)
    state, notes = fresh(tiny_model()), []
    branch = Checkpoints(
        tmp_path,
        settings.Checkpoint(async_mode="disabled", load_step=2, keep_latest_k=keep),
    )
    with logged_to(notes):
        branch.restore(state)
    assert steps(tmp_path) == [1, 2] and newest(tmp_path) == 2, "before the first step"
    assert steps(tmp_path / "left") == [3, 4, 5]
    step(state)
    branch.save(state)
    assert steps(tmp_path) == ([2, 3] if keep else [1, 2, 3])
    assert steps(tmp_path / "left") == [3, 4, 5] and sum("kept as" in note for note in notes) == 3
    assert newest(tmp_path) == 3


def test_nothing_there_or_nothing_wanted_is_a_new_start(tmp_path, tiny_model):
    state = fresh(tiny_model())
    assert not Checkpoints(tmp_path, SYNC).restore(state) and state.step == 0
    saved(tmp_path, tiny_model)
    off = Checkpoints(tmp_path, settings.Checkpoint(enable_checkpoint=False))
    assert not off.restore(state) and state.step == 0
    off.save(state)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_step_is_saved_once(tmp_path, tiny_model):
    """The last step is often due as well; and a run that is already at its end saves nothing again."""
    state, checkpoints = fresh(tiny_model()), Checkpoints(tmp_path, SYNC)
    checkpoints.save(state)
    written = (tmp_path / "step-0" / "manifest.json").stat().st_mtime_ns
    checkpoints.save(state, last=True)
    again = Checkpoints(tmp_path, SYNC)
    again.restore(state)
    again.save(state, last=True)
    assert (tmp_path / "step-0" / "manifest.json").stat().st_mtime_ns == written


def test_milestones_stay_for_ever_and_the_newest_k_for_a_while(tmp_path, tiny_model):
    saved(tmp_path, tiny_model, steps=7, keep_latest_k=1, milestone_interval=3)
    assert steps(tmp_path) == [3, 6, 7]


def test_what_was_saved_when_all_were_kept_stays(tmp_path, tiny_model):
    """A folder of an earlier longfire, whose default that was, loses nothing when it goes on under the default of today."""
    saved(tmp_path, tiny_model, steps=4, keep_latest_k=0)
    for place in list(tmp_path.glob("step-[12]")):  # the earlier one did not write what it kept
        facts = json.loads((place / "state.json").read_text())
        del facts["keep_latest_k"]
        (place / "state.json").write_text(json.dumps(facts))
    state = fresh(tiny_model())
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    for number in range(5, 12):
        state.step = number
        checkpoints.save(state)
    assert steps(tmp_path) == [1, 2, 3, 4, 7, 8, 9, 10, 11]


def test_the_start_that_other_runs_may_begin_from_stays(tmp_path, tiny_model):
    state = fresh(tiny_model())
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    for number in range(8):
        state.step = number
        checkpoints.save(state)
    assert steps(tmp_path) == [0, 3, 4, 5, 6, 7]


def test_the_weights_lie_in_files_of_their_own(tmp_path, tiny_model):
    """So that an export or an evaluation reads a third of the bytes."""
    saved(tmp_path, tiny_model, steps=1)
    for path in (tmp_path / "step-1").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert len({name.split("/")[0] == "model" for name in file.keys()}) == 1  # noqa: SIM118 (it is no dict)


def test_a_failed_save_behind_training_is_reported_by_the_next(tmp_path, tiny_model):
    (tmp_path / "left").write_text("a file where a folder should be")
    (tmp_path / "step-9").mkdir()  # of a branch that was left: it would be moved there
    state, checkpoints = fresh(tiny_model()), Checkpoints(tmp_path, settings.Checkpoint())
    checkpoints.save(state)
    state.step = 1
    with pytest.raises(
        CheckpointError, match="step-0 could not be written.*Complete checkpoints: step-9"
    ):
        checkpoints.save(state)


def test_a_folder_that_cannot_be_made_is_reported_at_once(tmp_path, tiny_model):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(
        CheckpointError, match="taken.*could not be written.*Complete checkpoints: none"
    ):
        Checkpoints(tmp_path / "taken", settings.Checkpoint()).save(fresh(tiny_model()))


def test_weights_can_be_read_while_training_saves_and_forgets(tmp_path, tiny_model):
    """`longfire export` while the run goes on: whatever moment it looks at, it finds a whole checkpoint, and its own numbers."""
    model = tiny_model("attention")
    state = fresh(model)
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled", keep_latest_k=1))
    checkpoints.save(state)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            state.step += 1
            with torch.no_grad():
                model.norm.weight.fill_(state.step)
            checkpoints.save(state)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        seen = {}
        while len(seen) < 12:
            number, weights = newest_weights(tmp_path)
            seen[number] = weights["norm.weight"].unique().tolist()
    finally:
        stop.set()
        thread.join()
    assert all(value == [number] for number, value in seen.items() if number)


def test_a_start_removes_what_a_kill_has_left_of_a_save(tiny_model, tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-4.writing", "step-2.forgotten"):
        (folder / name).mkdir(parents=True)
        (folder / name / "shard-00000-model.safetensors").write_bytes(b"x")
    assert not Checkpoints(folder, SYNC).restore(fresh(tiny_model()))
    assert list(folder.iterdir()) == []
