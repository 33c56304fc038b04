"""The token store: columns against plain arrays, commits, cut-off stores, damage, locks."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logged import logged_to

from longfire.data.manifest import locked, write_manifest
from longfire.data.store_writer import ColumnWriter, StoreWriter
from longfire.data.token_record import TokenRecord, document_record
from longfire.data.tokens import Column, TokenStore
from longfire.errors import DataError

HEADER = {
    "source": {"name": "s", "entry": "s.txt", "fingerprint": "f"},
    "tokenizer": {"fingerprint": "t", "vocab_size": 300},
    "options": {},
    "dtype": "uint16",
}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def write(
    folder: Path, documents: list[list[int]], commit_every: int = 1, complete: bool = True
) -> StoreWriter:
    """A store of small shards, gone on with from wherever it stands; every third document is held out."""
    folder.mkdir(exist_ok=True)
    writer = StoreWriter(folder, HEADER, shard_tokens=16, shard_documents=4)
    for number in range(writer.progress.get("done", 0), len(documents)):
        ids = np.array(documents[number], np.uint16)
        stream = "heldout" if number % 3 == 2 else "train"
        writer.append(stream, document_record(ids), np.array([2 * len(ids)]))
        if number % commit_every == 0:
            writer.commit({"done": number + 1})
    if complete:
        writer.commit({"done": len(documents)}, complete=True)
    writer.close()
    return writer


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


DOCUMENTS = [[i * 7 + j for j in range(i % 9 + 1)] for i in range(40)]


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / "s", DOCUMENTS, commit_every=7)
    store = TokenStore(tmp_path / "s", "t")
    assert store.complete
    store.verify()
    for stream, mine in (
        (store.train, [d for i, d in enumerate(DOCUMENTS) if i % 3 != 2]),
        (store.validation, DOCUMENTS[2::3]),
    ):
        flat, lengths = [id for d in mine for id in d], np.array([len(d) for d in mine])
        assert stream.length == len(flat) and stream.documents == len(mine)
        assert stream.tokens(0, len(flat)).tolist() == flat
        assert stream.ends[:].tolist() == np.cumsum(lengths).tolist()
        assert stream.bytes[:].tolist() == np.cumsum(2 * lengths).tolist()
        first = np.arange(0, len(flat) - 20, 9)
        assert stream.sequences(first, 20).tolist() == [flat[f : f + 20] for f in first]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), max_size=60).map(sorted),
    st.integers(1, 9),
    st.lists(st.integers(-1, 31), max_size=9),
)
def test_a_column_is_an_array(tmp_path_factory, items, shard_items, values):
    path = tmp_path_factory.mktemp("column") / "ends"
    writer = ColumnWriter(path, "int64", shard_items, 0, [])
    writer.append(np.array(items, np.int64))
    writer.close()
    column = Column(path, "int64", shard_items)
    column.length = len(items)
    for side in ("left", "right"):
        expected = np.array(items, np.int64).searchsorted(np.array(values, np.int64), side)
        assert column.searchsorted(np.array(values, np.int64), side).tolist() == expected.tolist()
    for start in range(0, len(items), 5):
        assert column[start:].tolist() == items[start:] and column[:start].tolist() == items[:start]


@pytest.mark.parametrize("committed", [0, 1, 5, 13, 39])
def test_a_cut_off_store_goes_on_and_is_the_same_byte_for_byte(committed, tmp_path):
    """What was appended after the last commit is dropped, also where it began new shards."""
    write(tmp_path / "whole", DOCUMENTS)
    writer = write(tmp_path / "cut", DOCUMENTS[: committed + 1], complete=False)
    lost = StoreWriter(tmp_path / "cut", HEADER, 16, 4)
    assert lost.progress == writer.progress
    for stream in ("train", "heldout"):
        lost.append(stream, TokenRecord(np.arange(100), np.full(50, 2)), np.full(50, 2))
    lost.close()  # never committed
    write(tmp_path / "cut", DOCUMENTS)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_growing_store_is_read_as_far_as_it_is_committed(tmp_path):
    writer = write(tmp_path / "s", DOCUMENTS[:3], complete=False)
    store = TokenStore(tmp_path / "s")
    before = store.train.length
    more = StoreWriter(tmp_path / "s", HEADER, 16, 4)
    more.append("train", document_record(np.arange(40)), np.array([40]))
    store.refresh()
    assert store.train.length == before == writer.tokens("train") and not store.complete
    more.commit({}, complete=True)
    more.close()
    store.refresh()
    assert store.complete and store.train.tokens(before, before + 40).tolist() == list(range(40))


def test_damage_is_named(tmp_path):
    write(tmp_path / "s", DOCUMENTS)
    with pytest.raises(DataError, match="made with another tokenizer.*prepare the data again"):
        TokenStore(tmp_path / "s", "another")
    shard = tmp_path / "s" / "train" / "tokens-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
    with pytest.raises(
        DataError, match=r"tokens-00001\.bin: block 0 \(bytes 0 to 32\) is damaged.*delete"
    ):
        TokenStore(tmp_path / "s").verify()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DataError,
        match=r"tokens-00001\.bin: 31 bytes long, and the manifest names 32 bytes; delete",
    ):
        TokenStore(tmp_path / "s")
    shard.unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.bin: missing"):
        TokenStore(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    write_manifest(tmp_path / "s", {**manifest, "format": 99})
    with pytest.raises(DataError, match="format 99"):
        TokenStore(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        TokenStore(tmp_path / "s")
    with pytest.raises(DataError, match="not a token store"):
        TokenStore(tmp_path / "nothing")


def test_a_manifest_names_every_shard(tmp_path):
    write(tmp_path / "s", DOCUMENTS)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    shards = manifest["streams"]["train"]["shards"]
    assert shards[1]["file"] == "tokens-00001.bin"
    del shards[1]
    write_manifest(tmp_path / "s", manifest)
    with pytest.raises(DataError, match=r"tokens: the manifest of the store names \d of the \d"):
        TokenStore(tmp_path / "s")


def test_a_damaged_store_is_not_gone_on_with(tmp_path):
    """A shard that lost committed bytes must not be filled up with zeros."""
    write(tmp_path / "s", DOCUMENTS[:20], complete=False)
    shard = tmp_path / "s" / "train" / "tokens-00000.bin"
    os.truncate(shard, 10)
    with pytest.raises(DataError, match=r"tokens-00000\.bin: 10 bytes long"):
        write(tmp_path / "s", DOCUMENTS)


HOLD = """
import sys, time, pathlib
from longfire.data.manifest import locked
with locked(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time_and_the_dead_hold_nothing(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    said: list[str] = []
    threading.Timer(0.5, other.kill).start()
    with logged_to(said), locked(tmp_path):
        pass
    other.wait()
    assert len(said) == 1 and f"process {other.pid} on " in said[0] and "waiting" in said[0]
    with logged_to(said), locked(tmp_path):
        pass
    assert len(said) == 1
