"""train.py: the step without mocks; what is decided around it: learning rate, skipping, compiling, stopping."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from logged import logged_to
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.config.settings import Optimizer, Training
from longfire.data.batch import Batch
from longfire.data.batches import Origin
from longfire.device import Clock
from longfire.errors import TrainingError
from longfire.optim import make_optimizer
from longfire.training import loop, start, timing

pytestmark = pytest.mark.dtype

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def composed(**changes: str) -> Run:
    """The quickstart with 8 sequences of 256 tokens and 150 steps on a cosine, and with what is asked for."""
    length = {"training__batch_size": "8", "training__steps": "150", "training__max_seconds": "0"}
    rate = {"lr_scheduler__name": "cosine", "lr_scheduler__min_lr_ratio": "0.1"}
    changes = {**length, **rate, **changes}
    return Run.compose(RECIPE, {key.replace("__", "."): value for key, value in changes.items()})


def state_of(model) -> State:
    return State(model, make_optimizer(model, Optimizer(), CPU))


def a_batch(rows: int = 2) -> Batch:
    ids_BT = torch.randint(0, 97, (rows, 16), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT, ids_BT.roll(-1, 1), torch.arange(16).expand(rows, 16))


def test_a_step_learns_and_counts(tiny_model):
    state, clock = state_of(tiny_model(initializer_range=0.02)), Clock(CPU)
    losses = [
        loop.train_step(state, [a_batch()], 1e-2, Training(), clock)["loss"] for _ in range(20)
    ]
    assert losses[-1] < losses[0] - 0.5
    assert (state.step, state.rows_consumed, state.tokens) == (20, 40, 640)
    assert {"forward", "backward", "optimizer"} <= clock.read().keys()


def test_a_step_with_a_gradient_that_is_not_finite_moves_nothing_but_the_count(tiny_model):
    state = state_of(tiny_model())
    loop.train_step(state, [a_batch()], 1e-3, Training(), Clock(CPU))
    state.model.norm.weight.data[0] = torch.inf
    before = {
        name: p.detach().clone()
        for name, p in state.tensors().items()
        if not name.startswith("rng")
    }
    numbers = loop.train_step(state, [a_batch()], 1e-3, Training(), Clock(CPU))
    assert numbers["skipped"] and state.skipped_steps == 1 and state.step == 2
    assert all(torch.equal(state.tensors()[name], tensor) for name, tensor in before.items())


BAD, GOOD = {"skipped": 1.0, "loss": float("nan"), "grad_norm": float("nan")}, {"skipped": 0.0}
ROWS = SimpleNamespace(
    origins=lambda start, count: [Origin("wiki.jsonl", start + i, 0) for i in range(count)]
)


def test_skips_are_counted_in_a_row_and_one_too_many_names_the_batch():
    run = composed(training__skip_nan_inf="true", training__max_skips_in_a_row="3")
    skips = 0
    for numbers, expected in ((BAD, 1), (BAD, 2), (GOOD, 0), (BAD, 1), (BAD, 2)):
        skips = loop.check_skips(skips, numbers, ROWS, 40, run)
        assert skips == expected
    with pytest.raises(TrainingError, match=r"3 step.*sequences 40 to 47.*wiki\.jsonl sequence 40"):
        loop.check_skips(skips, BAD, ROWS, 40, run)


def test_without_skip_nan_inf_the_first_one_is_an_error():
    with pytest.raises(TrainingError, match="skip_nan_inf"):
        loop.check_skips(0, BAD, ROWS, 0, composed())


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_the_learning_rate_is_that_of_transformers(unit):
    """transformers warms up from 0 at its step 0; ours is one step ahead, so that no step is spent on a rate of 0."""
    warmup = (
        {"lr_scheduler__warmup_steps": "20"}
        if unit == "steps"
        else {"lr_scheduler__warmup_tokens": str(20 * 2048)}
    )
    run = composed(training__steps="150", optimizer__lr="1.0", **warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 20, 150, min_lr_rate=0.1)
    for step in range(150):
        state = State(None, None, step, tokens=step * run.tokens_per_step)
        if step >= 20:
            assert timing.learning_rate(run, state) == pytest.approx(
                theirs.get_last_lr()[0], rel=1e-3, abs=2e-3
            )
        optimizer.step()
        theirs.step()


def test_a_run_counted_in_tokens_has_them_all_with_another_batch_size_too(tiny_model):
    """7 steps of 8 rows, then 4 rows a step: what is missing of 100 x 2048 tokens takes twice as many steps."""
    state = state_of(tiny_model())
    state.step, state.tokens = 7, 7 * 2048
    assert timing.last_step(composed(training__tokens=str(100 * 2048)), state) == 100
    changes = {"training__batch_size": "4", "lr_scheduler__warmup_steps": "20"}
    half = composed(training__tokens=str(100 * 2048), **changes)
    assert timing.last_step(half, state) == 7 + 2 * 93
    assert timing.learning_rate(half, state) == pytest.approx(half.optimizer.lr * 15 / 20), (
        "14 steps of this size are done"
    )
    state.step, state.tokens = 193, 100 * 2048
    assert timing.last_step(half, state) == 193, "it has ended"


def test_other_data_are_reported_when_a_run_goes_on(tmp_path):
    run, notes = composed(job__dump_folder=str(tmp_path)), []

    def kept(**stores: str) -> list[str]:
        notes.clear()
        there = [
            SimpleNamespace(folder=Path(f"stores/{store}"), complete=False)
            for store in stores.values()
        ]
        with logged_to(notes):
            start.keep_sources(run, SimpleNamespace(names=tuple(stores), stores=there))
        return notes

    assert not kept(a="a-1") and not kept(a="a-2"), "before there is a checkpoint any data will do"
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert not kept(a="a-2")
    assert "data of a: a-3, was a-2" in kept(a="a-3")[0]
    assert [note.partition(": ")[2].partition(";")[0] for note in kept(b="b-1")] == [
        "data of a: none, was a-3",
        "data of b: b-1, was none",
    ]
