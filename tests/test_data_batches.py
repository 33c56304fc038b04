"""Batches: tensors as the order and the packing say, validation text, waiting for a growing store."""

import json
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from logged import logged_to

from longfire.config import settings
from longfire.data import batches as room
from longfire.data.batch import Batch
from longfire.data.batches import Batches
from longfire.data.pack import NO_LABEL
from longfire.data.prepare import Prepared, prepare
from longfire.data.store_writer import StoreWriter
from longfire.data.token_record import TokenRecord
from longfire.data.tokenizer import bytes_tokenizer
from longfire.data.tokens import TokenStore
from longfire.data.validation import is_validation
from longfire.errors import DataError, SettingsError

T = 16
HEADER = {
    "source": {"name": "s", "entry": "s.txt", "fingerprint": "f"},
    "tokenizer": {"fingerprint": bytes_tokenizer().fingerprint, "vocab_size": 258},
    "options": {},
    "dtype": "uint16",
}


def writer_of(folder: Path) -> StoreWriter:
    folder.mkdir(exist_ok=True)
    return StoreWriter(folder, HEADER, shard_tokens=500, shard_documents=7)


def append(writer: StoreWriter, documents: list[str], stream: str = "train") -> None:
    ids = [np.frombuffer(text.encode() + b"\n", np.uint8) for text in documents]
    lengths = np.array([len(i) for i in ids])
    writer.append(stream, TokenRecord(np.concatenate(ids), lengths), lengths - 1)


def texts(seed: int, count: int) -> list[str]:
    lengths = np.random.default_rng(seed).integers(1, 40, count)
    return [f"{seed}.{i}:" + chr(97 + i % 26) * length for i, length in enumerate(lengths.tolist())]


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    """Two finished stores, of 200 and 30 documents; 3 to 1."""
    stores = []
    for seed, count in ((0, 200), (1, 30)):
        writer = writer_of(tmp_path / f"{seed}")
        append(writer, texts(seed, count))
        append(writer, texts(seed + 10, 9), "heldout")
        writer.commit({}, complete=True)
        writer.close()
        stores.append(TokenStore(tmp_path / f"{seed}"))
    return Prepared(bytes_tokenizer(), tuple(stores), (0.75, 0.25), ("a", "b"))


def batches_of(prepared: Prepared, seed: int = 5, **changes) -> Batches:
    return Batches(prepared, settings.Data(**{"prefetch_factor": 0, **changes}), T, seed)


def same(one: Batch, other: Batch) -> bool:
    tensors = [(b.ids_BT, b.labels_BT, b.positions_BT) for b in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*tensors)) and (one.documents is None) == (
        other.documents is None
    )


def test_rows_are_the_tokens_of_their_place(prepared):
    batches = batches_of(prepared)
    batch, rows = batches.at(37, 12), batches.origins(37, 12)
    assert {str(row).split()[0] for row in rows} == {"a", "b"}
    for i, row in enumerate(rows):
        stream = prepared.stores[prepared.names.index(row.source)].train
        tokens = stream.tokens(row.row * T, row.row * T + T + 1).astype(int).tolist()
        assert batch.ids_BT[i].tolist() == tokens[:-1] and batch.labels_BT[i].tolist() == tokens[1:]
        assert batch.positions_BT[i].tolist() == list(range(T))
    assert batch.documents is None and batch.ids_BT.dtype == batch.labels_BT.dtype == torch.int64
    assert batch.real_tokens() == 12 * T


def test_documents_of_a_row_are_whole_words(prepared):
    """Each piece is a document, or a part of one; its label never comes from the next."""
    batches = batches_of(prepared, varlen=True, context_len=9)
    batch = batches.at(0, 64)
    assert batch.documents.max_length <= 9
    cu = batch.documents.cu_lengths.tolist()
    ids, labels, positions = (
        t.flatten().tolist() for t in (batch.ids_BT, batch.labels_BT, batch.positions_BT)
    )
    for start, stop in pairwise(cu):
        assert positions[start:stop] == list(range(stop - start))
        assert 10 not in ids[start : stop - 1], "a document ends inside a piece"
    for token, label in zip(ids, labels):
        assert (label == NO_LABEL) == (token == 10)
    assert batch.real_tokens() == sum(token != 10 for token in ids)


