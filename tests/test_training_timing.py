"""timing.py through tiny runs with a clock of our own: in time, repeated to the bit without a clock, resumed, on two processes."""

import json
import os
import random
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from logged import logged_to
from worlds import free_port

from longfire.config.run import Run
from longfire.launch import World
from longfire.training.loop import train
from longfire.training.schedule import progress, read_plan

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["gla", "attention"],
    "intermediate_size": 16,
    "gla": {"num_heads": 2},
    "attention": {"num_heads": 2},
}
SETTINGS = {
    "model.config": "shape.json",
    "model.compute_dtype": "float32",
    "data.dataset": "texts.jsonl",
    "data.validation_fraction": "0.1",
    "data.num_workers": "1",
    "data.prefetch_factor": "0",
    "training.seq_len": "16",
    "training.batch_size": "2",
    "training.steps": "100000",
    "training.compile": "off",
    "training.threads": "1",
    "lr_scheduler.warmup_steps": "5",
    "eval.tokens": "64",
    "eval.at_end": "false",
    "metrics.report": "false",
    "checkpoint.interval": "0",
}


class Ticks:
    """A clock that moves by itself: each time it is read, by the seconds that `rate` gives for the time it shows."""

    def __init__(self, rate: Callable[[float], float] = lambda now: 0.1) -> None:
        self.rate, self.shown = rate, 0.0

    def __call__(self) -> float:
        self.shown += self.rate(self.shown)
        return self.shown


