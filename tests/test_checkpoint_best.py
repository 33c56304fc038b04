"""checkpoint/best.py: the checkpoints of the lowest validation loss are kept, also after a resume."""

import json
import math
from pathlib import Path

import pytest
from small_runs import ONE_LAYER

from longfire.checkpoint.best import (
    LOSSES,
    best_steps,
    forget_later_losses,
    note_loss,
    read_losses,
)
from longfire.checkpoint.folder import steps
from longfire.cli import main

RECIPE = f"""
{ONE_LAYER}
[data]
dataset = ["text.txt"]
folder = "stores"
validation = ["other.txt"]
[tokenizer]
path = "bytes"
[training]
seq_len = 32
batch_size = 2
steps = 12
compile = "off"
threads = 1
[optimizer]
lr = 2e-2
[lr_scheduler]
name = "constant"
warmup_steps = 3
[checkpoint]
interval = 100
keep_latest_k = 1
keep_best_k = 2
[eval]
interval = 2
tokens = 512
[metrics]
report = false
"""


def test_the_lowest_losses_of_steps_that_are_there(tmp_path):
    for step, loss in {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: math.nan}.items():
        note_loss(tmp_path, step, loss)
        (tmp_path / f"step-{step}").mkdir()
    assert best_steps(tmp_path, 3) == [4, 8, 6], "of equal ones the earlier; NaN is none"
    (tmp_path / "step-4").rmdir()
    assert best_steps(tmp_path, 1) == [8] and best_steps(tmp_path, 0) == []
    forget_later_losses(tmp_path, 6)
    assert read_losses(tmp_path) == {2: 3.0, 4: 1.0, 6: 2.0}
    note_loss(tmp_path, 6, 0.5)
    assert best_steps(tmp_path, 1) == [6]
    (tmp_path / LOSSES).write_text("{broken")
    assert read_losses(tmp_path) == {}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    lines = (f"number {i} is {i * i}. " * 3 for i in range(200))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "other.txt").write_text("OTHER LETTERS " * 100)
    return tmp_path


def losses_recorded(run: str) -> dict[int, float]:
    records = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    key = "eval/other.txt/loss"
    return {record["step"]: record[key] for record in records if key in record}


def test_a_run_keeps_the_best_and_the_newest_also_when_it_is_resumed(folder, capsys):
    train = ["train", "recipe.toml", "--job.dump_folder"]
    assert main([*train, "whole"]) == 0
    assert main([*train, "parts", "--training.steps", "7"]) == main([*train, "parts"]) == 0
    losses = losses_recorded("whole")
    assert read_losses(Path("whole/checkpoints")) == pytest.approx(losses)
    best = sorted(losses, key=lambda step: losses[step])
    assert 12 not in best[:2], "what is learned is no help for other letters"
    kept = sorted({*best[:2], 12})
    assert steps(Path("whole/checkpoints")) == kept
    assert steps(Path("parts/checkpoints")) == kept
    message = capsys.readouterr().out
    assert f"best checkpoint: step {best[0]}, validation loss {losses[best[0]]:.4f}" in message


def test_losses_of_an_abandoned_branch_are_forgotten_also_without_the_setting(folder):
    train = ["train", "recipe.toml", "--job.dump_folder", "run", "--training.steps"]
    assert main([*train, "8"]) == 0
    without = ["--checkpoint.keep_best_k", "0", "--checkpoint.interval", "2"]
    go_back = ["--checkpoint.load_step", str(min(steps(Path("run/checkpoints"))))]
    assert main([*train, "8", *without, *go_back]) == 0
    step = int(go_back[1])
    assert max(read_losses(Path("run/checkpoints"))) == step < 8


def test_where_all_are_kept_evaluated_steps_are_saved_and_the_best_is_named(folder, capsys):
    words = ["--checkpoint.keep_latest_k", "0", "--job.dump_folder", "run"]
    assert main(["train", "recipe.toml", *words]) == 0
    assert steps(Path("run/checkpoints")) == [2, 4, 6, 8, 10, 12]
    out = capsys.readouterr().out
    assert "best checkpoint: step" in out and "changes nothing" not in out


def test_the_last_step_may_be_the_best(folder):
    """Its loss is known after it is saved: what it replaces is removed then."""
    Path("same.txt").write_text(Path("text.txt").read_text() + "one more line")
    words = ["--data.validation", "same.txt", "--job.dump_folder", "run"]
    assert main(["train", "recipe.toml", *words]) == 0
    losses = read_losses(Path("run/checkpoints"))
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert steps(Path("run/checkpoints")) == sorted({*best, 12}) and 12 in best


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval.interval", "0"), "checkpoint.keep_best_k = 2 follows the validation loss"),
        (
            ("--data.validation", "", "--data.validation_fraction", "0"),
            "keeps no text for it",
        ),
    ],
)
def test_without_a_validation_loss_it_is_refused(folder, capsys, words, message):
    assert main(["train", "recipe.toml", *words]) == 2
    assert message in capsys.readouterr().err
