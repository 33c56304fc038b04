"""Text + tokenizer -> token stores: once for each content, over many processes, before training or behind it.

A store's folder is named by what it was made from (documents, tokenizer, options): the same again is found, anything else is
another folder. Preparation is cut into batches of documents, tokenized by any number of processes and written in the order
of the documents; a kill at any moment costs what was done since the last commit, about a second.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longfire import settings
from longfire.data import text
from longfire.data import tokenizer as tokenizers
from longfire.data.text import Documents, Source
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import FORMAT, StoreWriter, TokenStore, checksum, locked
from longfire.data.workers import Encoders, Ids
from longfire.errors import DataError, SettingsError, UserError

BATCH_BYTES, BATCH_DOCUMENTS = 2**20, 1024  # what a tokenizing process is given at a time
COMMIT_SECONDS = 1.0
LISTED = 100  # bad documents named in the manifest
BYTES_A_PROCESS = 4_000_000  # less text than this does not pay for one more process

Note = Callable[[str], None]


@dataclass
class Prepared:
    """What training reads: the tokenizer, one store and one share of the tokens for each source."""

    tokenizer: Tokenizer
    stores: tuple[TokenStore, ...]
    shares: tuple[float, ...]
    behind: "Behind | None" = None

    def check(self) -> None:
        """Raises DataError if preparation behind training has failed."""
        if self.behind:
            self.behind.check(self.stores)

    def close(self) -> None:
        """End preparation behind training; what it has committed stays and is continued next time."""
        if self.behind:
            self.behind.close()

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def prepare(
    data: settings.Data, tokenizer: settings.Tokenizer, *, note: Note = print, background: bool = False
) -> Prepared:
    """The stores of data.dataset, made where they do not exist; with `background` they go on growing in another process.

    Raises SettingsError and DataError naming source, file and row; DataError too when the disk is full.
    """
    if not 0 <= data.heldout_fraction < 1:
        raise SettingsError(
            f"data.heldout_fraction = {data.heldout_fraction}: a share of documents, from 0 to less than 1"
        )
    shares, sources = text.shares(data), text.sources(data)
    words = tokenizers.load(tokenizer, sources, shares, data, note)
    jobs = tuple(Job.of(source, words, data, tokenizer) for source in sources)
    missing = {job.folder: job for job in jobs if not job.finished()}
    behind = None
    if missing and background:
        behind = Behind(data, tokenizer)
        behind.wait_for([job.folder for job in missing.values()])
    elif missing:
        fill(list(missing.values()), words, tokenizer, data, note)
    stores = tuple(TokenStore(job.folder, words.fingerprint) for job in jobs)
    return Prepared(words, stores, shares, behind)


@dataclass(frozen=True)
class Job:
    """One source to be prepared: its folder and what the manifest says of its origin."""

    source: Source
    folder: Path
    header: dict[str, Any]

    @classmethod
    def of(cls, source: Source, words: Tokenizer, data: settings.Data, wanted: settings.Tokenizer) -> "Job":
        header = {
            "source": {"name": source.name, "entry": source.entry, "fingerprint": source.fingerprint()},
            "tokenizer": {"fingerprint": words.fingerprint, "vocab_size": words.vocab_size},
            "options": {
                "add_bos": wanted.add_bos,
                "add_eos": wanted.add_eos,
                "heldout_fraction": data.heldout_fraction,
                "text_field": "+".join(source.fields),
                "skip_bad_documents": data.skip_bad_documents,
            },
            "dtype": words.dtype,
        }
        made_of = [FORMAT, header["source"]["fingerprint"], words.fingerprint, header["options"]]
        address = checksum(json.dumps(made_of, sort_keys=True).encode())[:16]
        return cls(source, Path(data.folder) / f"{source.name}-{address}", header)

    def finished(self) -> bool:
        return (self.folder / "manifest.json").exists() and TokenStore(self.folder).complete


def fill(jobs: list[Job], words: Tokenizer, wanted: settings.Tokenizer, data: settings.Data, note: Note) -> None:
    """Prepare the jobs' stores, the one that is furthest behind first, so that all can be read early."""
    bos, eos = (words.bos_id if wanted.add_bos else None), (words.eos_id if wanted.add_eos else None)
    size = sum(sum(job.source.sizes) for job in jobs)
    count = min(data.num_workers or len(os.sched_getaffinity(0)), size // BYTES_A_PROCESS)
    with ExitStack() as stack:
        encoders = stack.enter_context(Encoders(words, bos, eos, count if count > 1 else 0))
        for job in jobs:
            stack.enter_context(locked(job.folder, note))
        fillings = [Filling(job, encoders, data) for job in jobs]
        try:
            while running := [f for f in fillings if not f.writer.complete]:
                min(running, key=lambda f: f.writer.tokens()).step()
        except OSError as e:
            raise DataError(
                f"{data.folder}: cannot write token stores ({e}); free some space or set data.folder to another "
                f"disk, and start again: what was committed is kept"
            ) from e
        finally:
            for filling in fillings:
                filling.writer.close()


@dataclass
class Chunk:
    """Some documents on their way: being tokenized; `progress` is how things stand after them."""

    ids: "Future[Ids]"
    text_bytes: np.ndarray
    heldout: np.ndarray
    progress: dict[str, Any]


class Filling:
    """One store being filled; `step` reads ahead and appends the next chunk of documents."""

    def __init__(self, job: Job, encoders: Encoders, data: settings.Data) -> None:
        self.job, self.encoders, self.data = job, encoders, data
        self.writer = StoreWriter(job.folder, job.header)
        self.progress = {"position": {}, "empty_documents": 0, "bad_documents": 0, "bad": [], **self.writer.progress}
        self.documents = job.source.documents(self.progress["position"])
        self._chunks = self._read()
        self._ahead: deque[Chunk] = deque()
        self._committed = time.monotonic()

    def step(self) -> None:
        while len(self._ahead) <= 2 * self.encoders.count and (chunk := next(self._chunks, None)):
            self._ahead.append(chunk)
        if self._ahead:
            self._append(self._ahead.popleft())
        if not self._ahead and self.writer.tokens() == 0:
            raise DataError(
                f"{self.job.source.entry}: no documents to train on ({self.progress['empty_documents']} empty, "
                f"{self.progress['bad_documents']} bad, the rest held out); name a source with text in it"
            )
        if not self._ahead or time.monotonic() - self._committed > COMMIT_SECONDS:
            self.writer.commit(self.progress, complete=not self._ahead)
            self._committed = time.monotonic()

    def _append(self, chunk: Chunk) -> None:
        encoded = chunk.ids.result()
        for stream, mine in (("train", ~chunk.heldout), ("heldout", chunk.heldout)):
            if mine.any():
                ids = encoded.ids[np.repeat(mine, encoded.lengths)]
                self.writer.append(stream, ids, encoded.lengths[mine], chunk.text_bytes[mine])
        self.progress = chunk.progress

    def _read(self) -> Iterator[Chunk]:
        """Documents in chunks of about BATCH_BYTES, already handed to the encoders."""
        seen = dict(self.progress)
        texts: list[str] = []
        identities: list[str] = []
        size = 0
        for document in self.documents:
            if document.problem:
                seen = self._bad(document, seen)
            elif not document.text:
                seen["empty_documents"] += 1
            else:
                texts.append(document.text)
                identities.append(document.identity)
                size += len(document.text)
            if size >= BATCH_BYTES or len(texts) >= BATCH_DOCUMENTS:
                yield self._chunk(texts, identities, {**seen, "position": self.documents.position})
                texts, identities, size = [], [], 0
        yield self._chunk(texts, identities, {**seen, "position": self.documents.position})

    def _chunk(self, texts: list[str], identities: list[str], progress: dict[str, Any]) -> Chunk:
        heldout = np.array([held_out(i, self.data.heldout_fraction) for i in identities], bool)
        sizes = np.array([len(t) if t.isascii() else len(t.encode()) for t in texts], np.int64)
        return Chunk(self.encoders.submit(texts), sizes, heldout, progress)

    def _bad(self, document: text.Document, seen: dict[str, Any]) -> dict[str, Any]:
        message = f"{document.where}: {document.problem}"
        if not self.data.skip_bad_documents:
            raise DataError(
                f"{message}; mend it, or set data.skip_bad_documents = true to count and skip such documents"
            )
        return {**seen, "bad_documents": seen["bad_documents"] + 1, "bad": [*seen["bad"], message][:LISTED]}


def held_out(identity: str, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its identity alone, so whatever the order, the workers and the rest."""
    return int(checksum(identity.encode())[:13], 16) < fraction * 2**52


class Behind:
    """Preparation in a process of its own, which ends when this one does."""

    def __init__(self, data: settings.Data, tokenizer: settings.Tokenizer) -> None:
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "longfire.data.prepare"],
            stdin=subprocess.PIPE,
            stderr=self._messages,
            start_new_session=True,
        )
        self._process.stdin.write(json.dumps([asdict(data), asdict(tokenizer)]).encode() + b"\n")
        self._process.stdin.flush()

    def wait_for(self, folders: list[Path]) -> None:
        """Until every store can be opened."""
        while not all((folder / "manifest.json").exists() for folder in folders):
            if self._process.poll() is not None:
                self._fail()
            time.sleep(0.02)

    def check(self, stores: tuple[TokenStore, ...]) -> None:
        if self._process.poll() is not None and not all(TokenStore(store.folder).complete for store in stores):
            self._fail()

    def _fail(self) -> None:
        self._messages.seek(0)
        said = self._messages.read().strip() or f"it ended with code {self._process.returncode}"
        raise DataError(f"preparation behind training failed: {said.splitlines()[-1]}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdin.close()
        self._messages.close()


def _behind() -> None:
    """The process of `Behind`: prepare what its first line of input says; end when the input does."""
    data, tokenizer = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        prepare(replace(settings.Data(), **as_tuples), settings.Tokenizer(**tokenizer), note=lambda text: None)
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    _behind()