def slower_later(now: float) -> float:
    return 0.1 if now < 20 else 0.25


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    draw = random.Random(0)
    texts = [
        {"text": " ".join(draw.choices(["fire", "long", "state", "gate"], k=20))}
        for _ in range(100)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(
    name: str, clock: Callable[[], float], recipe: Path | None = None, **changes: str
) -> list[str]:
    """Train into the folder `name`; what was reported."""
    notes: list[str] = []
    given = {} if recipe else SETTINGS
    given = (
        given
        | {key.replace("__", "."): value for key, value in changes.items()}
        | {"job.dump_folder": name}
    )
    with logged_to(notes):
        run = Run.compose(recipe, given)
        assert train(run, clock) == 0
    return notes


def records(name: str) -> list[dict]:
    lines = Path(name, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def column(name: str, key: str) -> list[float]:
    return [record[key] for record in records(name) if key in record]


def saved_plan(name: str) -> tuple:
    return read_plan(
        tuple(tomllib.loads(Path(name, "run.toml").read_text())["training"]["step_plan"])
    )


def test_a_run_stops_in_time_and_is_repeated_without_a_clock(folder, capsys):
    trained(
        "timed",
        Ticks(slower_later),
        training__max_seconds="40",
        eval__interval="7",
        checkpoint__interval="10",
    )
    out = capsys.readouterr().out
    plan, steps = saved_plan("timed"), len(records("timed"))
    assert 15 < steps < 40 and steps == plan[-1].total_steps and progress(plan, steps) == 1
    assert len(plan) > 1, "the machine became slower"
    assert column("timed", "elapsed_seconds")[-1] <= 40
    assert "s a step: 40 s of training are" in out and "planned before" in out
    totals = {entry.total_steps for entry in plan}
    assert set(column("timed", "planned_steps")) <= totals, "the record has the plan too"
    state = json.loads(Path("timed", f"checkpoints/step-{steps}/state.json").read_text())
    assert [tuple(entry) for entry in state["plan"]] == list(plan)
    assert 30 < state["elapsed_seconds"] <= 42

    trained("again", Ticks(lambda now: 9.0), Path("timed/run.toml"), training__max_seconds="0")
    for key in ("loss", "lr", "grad_norm", "step", "tokens", "planned_steps"):
        assert column("timed", key) == column("again", key), key
    assert saved_plan("again") == plan
    trained("again", Ticks(lambda now: 9.0), Path("again/run.toml"))
    assert len(records("again")) == steps, "started once more it is finished"


def test_killed_it_goes_on_with_the_plan_of_its_checkpoint(folder):
    """Killed: the folder is as it was at some checkpoint, with a run.toml and records that are later."""
    changes = {
        "training__max_seconds": "40",
        "checkpoint__interval": "4",
        "checkpoint__keep_latest_k": "0",
    }
    trained("timed", Ticks(slower_later), **changes)
    steps = len(records("timed"))
    for later in [
        path for path in Path("timed/checkpoints").glob("step-*") if int(path.name[5:]) > 8
    ]:
        later.rename(folder / later.name)
    notes = trained("timed", Ticks(lambda now: 0.05), Path("timed/run.toml"))
    assert any("resuming from" in note and "step-8" in note for note in notes)
    assert not any("step_plan" in note for note in notes), "nothing that the user has changed"
    plan, before = (
        saved_plan("timed"),
        json.loads((folder / f"step-{steps}" / "state.json").read_text())["plan"],
    )
    kept = [entry for entry in plan if entry.step < 8]
    assert kept == [tuple(entry) for entry in before if entry[0] < 8]
    assert len(records("timed")) > steps, "this machine is faster"
    assert 39 < column("timed", "elapsed_seconds")[-1] <= 40
    trained("again", Ticks(), Path("timed/run.toml"), training__max_seconds="0")
    assert column("again", "loss") == column("timed", "loss") and column("again", "lr") == column(
        "timed", "lr"
    )


def test_finished_and_longer(folder, capsys):
    trained("timed", Ticks(), training__max_seconds="20")
    steps = len(records("timed"))
    capsys.readouterr()
    trained("timed", Ticks(), Path("timed/run.toml"))
    assert f"this run is finished: its {steps} steps are done, " in capsys.readouterr().out
    trained("timed", Ticks(), Path("timed/run.toml"), training__max_seconds="30")
    assert "the run goes on with its floor, 3e-05" in capsys.readouterr().out
    assert len(records("timed")) > steps and column("timed", "lr")[steps] == pytest.approx(3e-5)


def test_going_on_says_at_once_how_long_or_that_nothing_is_left(folder, capsys):
    trained(
        "timed",
        Ticks(),
        training__max_seconds="40",
        checkpoint__interval="10",
        checkpoint__keep_latest_k="0",
    )
    for later in [
        path for path in Path("timed/checkpoints").glob("step-*") if path.name != "step-10"
    ]:
        later.rename(folder / later.name)
    capsys.readouterr()
    trained("timed", Ticks(), Path("timed/run.toml"), training__max_seconds="5")
    out = capsys.readouterr().out
    assert "this run is finished: its 10 steps are done, " in out
    assert "% of the plan, so the learning rate has not decayed to its floor. To go on" in out
    assert "5 s of training are" not in out
    trained("timed", Ticks(), Path("timed/run.toml"), training__max_seconds="40")
    assert " of training.max_seconds = 40 are left, planned as " in capsys.readouterr().out


def test_no_evaluation_begins_when_the_time_is_up(folder, monkeypatch):
    """It would count as training; the one at the end does not."""
    steps: list[int] = []
    monkeypatch.setattr(
        "longfire.training.loop.validate", lambda state, *rest: steps.append(state.step)
    )
    trained(
        "timed",
        Ticks(lambda now: 0.1 if now < 8 else 3.0),
        training__max_seconds="20",
        eval__interval="1",
    )
    assert column("timed", "elapsed_seconds")[-1] > 20, "the last step was a slow one"
    assert steps == list(range(1, len(records("timed"))))


@pytest.mark.parametrize("seconds, steps", [("0.001", 1), ("1.5", 1), ("2.5", 2)])
def test_a_tiny_budget_has_at_least_one_step(folder, seconds, steps):
    trained("timed", Ticks(), training__max_seconds=seconds)
    assert len(records("timed")) == steps


def test_the_settings_bound_the_steps_and_say_so(folder, capsys):
    trained("timed", Ticks(), training__max_seconds="1000", training__tokens=str(9 * 32))
    assert len(records("timed")) == 9
    assert "9 steps = 288 tokens (the most that the settings allow)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wsd", "linear", "constant"])
def test_every_schedule_ends_where_it_should(folder, name):
    trained(
        "timed",
        Ticks(),
        training__max_seconds="30",
        lr_scheduler__name=name,
        lr_scheduler__decay_ratio="0.4",
    )
    rates = column("timed", "lr")
    assert max(rates) == pytest.approx(3e-4) and len(rates) > 20
    assert rates[-1] == (pytest.approx(3e-4) if name == "constant" else pytest.approx(3e-5, rel=1))


