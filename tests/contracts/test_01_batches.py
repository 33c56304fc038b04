"""Promise 1: batch t is a pure function of (stores, shares, seed, t): any workers, accumulation, order of asking, resumes.

Its state is one integer, the rows consumed; another global batch size resumes from it; seeking is O(1).
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from longfire.config import settings
from longfire.data.batch import Batch
from longfire.data.batches import Batches
from longfire.data.manifest import checksum
from longfire.data.prepare import prepare

T = 32
SHARES = (0.6, 0.3, 0.1)
SHUFFLES = ("global", "window", "none")


def settings_of(texts: Path, **changes) -> settings.Data:
    files = tuple(str(texts / f"{name}.jsonl") for name in "abc")
    fields = {
        "folder": str(texts / "stores"),
        "data_probs": SHARES,
        "varlen": True,
        "context_len": 25,
        "validation_fraction": 0.1,
    }
    return settings.Data(dataset=files, **{**fields, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three sources, of 300, 100 and 20 documents of many lengths."""
    folder = tmp_path_factory.mktemp("batches")
    for name, count in (("a", 300), ("b", 100), ("c", 20)):
        texts = [f"{name}{i} " + "fire " * (i * 7 % 60) for i in range(count)]
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts)
        )
    return folder


def batches_of(folder: Path, shuffle: str) -> Batches:
    data = settings_of(folder, shuffle=shuffle, shuffle_window_sequences=100, prefetch_factor=0)
    return Batches(prepare(data, settings.Tokenizer()), data, T, seed=3)


@pytest.fixture(scope="module", params=SHUFFLES)
def batches(request, folder) -> Batches:
    return batches_of(folder, request.param)


def rows_of(batch: Batch) -> list[tuple]:
    """What makes each row of a batch, as plain values."""
    columns = (batch.ids_BT, batch.labels_BT, batch.positions_BT, batch.documents.ids_BT)
    return list(zip(*(map(tuple, column.tolist()) for column in columns)))


@hypothesis_settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), start=st.integers(0, 10**9))
def test_any_batch_sizes_give_the_same_rows(batches, sizes, start):
    """Accumulation, ranks and a global batch size changed on resume all cut the one sequence of rows somewhere else."""
    whole, consumed = rows_of(batches.at(start, sum(sizes))), 0
    for rows in sizes:
        assert rows_of(batches.at(start + consumed, rows)) == whole[consumed : consumed + rows]
        consumed += rows


def test_microbatches_and_ranks_share_out_the_rows_of_a_batch(batches):
    """8 rows as 1 x 8, 8 x 1, 2 x 4, and as what each of two ranks asks for."""
    whole = rows_of(batches.at(40, 8))
    for microbatches in (1, 2, 8):
        parts = batches.at(40, 8).split(microbatches)
        assert [row for part in parts for row in rows_of(part)] == whole
    assert [row for rank in (0, 1) for row in rows_of(batches.at(40 + rank * 4, 4))] == whole


@hypothesis_settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.integers(0, 500), min_size=1, max_size=10))
def test_what_was_asked_before_does_not_matter(batches, steps):
    """Also with prefetching, in whatever order: the only state is the number."""
    data = settings_of(
        batches.prepared.stores[0].folder.parents[1],
        shuffle=batches.order.shuffle,
        shuffle_window_sequences=100,
    )
    with Batches(batches.prepared, data, T, seed=3) as ahead:
        for step in steps:
            assert rows_of(ahead.at(step * 4, 4)) == rows_of(batches.at(step * 4, 4))


def test_processes_that_tokenize_do_not_matter(folder, batches, tmp_path):
    for workers in (1, 3):
        data = settings_of(
            folder, shuffle=batches.order.shuffle, shuffle_window_sequences=100, num_workers=workers
        )
        prepared = prepare(
            settings_of(folder, num_workers=workers, folder=str(tmp_path / str(workers))),
            settings.Tokenizer(),
        )
        with Batches(prepared, data, T, seed=3) as again:
            assert rows_of(again.at(0, 200)) == rows_of(batches.at(0, 200))


ANOTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_01_batches import SHUFFLES, batches_of, rows_of
from longfire.data.manifest import checksum
for shuffle in SHUFFLES:
    with batches_of(Path(sys.argv[2]), shuffle) as batches:
        print(checksum(repr(rows_of(batches.at(int(sys.argv[3]), 64))).encode()))
"""


def test_another_process_goes_on_from_the_integer(folder):
    arguments = [str(Path(__file__).parent), str(folder), "123"]
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    for shuffle, printed in zip(SHUFFLES, done.stdout.split()[-len(SHUFFLES) :], strict=True):
        with batches_of(folder, shuffle) as batches:
            assert printed == checksum(repr(rows_of(batches.at(123, 64))).encode())


def test_shares_are_shares_of_tokens_in_every_prefix(batches):
    """50/50 stays 50/50 whatever the lengths of documents: rows, hence tokens, are counted."""
    sources = [row.source[0] for row in batches.origins(0, 1000)]
    for n in range(1, 1001):
        for name, share in zip("abc", SHARES):
            assert abs(sources[:n].count(name) - n * share) < 3


def test_every_row_of_a_source_comes_once_an_epoch(batches):
    rows = [(row.epoch, row.row) for row in batches.origins(0, 3000) if row.source == "c.jsonl"]
    there = (batches.prepared.stores[2].train.length - 1) // T
    assert len(rows) > 3 * there
    for epoch in range(len(rows) // there):
        assert sorted(row for e, row in rows if e == epoch) == list(range(there))


def test_another_seed_is_another_order(folder, batches):
    data = settings_of(folder, shuffle=batches.order.shuffle, shuffle_window_sequences=100)
    with Batches(batches.prepared, data, T, seed=4) as other:
        assert batches.origins(0, 200) != other.origins(0, 200)
        assert torch.equal(other.at(0, 4).ids_BT, other.at(0, 4).ids_BT)


def test_seeking_costs_the_same_anywhere(batches):
    """The median of some seeks to row 10**12 takes no more than 20 ms, and 5 times those to row 0 (bench/batches.py has a
    store of 10**12 tokens)."""

    def seconds(start: int) -> float:
        taken = []
        for i in range(7):
            began = time.perf_counter()
            batches.at(start + i * 10_000, 4)  # each in another block of places
            taken.append(time.perf_counter() - began)
        return sorted(taken)[3]

    seconds(0)
    near, far = min(seconds(0) for _ in range(3)), min(seconds(10**12) for _ in range(3))
    assert far < max(0.02, 5 * near)


def test_while_the_store_grows_the_batches_are_those_of_the_finished_one(folder, tmp_path):
    data = settings_of(folder, folder=str(tmp_path), streaming=True, shuffle_window_sequences=64)
    with (
        prepare(data, settings.Tokenizer(), background=True) as prepared,
        Batches(prepared, data, T, seed=3) as growing,
    ):
        seen = [rows_of(growing.at(start, 16)) for start in range(0, 640, 16)]
    with Batches(prepare(data, settings.Tokenizer()), data, T, seed=3) as finished:
        assert seen == [rows_of(finished.at(start, 16)) for start in range(0, 640, 16)]
