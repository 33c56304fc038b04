"""Promise 7 of records with loss masks: the mean over the tokens that count, whatever the records, the packing and the plan.

Records with loss masks go through store, order, packing and the program's own step. What comes out is compared with a plain loop
over the records, in float64, and under plans with what one process makes of them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plans import HYBRID, PLANS, ROWS, Plan, T, state_of, steps
from worlds import in_processes

from longfire.config import settings
from longfire.data.batches import Batches
from longfire.data.prepare import prepare
from longfire.evaluation.evaluate import measure
from longfire.model import Model
from longfire.parallel.mesh import ALONE, Mesh

# As of test_03_plans.py: sums of some 1000 terms in another order differ by 1e-13 in float64.
WITHIN = 1e-9
# Of one process and the loop, whose forwards have other shapes: parts of the forward are in float32.
FLOAT32 = 2**-24


def records_of(count: int) -> list[dict[str, list[int]]]:
    """Records of many lengths. Most have masks; one in four has none of its tokens counted."""
    draw = np.random.default_rng(0)
    records = []
    for number in range(count):
        length = int(draw.integers(2, 40))
        ids = draw.integers(0, 97, length).tolist()
        mask = (draw.random(length) < draw.random()).astype(int).tolist()
        if number % 4 == 0:
            mask = [0] * length
        record = {"input_ids": ids, "loss_mask": mask}
        if number % 7 == 1:
            del record["loss_mask"]
        records.append(record)
    return records


RECORDS = records_of(160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (folder / "rows.jsonl").write_text("".join(lines))
    batches_of(folder, varlen=False).close()  # prepared once, before there are several processes
    return folder


def batches_of(folder: Path, varlen: bool, shuffle: str = "none") -> Batches:
    data = settings.Data(
        dataset=(str(folder / "rows.jsonl"),),
        record_format=("tokens",),
        folder=str(folder / "stores"),
        num_workers=1,
        prefetch_factor=0,
        validation_fraction=0.2,
        shuffle=shuffle,
        varlen=varlen,
    )
    prepared = prepare(data, settings.Tokenizer())
    return Batches(prepared, data, T, seed=1)


def said_under(rank: int, plan: Plan, folder: Path, varlen: bool, microbatches: int = 2):
    """Three steps, and an evaluation."""
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(HYBRID, plan, mesh, torch.float64)
    with batches_of(folder, varlen, "global") as batches:
        said = steps(state, 3, rows=batches.at, microbatches=microbatches)
        validation = batches.validation_batches(0, 10**6)
        found = measure(state.model, validation, np.ones(258, np.int64), 64, mesh)
    return said, found.numbers()


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize("varlen", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(
    "plan", ["fsdp 2", "cp 2", "pp 2", pytest.param("fsdp 2 x cp 2", marks=SLOW)]
)
def test_a_plan_does_not_change_what_counts(plan, varlen, folder):
    expected, evaluated = said_under(0, PLANS["one"], folder, varlen)
    for said, found in in_processes(PLANS[plan].processes, said_under, PLANS[plan], folder, varlen):
        for got, wanted in zip(said, expected):
            assert got == pytest.approx(wanted, rel=WITHIN)
        assert found == pytest.approx(evaluated, rel=WITHIN)


@pytest.mark.parametrize("microbatches", [1, 8, 16])
def test_accumulation_does_not_change_what_counts(microbatches, folder):
    """With 16 micro-batches of one sequence some have no token that counts."""
    expected, _ = said_under(0, PLANS["one"], folder, False)
    said, _ = said_under(0, PLANS["one"], folder, False, microbatches)
    for got, wanted in zip(said, expected):
        assert got == pytest.approx(wanted, rel=WITHIN)


def flat(folder: Path, kept_for_validation: bool) -> tuple[list[int], list[int]]:
    """Ids and masks of all records of one kind, end to end, as they stand in the file."""
    from longfire.data.validation import is_validation

    ids: list[int] = []
    mask: list[int] = []
    for number, record in enumerate(RECORDS, 1):
        if is_validation(f"rows.jsonl:{number}", 0.2) == kept_for_validation:
            ids += record["input_ids"]
            mask += record.get("loss_mask", [1] * len(record["input_ids"]))
    return ids, mask


def plain_loss(
    model: Model, ids: list[int], mask: list[int], sequences: range
) -> tuple[float, int]:
    """Sum and number of -log p of the tokens that count, token by token."""
    nats = 0.0
    count = 0
    for number in sequences:
        here = ids[number * T : number * T + T + 1]
        logits_TW = model.logits(model(torch.tensor([here[:-1]])))[0].double()
        for place in range(len(here) - 1):
            if mask[number * T + place + 1]:
                nats -= float(logits_TW[place].log_softmax(-1)[here[place + 1]])
                count += 1
    return nats, count


@torch.no_grad()
def test_the_loss_is_that_of_a_plain_loop_over_the_records(folder):
    state = state_of(HYBRID, PLANS["one"], ALONE, torch.float64)
    ids, mask = flat(folder, kept_for_validation=False)
    nats, count = plain_loss(state.model, ids, mask, range(ROWS))
    assert 0 < count < ROWS * T
    with batches_of(folder, varlen=False) as batches, torch.enable_grad():
        (numbers,) = steps(state, 1, rows=batches.at)
    assert numbers["loss"] == pytest.approx(nats / count, rel=FLOAT32)


@torch.no_grad()
def test_an_evaluation_counts_the_same_tokens(folder):
    state = state_of(HYBRID, PLANS["one"], ALONE, torch.float64)
    ids, mask = flat(folder, kept_for_validation=True)
    nats, count = plain_loss(state.model, ids, mask, range(-(-(len(ids) - 1) // T)))
    with batches_of(folder, varlen=False) as batches:
        validation = batches.validation_batches(0, 10**6)
        found = measure(state.model, validation, np.ones(258, np.int64), 64).numbers()
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=FLOAT32)
    assert found["perplexity"] == pytest.approx(np.exp(nats / count), rel=FLOAT32)
