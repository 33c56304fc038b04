"""training/plateau.py: torch's ReduceLROnPlateau, and a run that resumes to the bit."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as some
from safetensors.torch import load_file
from small_runs import ONE_LAYER
from torch import nn
from worlds import in_processes

from longfire.checkpoint.state import State
from longfire.cli import main
from longfire.config.settings import LRScheduler
from longfire.parallel.mesh import Mesh
from longfire.tasks import language_modeling
from longfire.training.plateau import Plateau, after_validation
from longfire.training.schedule import schedule
from longfire.training.validation import count_for_plateau, loss_of_all

RECIPE = f"""
{ONE_LAYER}
[data]
dataset = ["text.txt"]
folder = "stores"
validation_fraction = 0.2
split_documents = "lines"
[tokenizer]
path = "bytes"
[training]
seq_len = 32
batch_size = 2
steps = 12
compile = "off"
threads = 1
[optimizer]
lr = 1e-2
[lr_scheduler]
name = "plateau"
patience = 1
threshold = 0.5
gamma = 0.5
min_lr_ratio = 0.0
warmup_steps = 0
[checkpoint]
interval = 2
[eval]
interval = 2
tokens = 512
[metrics]
report = false
"""


@given(
    some.lists(some.floats(0.5, 5), min_size=1, max_size=40),
    some.integers(0, 3),
    some.sampled_from([0.0, 1e-4, 0.1]),
)
@tries(deadline=None)
def test_the_rate_falls_where_torchs_does(losses, patience, threshold):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=threshold, eps=0.0
    )
    chosen = LRScheduler(
        name="plateau", gamma=0.5, patience=patience, threshold=threshold, min_lr_ratio=0.0
    )
    plateau = Plateau()
    for step, loss in enumerate(losses):
        plateau = after_validation(plateau, step, loss, chosen)
        theirs.step(loss)
        assert schedule(step, 100, 0, chosen, plateau.drops) == theirs.get_last_lr()[0]


def test_a_validation_counts_once_and_a_loss_that_is_not_finite_is_no_improvement():
    chosen = LRScheduler(name="plateau", patience=0)
    first = after_validation(Plateau(), 5, 2.0, chosen)
    assert first == Plateau(5, 2.0, 0, 0)
    assert after_validation(first, 5, 9.0, chosen) is first
    assert after_validation(first, 10, math.nan, chosen) == Plateau(10, 2.0, 0, 1)
    assert after_validation(Plateau(), 5, math.nan, chosen) == Plateau(5, None, 0, 1)


def test_the_loss_of_all_sources_is_that_of_their_tokens():
    results = {"a": {"loss": 1.0, "tokens": 30}, "b": {"loss": 3.0, "tokens": 10}}
    assert loss_of_all(results) == 1.5


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    lines = (f"number {i} is {i * i}. " * 3 for i in range(200))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path


def rates(run: str) -> dict[int, float]:
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["lr"] for record in lines if "lr" in record}


def test_a_run_resumes_to_the_bit(folder):
    """From a step whose validation came after its checkpoint, and once more after a loss of records."""
    train = ["train", "recipe.toml", "--job.dump_folder"]
    assert main([*train, "whole"]) == 0
    assert main([*train, "parts", "--training.steps", "4"]) == 0
    assert main([*train, "parts", "--training.steps", "7"]) == 0
    assert main([*train, "parts"]) == 0
    found = rates("whole")
    assert found == rates("parts")
    assert len(set(found.values())) > 2, "the rate falls more than once"
    one, two = (
        json.loads(Path(run, "checkpoints/step-12/state.json").read_text())["plateau"]
        for run in ("whole", "parts")
    )
    assert one == two and one[3] > 1
    for part in ("model", "optimizer"):
        name = f"checkpoints/step-12/shard-00000-{part}.safetensors"
        ours, theirs = load_file(Path("whole", name)), load_file(Path("parts", name))
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_a_rate_that_was_lowered_after_the_last_step_is_no_jump(folder, monkeypatch, capsys):
    """A run that ends after a validation, since the data or a stop end it, saves what was counted."""
    take = language_modeling.next_batch

    def of_eight_steps(run, state, batches):
        return take(run, state, batches) if state.step < 8 else None

    train = ["train", "recipe.toml", "--job.dump_folder", "run", "--checkpoint.interval", "100"]
    words = ["--lr_scheduler.patience", "0", "--lr_scheduler.threshold", "0.9"]
    with monkeypatch.context() as patched:
        patched.setattr(language_modeling, "next_batch", of_eight_steps)
        main([*train, *words])
    saved = json.loads(Path("run/checkpoints/step-8/state.json").read_text())["plateau"]
    assert saved[0] == 8 and saved[3] > 1, "counted, and lowered, before it was saved"
    capsys.readouterr()
    assert main([*train, *words]) == 0
    assert "jumps" not in capsys.readouterr().out
    assert rates("run")[9] < rates("run")[8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval.interval", "0"), "eval.interval = 0 measures none during training"),
        (("--data.validation_fraction", "0"), "data.validation_fraction = 0 keeps no text"),
        (("--lr_scheduler.name", "multistep"), "set lr_scheduler.milestones"),
        (
            ("--lr_scheduler.name", "multistep", "--lr_scheduler.milestones", "5,3"),
            "lr_scheduler.milestones = '5,3' must be steps from 1 on",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(folder, capsys, words, message):
    assert main(["train", "recipe.toml", *words]) == 2
    assert message in capsys.readouterr().err


def counted(rank: int) -> Plateau:
    """Each process comes with a loss of its own."""
    state = State(None, None, step=2, mesh=Mesh.of_degrees({"dp_shard": 2}, "cpu"))
    run = SimpleNamespace(
        lr_scheduler=LRScheduler(name="plateau"), eval=SimpleNamespace(interval=2)
    )
    count_for_plateau(state, run, 3.0 + rank)
    return state.plateau


def test_all_processes_have_the_same_state():
    assert in_processes(2, counted) == [Plateau(2, 3.0, 0, 0)] * 2
