"""Preparation: the same store whatever the processes and the kills; found again; behind training; bad documents; full disks."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from logged import logged_to

from longfire.config import settings
from longfire.data import chunks, fill_progress
from longfire.data import fill as room
from longfire.data import prepare as preparing
from longfire.data.files import FileSource
from longfire.data.manifest import locked, read_manifest, write_manifest
from longfire.data.prepare import prepare
from longfire.data.store_writer import StoreWriter
from longfire.data.tokens import TokenStore
from longfire.data.validation import is_validation
from longfire.errors import DataError, SettingsError

WORDS = [
    "fire",
    "long",
    "state",
    "gate",
    "delta",
    "ring",
    "chunk",
    "token",
    "row",
    "segment",
    "Größe",
    "三",
]


def write_corpus(file: Path, documents: int, seed: int = 0, words: int = 60) -> list[str]:
    """A jsonl file with some empty documents; returns the texts that are not."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, words))) for _ in range(documents)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [text for text in texts if text]


def settings_for(tmp_path: Path, *files: str, **changes) -> settings.Data:
    fields = {"folder": str(tmp_path / "stores"), "validation_fraction": 0.2, **changes}
    return settings.Data(dataset=tuple(str(tmp_path / file) for file in files), **fields)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """fsync is for power cuts; a killed process loses nothing that it wrote."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def files(folder: Path) -> dict[str, bytes]:
    """Contents by name, without those of locks, which tell who held them last."""
    found = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "lock"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def test_documents_in_order_with_their_ends(tmp_path):
    texts = write_corpus(tmp_path / "a.jsonl", 300)
    with prepare(settings_for(tmp_path, "a.jsonl"), settings.Tokenizer(add_bos=True)) as prepared:
        store, tokens = prepared.stores[0], prepared.tokenizer
        found = {}
        for stream in (store.train, store.validation):
            ends = [0, *stream.ends[:].tolist()]
            documents = [stream.tokens(a, b).tolist() for a, b in pairwise(ends)]
            assert all(ids[0] == tokens.bos_id and ids[-1] == tokens.eos_id for ids in documents)
            found[stream] = [tokens.decode(ids) for ids in documents]
            assert stream.bytes[-1:].tolist() == [sum(len(t.encode()) for t in found[stream])]
        lines = (tmp_path / "a.jsonl").read_text().splitlines()
        numbered = [(i, json.loads(line)["text"]) for i, line in enumerate(lines, 1)]
        kept = [(is_validation(f"a.jsonl:{i}", 0.2), text) for i, text in numbered if text]
        assert found[store.validation] == [text for held, text in kept if held]
        assert found[store.train] == [text for held, text in kept if not held]
        assert len(texts) == len(kept) and 30 < sum(held for held, _ in kept) < 90
        assert store.manifest["progress"]["empty_documents"] == 300 - len(texts)


@pytest.fixture
def many_small_chunks(monkeypatch):
    """So that a small corpus is many chunks, several shards, and worth many processes."""
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(room, "BYTES_OF_A_PROCESS", 1)
    monkeypatch.setattr(
        room, "StoreWriter", lambda folder, header: StoreWriter(folder, header, 10_000, 64)
    )


def test_the_number_of_processes_changes_nothing(tmp_path, many_small_chunks):
    write_corpus(tmp_path / "a.jsonl", 400)
    stores = []
    for workers in (1, 2, 3):
        data = settings_for(
            tmp_path, "a.jsonl", folder=str(tmp_path / str(workers)), num_workers=workers
        )
        with prepare(data, settings.Tokenizer(path="train", train_vocab_size=400)) as prepared:
            prepared.stores[0].verify()
            stores.append(files(prepared.stores[0].folder))
    assert stores[0] == stores[1] == stores[2]
    assert not [
        p
        for p in psutil.Process().children(recursive=True)
        if "longfire.data.workers" in " ".join(p.cmdline())
    ]


PREPARE = """
import os, sys
os.fsync = lambda file: None
from longfire.config import settings
from longfire.data import chunks
from longfire.data import fill as room
from longfire.data.prepare import prepare
from longfire.data.store_writer import StoreWriter
chunks.CHUNK_CHARACTERS, room.COMMIT_SECONDS, room.BYTES_OF_A_PROCESS = int(sys.argv[4]), 0, 1
room.StoreWriter = lambda folder, header: StoreWriter(folder, header, 10_000, 64)
files, folder, workers = sys.argv[1].split(","), sys.argv[2], int(sys.argv[3])
data = settings.Data(dataset=tuple(files), folder=folder, num_workers=workers, validation_fraction=0.2)
print("ready", flush=True)
prepare(data, settings.Tokenizer(path="train", train_vocab_size=300))
"""


def committed(folder: Path) -> int:
    """Training tokens that the manifests of a folder name."""
    manifests = [json.loads(file.read_text()) for file in folder.glob("*/manifest.json")]
    return sum(manifest["streams"]["train"]["tokens"] for manifest in manifests)


def run_and_kill(sources: str, folder: Path, how: tuple[int, int], moment) -> int:
    """Run PREPARE and kill it when `moment(process)` returns; its exit code. Its own children must end with it."""
    command = [sys.executable, "-c", PREPARE, sources, str(folder), *map(str, how)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    children = []
    if moment:
        moment(process)
        children = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.send_signal(signal.SIGKILL)
    code = process.wait()
    assert not psutil.wait_procs(children, timeout=10)[1], (
        "a tokenizing process outlived a killed parent"
    )
    return code


def kill_often(tmp_path: Path, kills: int, workers: int, chunk_characters: int) -> int:
    """Returns how many kills came before it was done. Every other one comes at any time, the others shortly after something
    new was committed."""
    how = (workers, chunk_characters)
    sources = ",".join(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"))
    write_sources(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_and_kill(sources, whole, how, None) == 0
    draw, grown, slice_ = random.Random(workers), [0], committed(whole) // kills
    for number in range(kills):

        def moment(process, number=number) -> None:
            """A fast machine is killed as often as a slow one: at the latest when a slice of the whole is new."""
            while number % 2 == 0 and committed(killed) == grown[-1] and process.poll() is None:
                time.sleep(0.002)
            until = time.monotonic() + draw.uniform(0, 0.05 if number % 2 == 0 else 0.6)
            while time.monotonic() < until and committed(killed) <= grown[-1] + slice_:
                time.sleep(0.002)

        code = run_and_kill(sources, killed, how, moment)
        grown.append(committed(killed))
        if code == 0:
            break
    assert grown == sorted(grown) and 0 < grown[1] < committed(whole), (
        "committed tokens were lost, or no kill came in the middle"
    )
    assert run_and_kill(sources, killed, how, None) == 0
    assert files(killed) == files(whole), "nothing is left of what killed processes wrote aside"
    return number + (code != 0)


def write_sources(tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    write_corpus(tmp_path / "a.jsonl", 400, seed=1)
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress((tmp_path / "a.jsonl").read_bytes()[::1], mtime=0)
    )
    pq.write_table(
        pa.table({"text": write_corpus(tmp_path / "c.jsonl", 400, seed=2)}),
        tmp_path / "c.parquet",
        row_group_size=90,
    )


@pytest.mark.slow
def test_killed_at_any_moment_the_store_is_the_same_byte_for_byte(tmp_path):
    assert kill_often(tmp_path, 3, workers=2, chunk_characters=4000) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_many_times(workers, tmp_path):
    assert kill_often(tmp_path, 24, workers, chunk_characters=200) >= 10


def test_a_store_is_found_again_and_other_content_is_another_store(tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", 50)
    data, tokens = settings_for(tmp_path, "a.jsonl"), settings.Tokenizer()
    first = prepare(data, tokens).stores[0].folder
    before = {name: (first / name).stat().st_mtime_ns for name in files(first)}
    monkeypatch.setattr(preparing, "fill", None)  # must not be needed
    assert prepare(data, tokens).stores[0].folder == first
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "a.jsonl")
    assert prepare(settings_for(tmp_path, "moved/a.jsonl"), tokens).stores[0].folder == first
    assert before == {name: (first / name).stat().st_mtime_ns for name in files(first)}
    monkeypatch.undo()
    others = {
        prepare(changed, other).stores[0].folder
        for changed, other in (
            (settings_for(tmp_path, "moved/a.jsonl", validation_fraction=0.3), tokens),
            (settings_for(tmp_path, "moved/a.jsonl", skip_bad_documents=True), tokens),
            (settings_for(tmp_path, "moved/a.jsonl"), settings.Tokenizer(add_eos=False)),
            (
                settings_for(tmp_path, "moved/a.jsonl"),
                settings.Tokenizer(path="train", train_vocab_size=300),
            ),
        )
    }
    with open(tmp_path / "moved" / "a.jsonl", "a") as f:
        f.write('{"text": "one more"}\n')
    others.add(prepare(settings_for(tmp_path, "moved/a.jsonl"), tokens).stores[0].folder)
    assert len(others | {first}) == 6


def test_a_store_that_is_missing_may_be_made_elsewhere(tmp_path):
    """`longfire eval` of a run that somebody else has made writes into its folder only."""
    write_corpus(tmp_path / "a.jsonl", 40)
    data = settings_for(tmp_path, "a.jsonl", folder=str(tmp_path / "named/by/the/run"))
    own = tmp_path / "run/token-stores"
    with prepare(data, settings.Tokenizer(), folder_for_missing=own) as prepared:
        assert prepared.stores[0].folder.parent == own
    assert not (tmp_path / "named").exists()
    with prepare(data, settings.Tokenizer()) as prepared:
        there = prepared.stores[0].folder
    with prepare(data, settings.Tokenizer(), folder_for_missing=own) as prepared:
        assert prepared.stores[0].folder == there, "what is there is read where it is"


def test_several_sources_and_names(tmp_path):
    (tmp_path / "b").mkdir()
    write_corpus(tmp_path / "a.jsonl", 50)
    write_corpus(tmp_path / "b" / "a.jsonl", 50, seed=9)
    data = settings_for(tmp_path, "a.jsonl", "b/a.jsonl", "a.jsonl", data_probs=(2.0, 1.0, 1.0))
    prepared = prepare(data, settings.Tokenizer())
    assert prepared.names == ("a.jsonl", "a.jsonl-2", "a.jsonl-3") and prepared.shares == (
        0.5,
        0.25,
        0.25,
    )
    folders = [store.folder for store in prepared.stores]
    assert folders[0] == folders[2] != folders[1]


def test_a_bad_document_stops_or_is_counted_and_listed(tmp_path):
    good = write_corpus(tmp_path / "a.jsonl", 20)
    with open(tmp_path / "a.jsonl", "a") as f:
        f.writelines(f"{{broken {i}\n" for i in range(150))
    with pytest.raises(
        DataError, match=r"a\.jsonl:21: broken JSON.*set data\.skip_bad_documents = true"
    ):
        prepare(settings_for(tmp_path, "a.jsonl"), settings.Tokenizer())
    said = []
    data = settings_for(tmp_path, "a.jsonl", skip_bad_documents=True)
    with logged_to(said):
        store = prepare(data, settings.Tokenizer()).stores[0]
    progress = store.manifest["progress"]
    assert progress["bad_documents"] == 150 and len(progress["bad"]) == 100
    assert progress["bad"][0].startswith(f"{tmp_path}/a.jsonl:21: broken JSON")
    assert store.train.documents + store.validation.documents == len(good)
    assert (
        "skipped: " in said[0]
        and "150 bad" in said[0]
        and "a.jsonl:21" in said[1]
        and len(said) == 6
    )


@pytest.mark.parametrize(
    "content", ["", "\n\n", '{"text": ""}\n'], ids=["empty file", "blank lines", "empty document"]
)
def test_nothing_to_train_on(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    for _ in range(2):  # also when tried again
        with pytest.raises(DataError, match=r"a\.jsonl: no document with text is left"):
            prepare(settings_for(tmp_path, "a.jsonl"), settings.Tokenizer())


def test_all_held_out(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 12)
    with pytest.raises(DataError, match="no document with text is left"):
        prepare(settings_for(tmp_path, "a.jsonl", validation_fraction=0.9999), settings.Tokenizer())
    with pytest.raises(SettingsError, match="validation_fraction = 1"):
        prepare(settings_for(tmp_path, "a.jsonl", validation_fraction=1.0), settings.Tokenizer())


def test_a_full_disk_is_named_and_what_was_committed_is_kept(tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", 400)
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 3000)
    monkeypatch.setattr(room, "COMMIT_SECONDS", 0)
    data, append, left = settings_for(tmp_path, "a.jsonl"), StoreWriter.append, [8]

    def fill_up(self, *documents):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        append(self, *documents)

    monkeypatch.setattr(StoreWriter, "append", fill_up)
    with pytest.raises(DataError, match="No space left on device.*what was committed is kept"):
        prepare(data, settings.Tokenizer())
    (store,) = (TokenStore(file.parent) for file in (tmp_path / "stores").glob("*/manifest.json"))
    assert store.train.length > 0 and not store.complete
    finished = prepare(data, settings.Tokenizer()).stores[0]
    assert finished.complete and finished.folder == store.folder
    finished.verify()


def test_a_dead_tokenizing_process_is_an_error(tmp_path, many_small_chunks, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", 400)
    append = StoreWriter.append

    def kill_one(self, *documents):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # killed at an earlier call
                child.kill()
        append(self, *documents)

    monkeypatch.setattr(StoreWriter, "append", kill_one)
    data = settings_for(tmp_path, "a.jsonl", num_workers=2)
    with pytest.raises(
        DataError, match=r"a tokenizing process ended with code -9.*data\.num_workers"
    ):
        prepare(data, settings.Tokenizer(path="train", train_vocab_size=300))


def wait_until(condition, seconds: float = 20) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it did not happen in time"
        time.sleep(0.02)


def test_behind_training(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 3000)
    data = settings_for(tmp_path, "a.jsonl", streaming=True)
    with prepare(data, settings.Tokenizer(), background=True) as prepared:
        store = prepared.stores[0]
        wait_until(lambda: store.refresh() or store.complete)
        prepared.check()
    aside = settings_for(tmp_path, "a.jsonl", folder=str(tmp_path / "aside"))
    assert files(prepare(aside, settings.Tokenizer()).stores[0].folder) == files(store.folder)
    assert prepare(data, settings.Tokenizer(), background=True).background is None


def test_behind_training_a_failure_is_reported(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 2000)
    with open(tmp_path / "a.jsonl", "a") as f:
        f.write("{broken\n")
    failure = pytest.raises(
        DataError, match=r"preparation in the background failed: .*a\.jsonl:2001: broken JSON"
    )
    data = settings_for(tmp_path, "a.jsonl")
    with prepare(data, settings.Tokenizer(), background=True) as prepared, failure:
        wait_until(prepared.check)


def test_behind_training_a_kill_is_reported_and_a_closed_one_ends(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 2000)
    data = settings_for(tmp_path, "a.jsonl")
    (tmp_path / "stores").mkdir()
    with prepare(data, settings.Tokenizer(), background=True) as first:
        folder = first.stores[0].folder
    children = psutil.Process().children()
    assert not [c for c in children if "longfire.data.prepare" in " ".join(c.cmdline())]
    manifest = read_manifest(folder)
    write_manifest(folder, {**manifest, "complete": False})
    failure = pytest.raises(
        DataError, match="preparation in the background failed: it ended with code -9"
    )
    with (
        locked(folder),
        prepare(data, settings.Tokenizer(), background=True) as prepared,
        failure,
    ):
        (child,) = psutil.Process().children()  # it waits for the lock
        child.kill()
        wait_until(prepared.check)


TRAIN = """
import sys, time
from longfire.config import settings
from longfire.data.prepare import prepare
data = settings.Data(dataset=(sys.argv[1],), folder=sys.argv[2], streaming=True)
prepared = prepare(data, settings.Tokenizer(), background=True)
print(prepared.background._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_killed_training(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 60_000)
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "a.jsonl"), str(tmp_path / "stores")]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    behind = int(training.stdout.readline())
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    wait_until(lambda: not psutil.pid_exists(behind))


def test_a_stream_of_the_hub_is_found_again_without_the_hub(tmp_path, monkeypatch):
    write_corpus(tmp_path / "a.jsonl", 50)
    data = settings_for(tmp_path, "a.jsonl")
    first = prepare(data, settings.Tokenizer()).stores[0].folder
    monkeypatch.setattr(
        FileSource, "fingerprint", ""
    )  # what a stream says when the hub is out of reach
    assert prepare(data, settings.Tokenizer()).stores[0].folder == first
    with pytest.raises(DataError, match="hub cannot be asked"):
        prepare(data, settings.Tokenizer(add_eos=False))


def test_progress_is_reported_where_there_is_no_terminal(tmp_path, monkeypatch, many_small_chunks):
    write_corpus(tmp_path / "a.jsonl", 400)
    monkeypatch.setattr(fill_progress, "NOTE_SECONDS", 0.0)
    said = []
    with logged_to(said):
        prepare(settings_for(tmp_path, "a.jsonl"), settings.Tokenizer())
    assert "M tokens/s" in said[0] and "s left" in said[0]