def test_epochs_and_shares(prepared):
    """The small source begins again while the large one goes on; each epoch has every row once, each in a new order."""
    batches = batches_of(prepared)
    rows = batches.origins(0, 400)
    for name, share, store in zip("ab", (300, 100), prepared.stores):
        mine = [(row.epoch, row.row) for row in rows if row.source == name]
        assert abs(len(mine) - share) <= 1
        there = (store.train.length - 1) // T
        epochs = [[row for epoch, row in mine if epoch == e] for e in range(len(mine) // there)]
        assert all(sorted(epoch) == list(range(there)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert len([row for row in rows if row.source == "b"]) > 2 * (
        prepared.stores[1].train.length // T
    ), "several epochs"


@pytest.mark.parametrize("varlen", [False, True])
def test_splitting_keeps_the_rows(prepared, varlen):
    batch = batches_of(prepared, varlen=varlen).at(0, 12)
    assert batch.split(1) == (batch,)
    parts = batch.split(3)
    for name in ("ids_BT", "labels_BT", "positions_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    if varlen:
        ends = [0]
        for part in parts:
            start = ends[-1]
            ends += [start + end for end in part.documents.cu_lengths[1:].tolist()]
        assert ends == batch.documents.cu_lengths.tolist()
    with pytest.raises(AssertionError, match="12 sequences do not divide into 5"):
        batch.split(5)
    moved = batch.to("cpu")
    assert same(moved, batch)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, T, T + 1, 3 * T + 2, 100, 10**9])
def test_held_out_tokens_are_each_learned_once(prepared, tokens, varlen):
    batches = batches_of(prepared, varlen=varlen)
    stream = prepared.stores[0].validation
    length = batches.validation_tokens(0, tokens)
    assert length == min(tokens, stream.length)
    everything = stream.tokens(0, length).astype(int).tolist()
    parts = list(batches.validation_batches(0, tokens, count=2))
    labels = [
        label for part in parts for label in part.labels_BT.flatten().tolist() if label != NO_LABEL
    ]
    after_an_end = [
        token for previous, token in pairwise(everything) if not (varlen and previous == 10)
    ]
    assert labels == after_an_end
    assert all(part.sequences <= 2 for part in parts)
    assert batches.validation_text(0, tokens) == prepared.tokenizer.decode(everything)


def test_no_held_out_documents(tmp_path):
    writer = writer_of(tmp_path / "s")
    append(writer, texts(0, 20))
    writer.commit({}, complete=True)
    prepared = Prepared(bytes_tokenizer(), (TokenStore(tmp_path / "s"),), (1.0,), ("s",))
    for varlen in (False, True):
        batches = batches_of(prepared, varlen=varlen)
        assert (
            list(batches.validation_batches(0, 100)) == [] and batches.validation_text(0, 100) == ""
        )


def test_prefetching_changes_nothing(prepared):
    plain = batches_of(prepared)
    with batches_of(prepared, prefetch_factor=3) as ahead:
        for start, rows in [
            (0, 4),
            (4, 4),
            (8, 4),
            (12, 4),
            (100, 6),
            (106, 6),
            (0, 4),
            (4, 2),
            (6, 2),
            (10**9, 3),
        ]:
            assert same(ahead.at(start, rows), plain.at(start, rows))
    assert ahead.wait_seconds > 0


def test_batches_are_made_ahead(prepared, monkeypatch):
    made = []
    make = Batches._make
    monkeypatch.setattr(
        Batches, "_make", lambda self, *key: (made.append(key), make(self, *key))[1]
    )
    with batches_of(prepared, prefetch_factor=2) as batches:
        for step in range(5):
            batches.at(step * 4, 4)
        batches._thread.submit(lambda: None).result()  # after all that was asked for
        assert sorted(set(made)) == [(step * 4, 4) for step in range(7)] and len(made) == 7


def test_a_source_shorter_than_a_row(prepared):
    with pytest.raises(
        DataError, match=r"b: \d+ tokens are less than one sequence .*smaller training.seq_len"
    ):
        Batches(prepared, settings.Data(), 2000, 0)
    with pytest.raises(SettingsError, match=r"data\.varlen = true"):
        batches_of(prepared, context_len=8)
    with pytest.raises(SettingsError, match="shuffle_window_sequences"):
        batches_of(prepared, shuffle_window_sequences=0)


class Grower:
    """A store that is written step by step while a reader waits for it."""

    def __init__(self, folder: Path) -> None:
        self.writer, self.left = writer_of(folder), texts(3, 400)
        self.prepared = Prepared(bytes_tokenizer(), (TokenStore(folder),), (1.0,), ("s",))

    def grow(self, documents: int, complete: bool = False) -> None:
        now, self.left = self.left[:documents], self.left[documents:]
        append(self.writer, now)
        self.writer.commit({}, complete)


@pytest.mark.parametrize("shuffle", ["none", "window", "global", "auto"])
def test_a_growing_store_gives_the_batches_of_the_finished_one(shuffle, tmp_path):
    grower = Grower(tmp_path / "s")
    changes = {
        "streaming": True,
        "shuffle": shuffle,
        "shuffle_window_sequences": 100,
        "prefetch_factor": 2,
    }
    with batches_of(grower.prepared, **changes) as growing:
        thread = threading.Thread(
            target=lambda: [
                grower.grow(20, len(grower.left) == 20) or time.sleep(0.01) for _ in range(20)
            ]
        )
        thread.start()
        seen = [growing.at(start, 8) for start in range(0, 800, 8)]
        thread.join()
    finished = Prepared(bytes_tokenizer(), (TokenStore(tmp_path / "s"),), (1.0,), ("s",))
    again = batches_of(finished, **changes)
    assert all(same(batch, again.at(8 * i, 8)) for i, batch in enumerate(seen))
    assert max(row.epoch for row in again.origins(0, 800)) >= 1


def test_training_begins_with_the_first_window_and_then_waits_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.2)
    grower, said = Grower(tmp_path / "s"), []
    grower.grow(80)
    with (
        logged_to(said),
        batches_of(grower.prepared, streaming=True, shuffle_window_sequences=16384) as batches,
    ):
        batches.at(0, 64)
        assert batches.wait_seconds < 0.2 and not said
        threading.Timer(0.6, grower.grow, (300,)).start()
        batches.at(64, 8)
        assert 0.5 < batches.wait_seconds < 5
    assert len(said) == 1 and "training waits for s" in said[0]


def test_a_failed_preparation_ends_the_wait(tmp_path):
    grower = Grower(tmp_path / "s")

    class Failed:
        def check(self, stores) -> None:
            raise DataError("preparation behind training failed: reasons")

    prepared = replace(grower.prepared, background=Failed())
    for prefetch in (0, 2):
        with batches_of(prepared, streaming=True, prefetch_factor=prefetch) as batches:
            for ask in (lambda b: b.at(0, 4), lambda b: next(b.validation_batches(0, 10))):
                with pytest.raises(DataError, match="reasons"):
                    ask(batches)


def test_closing_ends_a_waiting_thread(tmp_path):
    grower = Grower(tmp_path / "s")
    grower.grow(80)
    batches = batches_of(grower.prepared, streaming=True, prefetch_factor=4)
    batches.at(0, 32)  # rows 64 and on are waited for behind us
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5


def test_held_out_text_is_waited_for(tmp_path):
    """An evaluation reads the same text in every run, however fast the preparation was."""
    grower = Grower(tmp_path / "s")
    batches = batches_of(grower.prepared, streaming=True)

    def later() -> None:
        append(grower.writer, texts(11, 30), "heldout")
        grower.grow(10)

    threading.Timer(0.2, later).start()
    assert batches.validation_tokens(0, 50) == 50


def test_two_sources_of_which_one_ends_early(tmp_path):
    """The one that ended begins its next epoch while the other still grows; shares stay."""
    growers = [Grower(tmp_path / name) for name in "ab"]
    growers[1].grow(20, complete=True)
    stores = tuple(grower.prepared.stores[0] for grower in growers)
    prepared = Prepared(bytes_tokenizer(), stores, (0.5, 0.5), ("a", "b"))
    batches = batches_of(prepared, streaming=True)
    growers[0].grow(300)
    stores[1].refresh()
    rows = batches.origins(0, 300)
    assert not stores[0].complete and [row.source for row in rows].count("b") == 150
    assert max(row.epoch for row in rows if row.source == "b") >= 2
    assert all(row.epoch == 0 for row in rows if row.source == "a")


def test_through_the_front_door(tmp_path):
    """prepare and batches together, streaming, with a tokenizing process behind: text in, the same text out."""
    texts = [f"{i} " + "word " * (i % 50) for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = settings.Data(
        (str(tmp_path / "a.jsonl"),), folder=str(tmp_path / "s"), streaming=True, shuffle="none"
    )
    prepared = prepare(data, settings.Tokenizer(), background=True)
    with prepared, Batches(prepared, data, 64, 0) as batches:
        ids = torch.cat([batches.at(i, 16).ids_BT.flatten() for i in range(0, 2000, 16)])
    train = [
        text
        for i, text in enumerate(texts, 1)
        if not is_validation(f"a.jsonl:{i}", data.validation_fraction)
    ]
    assert "".join(train).startswith(prepared.tokenizer.decode(ids))


STAGES = ((0, 4), (40, 8), (72, 16))


@pytest.mark.parametrize("shuffle", ["window", "none"])
def test_shorter_rows_are_the_pieces_of_the_longer_ones(prepared, shuffle):
    """Each stage gives every token of its rows once, whatever is asked for at a time; the last one is the order without stages."""
    data = settings.Data(prefetch_factor=0, shuffle=shuffle, shuffle_window_sequences=50)
    staged, plain = Batches(prepared, data, T, 5, stages=STAGES), Batches(prepared, data, T, 5)
    for first, stop, length in ((0, 40, 4), (40, 72, 8), (72, 90, 16)):
        batches = [staged.at(row, 2) for row in range(first, stop, 2)]
        assert {(b.ids_BT.shape, b.pieces) for b in batches} == {
            ((2 * T // length, length), T // length)
        }
        pieces = torch.cat([b.ids_BT for b in batches])
        wanted = plain.at(first, stop - first).ids_BT.view(-1, length)
        assert sorted(pieces.tolist()) == sorted(wanted.tolist())
        assert torch.equal(pieces, wanted) == (shuffle == "none" or length == T)
        assert torch.equal(torch.cat([b.labels_BT for b in batches])[:, :-1], pieces[:, 1:])
        assert torch.equal(staged.at(first, stop - first).ids_BT, pieces), "asked for at once"


def test_a_piece_is_named_by_the_row_that_it_is_of(prepared):
    batches = Batches(
        prepared, settings.Data(prefetch_factor=2, shuffle="window"), T, 5, stages=STAGES
    )
    with batches:
        batch, rows = batches.at(42, 2), batches.origins(42, 2)
    for ids, row in zip(batch.ids_BT.tolist(), rows, strict=True):
        first = row.row * T + row.piece * 8
        stream = prepared.stores[prepared.names.index(row.source)].train
        assert ids == stream.tokens(first, first + 8).astype(int).tolist()
        assert str(row).startswith(f"{row.source} piece {row.piece} of 2 of sequence")


def test_documents_of_pieces_begin_where_they_do_in_the_text(prepared):
    whole = Batches(prepared, settings.Data(prefetch_factor=0, shuffle="none", varlen=True), T, 5)
    staged = Batches(prepared, whole.data, T, 5, stages=STAGES)
    long, short = whole.at(0, 4), staged.at(0, 4)
    starts = long.positions_BT.view(-1, 4) == 0
    starts[:, 0] = True
    assert torch.equal(short.positions_BT == 0, starts)
    assert [part.pieces for part in short.split(2)] == [4, 4]