def test_longer_rows_later_are_planned_anew(folder, capsys):
    changes = {"training__seq_len_schedule": "0:8,6:16", "training__max_seconds": "25"}
    trained("timed", Ticks(), **changes)
    assert column("timed", "elapsed_seconds")[-1] <= 25
    trained("again", Ticks(), Path("timed/run.toml"), training__max_seconds="0")
    assert column("again", "loss") == column("timed", "loss")


def one_of_two(
    rank: int, port: int, name: str, recipe: Path | None, changes: dict[str, str]
) -> None:
    """The body of a process. The clock of the second one is far ahead, and nobody asks it."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
    )
    given = ({} if recipe else SETTINGS) | changes | {"job.dump_folder": name}
    run = Run.compose(recipe, given, world=World(2, rank, rank))
    os._exit(train(run, Ticks(slower_later) if rank == 0 else Ticks(lambda now: 100.0)))


def trained_by_two(name: str, recipe: Path | None = None, **changes: str) -> None:
    port, given = free_port(), {key.replace("__", "."): value for key, value in changes.items()}
    context = mp.get_context("fork")
    both = [
        context.Process(target=one_of_two, args=(rank, port, name, recipe, given))
        for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(90)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]


def test_on_two_processes_the_first_decides(folder):
    trained_by_two("timed", training__max_seconds="40", checkpoint__interval="10")
    plan, steps = saved_plan("timed"), len(records("timed"))
    assert len(plan) > 1 and steps == plan[-1].total_steps > 10
    assert column("timed", "elapsed_seconds")[-1] <= 40
    trained_by_two("again", Path("timed/run.toml"), training__max_seconds="0")
    assert column("again", "loss") == column("timed", "loss") and column("again", "lr") == column(
        "timed", "lr"
    )


def test_a_run_without_a_budget_says_how_long_it_takes(folder, capsys):
    trained("known", Ticks(), training__steps="30", eval__interval="10")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time:"))
    assert (
        "s a step (measured): the 26 steps that are left take" in line
        and "evaluations beside them" in line
    )


def test_a_longer_run_after_a_finished_decay_says_that_the_rate_jumps(folder, capsys):
    trained("run", Ticks(), training__steps="20")
    capsys.readouterr()
    trained("run", Ticks(), training__steps="20")
    out = capsys.readouterr().out
    assert (
        "this run is finished: its 20 steps are done. To go on, raise training.steps" in out
        and "jumps" not in out
    )
    trained("run", Ticks(), training__steps="60")
    out = capsys.readouterr().out
    had, now = column("run", "lr")[19:21]
    assert (
        f"the learning rate jumps: step 20 had {had:.3g}, the next one has {now:.3g}" in out
        and now > 5 * had
    )


def test_a_run_that_just_goes_on_says_nothing_of_its_rate(folder, capsys):
    trained("run", Ticks(), training__steps="20", checkpoint__interval="9")
    Path("run/checkpoints/step-20").rename(folder / "step-20")
    capsys.readouterr()
    trained("run", Ticks(), training__steps="20", checkpoint__interval="9")
    assert "jumps" not in capsys.readouterr().out


def test_a_plan_that_is_not_followed_is_said(folder):
    notes = trained("timed", Ticks(), training__max_seconds="5", training__step_plan="4:90")
    assert any("training.step_plan is not followed" in note for note in notes)
    assert len(records("timed")) < 10


def test_a_run_that_streams_its_data_has_a_budget_and_validation_text(folder, capsys):
    """Both stores grow behind the training."""
    Path("unseen.txt").write_text("long fire gate " * 20)
    changes = {
        "data__streaming": "true",
        "data__validation": "unseen.txt",
        "eval__at_end": "true",
        "eval__interval": "4",
    }
    trained("timed", Ticks(), training__max_seconds="15", **changes)
    assert column("timed", "elapsed_seconds")[-1] <= 15
    assert "validation  unseen.txt: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_a_budget_with_a_smaller_batch_later_and_tokens_as_the_bound(folder, capsys):
    """A run that goes on with another batch size: no jump is reported where there is none."""
    trained("run", Ticks(), training__tokens="2000", checkpoint__interval="20", training__steps="7")
    for later in [
        path for path in Path("run/checkpoints").glob("step-*") if path.name != "step-40"
    ]:
        later.rename(folder / later.name)
    capsys.readouterr()
    trained("run", Ticks(), training__tokens="2000", training__batch_size="1")
    assert "jumps" not in capsys.readouterr().out
