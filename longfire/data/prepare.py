"""Text + tokenizer -> token stores: once for each content, over many processes, before training or
behind it.

A store's folder is named by what it is made from (documents, tokenizer, options): the same again is
found, anything else is another folder. Documents are read in order, tokenized in chunks by any
number of processes, and written in order; a kill at any moment costs what was done since the last
commit, about a second.
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
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from longfire.config import settings
from longfire.data import text
from longfire.data import tokenizer as tokenizers
from longfire.data.formats import Document
from longfire.data.losses import Losses
from longfire.data.text import Source
from longfire.data.tokenizer import Bytes, Tokenizer
from longfire.data.tokens import (
    StoreWriter,
    TokenStore,
    TokenStream,
    add_checksums,
    checksum,
    discard,
    locked,
    read_manifest,
)
from longfire.data.validation import TAILS, ValidationSplit, validation_split_of
from longfire.data.workers import Encoders, Ids
from longfire.errors import DataError, SettingsError, UserError
from longfire.plural import counted

CHUNK_CHARACTERS, CHUNK_DOCUMENTS = 2**20, 4096  # what a tokenizing process is given at a time
COMMIT_SECONDS = 1.0
ADDRESS_FORMAT = 1  # part of every store's address; another one would give them all other addresses
JUDGED_CHARACTERS = (
    100_000  # looked at before a tokenizer that loses text ends a preparation on its way
)
NOTE_SECONDS = 30.0  # between lines of progress where no bar can be shown
BYTES_OF_A_PROCESS = 2_000_000  # less text than this does not pay for another process
BAD_LISTED, BAD_SHOWN = (
    100,
    5,
)  # bad documents that the manifest names, and that are shown; all are counted

Note = Callable[[str], None]


class Unseen(NamedTuple):
    """Text to evaluate on, which is not trained on: what is held out of a source, or a source of
    data.validation."""

    name: str
    store: TokenStore
    stream: TokenStream


@dataclass
class Prepared:
    """What training reads: the tokenizer, and for each source its store, its share of the tokens
    (they sum to 1), its name.

    own_validation: what data.validation names.
    """

    tokenizer: Tokenizer
    stores: tuple[TokenStore, ...]
    shares: tuple[float, ...]
    names: tuple[str, ...]
    behind: "Behind | None" = None
    own_validation: tuple[Unseen, ...] = ()

    @property
    def validation(self) -> tuple[Unseen, ...]:
        """What evaluations read, by name."""
        held_out = (
            Unseen(name, store, store.heldout) for name, store in zip(self.names, self.stores)
        )
        return self.own_validation or tuple(held_out)

    def check(self) -> None:
        """Raises DataError, with its message, if preparation behind training has failed."""
        if self.behind:
            self.behind.check((*self.stores, *(store for _, store, _ in self.own_validation)))

    def close(self) -> None:
        """End preparation behind training; what it has committed stays, and the next run goes on
        from there."""
        if self.behind:
            self.behind.close()

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def prepare(
    data: settings.Data,
    tokenizer: settings.Tokenizer,
    *,
    note: Note = print,
    background: bool = False,
    watch: bool = False,
) -> Prepared:
    """The stores of data.dataset, made where they do not exist.

    With `background` it returns as soon as they can be opened, and they grow in another process
    that ends with this one; with `watch` they are opened as someone else makes them. Raises
    SettingsError and DataError naming source, file and row, and the fix; DataError too when the
    disk is full.
    """
    if not 0 <= data.validation_fraction < 1:
        raise SettingsError(
            f"data.validation_fraction = {data.validation_fraction}: a share of documents, from 0 to below 1"
        )
    if data.validation:
        data = replace(data, validation_fraction=0.0)
    shares, sources = text.shares(data), text.sources(data, note)
    for source in sources:
        if source.description:
            note(f"data: {source.name}: {source.description}")
    words = tokenizers.load(tokenizer, sources, shares, data, note)
    jobs = [Job.of(source, share, words, data, tokenizer) for source, share in zip(sources, shares)]
    validation = validation_jobs(data, sources, words, tokenizer)
    missing = list({job.folder: job for job in [*jobs, *validation] if not job.finished()}.values())
    behind = None
    if missing and background:
        behind = Behind(data, tokenizer)
        behind.wait_for(missing)
    elif missing and not watch:
        fill(missing, words, tokenizer, data, note)
    stores = tuple(TokenStore(job.folder, words.fingerprint) for job in jobs)
    for job, store in zip(jobs, stores):
        refuse_losses(
            losses_in(store.manifest["progress"]), job.source.entry, tokenizer, final=store.complete
        )
    names = _distinct([source.name for source in sources])
    own = unseen(validation, words)
    for name, store in [
        *zip(names, stores),
        *((f"validation: {name}", store) for name, store, _ in own),
    ]:
        note(f"data: {name}: {describe(store)}")
        for bad in store.manifest["progress"].get("bad", [])[:BAD_SHOWN]:
            note(f"data: skipped {bad}")
    without = [store.folder for store in stores if not store.has_checksums]
    if without:
        note(
            f"warning: {without[0]}{f' and {len(without) - 1} more' if len(without) > 1 else ''} has no checksums of blocks, "
            "so damage is not seen while it is read; `longfire prepare --verify` checks it and adds them"
        )
    for source, name, store in zip(sources, names, stores):
        warn_of_a_split_without_effect(source, name, store, note)
    return Prepared(words, stores, shares, names, behind, own)


def verify(prepared: Prepared, note: Note = print) -> None:
    """Read all stores whole. One without checksums of blocks gets them. Raises DataError naming
    what is damaged."""
    stores = {store.folder: store for store in prepared.stores}
    stores |= {store.folder: store for _, store, _ in prepared.own_validation}
    for folder, store in stores.items():
        size = store.verify()
        if not store.has_checksums:
            add_checksums(folder, note)
        added = "" if store.has_checksums else "; it has checksums of blocks now"
        note(f"data: verified {folder}: {size:,} bytes are as they were written{added}")


def validation_jobs(
    data: settings.Data, trained: tuple[Source, ...], words: Tokenizer, wanted: settings.Tokenizer
) -> list["Job"]:
    """The sources of data.validation: each a store of its own, all of whose documents are evaluated
    on. Raises SettingsError where one of them is trained on."""
    if not data.validation:
        return []
    own = text.validation_of(data)
    try:
        sources = text.sources(own)
    except DataError as error:  # they were found as a dataset is, but another setting names them
        raise DataError(str(error).replace("data.dataset:", "data.validation:")) from error
    for source, other in product(sources, trained):
        if same := text.in_both(source, other):
            raise SettingsError(
                f"data.validation: {same} is text that data.dataset trains on, as part of {other.entry}: leave it out of one "
                "of them"
            )
    return [Job.of(source, 1.0, words, own, wanted) for source in sources]


def unseen(jobs: list["Job"], words: Tokenizer) -> tuple[Unseen, ...]:
    """The stores of data.validation, which are prepared or being prepared."""
    names = _distinct([job.source.name for job in jobs])
    stores = [TokenStore(job.folder, words.fingerprint) for job in jobs]
    return tuple(Unseen(name, store, store.train) for name, store in zip(names, stores))


def warn_of_a_split_without_effect(
    source: Source, name: str, store: TokenStore, note: Note
) -> None:
    """A slip in data.split_documents would otherwise show as one very long document."""
    split = source.split_documents
    if split and store.complete and store.train.documents <= 1:
        note(
            f"warning: data.split_documents = {split!r} finds one document only in {name}: `lines` and `blank_lines` split at "
            'these, any other text is searched for as it is (in a recipe "\\n" is the end of a line)'
        )


def describe(store: TokenStore) -> str:
    """One line: what is in a store and where it lies."""
    if not store.complete:
        return f"prepared while training goes on -> {store.folder}"
    train, heldout, progress = store.train, store.heldout, store.manifest["progress"]
    left_out = [
        f"{progress[kind]} {kind.split('_')[0]}"
        for kind in ("empty_documents", "bad_documents")
        if progress[kind]
    ]
    place = "at the end of" if store.manifest["options"].get("held_out") == TAILS else "in"
    kept = (
        f", held out {heldout.length:,} {place} {heldout.documents:,}" if heldout.documents else ""
    )
    losses = losses_in(progress)
    lost = (
        f"; {losses.describe()}"
        if any((losses.lost_characters, losses.unknown_tokens, losses.empty_encodings))
        else ""
    )
    return (
        f"{counted(train.length, 'token')} in {counted(train.documents, 'document')}{kept}"
        f"{' (skipped: ' + ', '.join(left_out) + ')' if left_out else ''}{lost} -> {store.folder}"
    )


def losses_in(progress: dict[str, Any]) -> Losses:
    """What a manifest counts of text that the tokenizer could not say; nothing in stores that did
    not look."""
    return Losses(*progress.get("losses", ()))


def refuse_losses(losses: Losses, entry: str, wanted: settings.Tokenizer, final: bool) -> None:
    """Raises DataError when the tokenizer loses more than tokenizer.max_lost_share. final: nothing
    more will be counted."""
    judged = final or losses.sampled_characters >= JUDGED_CHARACTERS
    if judged and losses.share > wanted.max_lost_share:
        raise DataError(
            f"{entry}: {losses.describe()}; name a tokenizer that was made for this text (tokenizer.path), or set "
            f"tokenizer.max_lost_share, now {wanted.max_lost_share:g}, to at least {losses.share:.2g}"
        )


def _distinct(names: list[str]) -> tuple[str, ...]:
    """Sources that would be called the same are numbered: web, web-2."""
    return tuple(
        name if (n := names[:i].count(name)) == 0 else f"{name}-{n + 1}"
        for i, name in enumerate(names)
    )


@dataclass(frozen=True)
class Job:
    """A source to be prepared: its folder, and what the manifest says of its origin."""

    source: Source
    share: float
    folder: Path
    header: dict[str, Any]
    validation_split: ValidationSplit

    @classmethod
    def of(
        cls,
        source: Source,
        share: float,
        words: Tokenizer,
        data: settings.Data,
        wanted: settings.Tokenizer,
    ) -> "Job":
        """Options that are not those of every store stand in the address only where they are used,
        so that the stores of before are found."""
        fingerprint = (
            source.fingerprint
        )  # before anything is read: what changes later is found (Filling.check_unchanged)
        validation_split = validation_split_of(source, data.validation_fraction)
        options = {
            "add_bos": wanted.add_bos,
            "add_eos": wanted.add_eos,
            "heldout_fraction": data.validation_fraction,
            "text_field": "+".join(source.fields),
            "skip_bad_documents": data.skip_bad_documents,
            **validation_split.options,
        }
        if source.split_documents:
            options["split_documents"] = source.split_documents
        header = {
            "source": {"name": source.name, "entry": source.entry, "fingerprint": fingerprint},
            "tokenizer": {"fingerprint": words.fingerprint, "vocab_size": words.vocab_size},
            "options": options,
            "dtype": words.dtype,
        }
        return cls(
            source, share, _place(source, header, Path(data.folder)), header, validation_split
        )

    def finished(self) -> bool:
        return is_finished(self.folder)


def _place(made_of: Source, header: dict[str, Any], folder: Path) -> Path:
    """Where the store that is made from this is, or will be: found by its address, whatever it was
    called before."""
    source, rest = header["source"], {key: header[key] for key in ("tokenizer", "options")}
    if not source["fingerprint"]:
        return _without_fingerprint(source, rest, folder)
    address = _address(source["fingerprint"], rest)
    same = sorted(folder.glob(f"*-{address}"))
    if same:
        return same[0]
    former = _address(made_of.former_fingerprint, rest)
    finished = [store for store in sorted(folder.glob(f"*-{former}")) if is_finished(store)]
    return finished[0] if finished else folder / f"{source['name']}-{address}"


def _address(fingerprint: str, rest: dict[str, Any]) -> str:
    """What a store is made from, as the end of its folder's name."""
    made_from = [ADDRESS_FORMAT, fingerprint, rest["tokenizer"]["fingerprint"], rest["options"]]
    return checksum(json.dumps(made_from, sort_keys=True).encode())[:16]


def is_finished(store: Path) -> bool:
    return (store / "manifest.json").exists() and TokenStore(store).complete


def _without_fingerprint(source: dict[str, Any], rest: dict[str, Any], folder: Path) -> Path:
    """A stream of the hub while the hub is out of reach: the newest finished store of it, whatever
    its revision."""
    stores = sorted(
        folder.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime, reverse=True
    )
    for manifest, store in ((read_manifest(file.parent), file.parent) for file in stores):
        same = all(manifest["source"][key] == source[key] for key in ("name", "entry"))
        if (
            same
            and manifest["complete"]
            and all(manifest[key] == value for key, value in rest.items())
        ):
            return store
    raise DataError(
        f"{source['entry']}: the hub cannot be asked for the revision of this stream, and {folder} has no finished store of "
        f"it; check the network, or name files on this disk"
    )


def fill(
    jobs: list[Job], words: Tokenizer, wanted: settings.Tokenizer, data: settings.Data, note: Note
) -> None:
    """Prepare stores side by side, in the proportion in which training will read them."""
    bos, eos = (
        (words.bos_id if wanted.add_bos else None),
        (words.eos_id if wanted.add_eos else None),
    )
    try:
        with ExitStack() as stack:
            for job in sorted(
                jobs, key=lambda job: job.folder
            ):  # one order for all: no two processes wait crosswise
                stack.enter_context(locked(job.folder, note))
            encoders = stack.enter_context(Encoders(words, bos, eos, _processes(jobs, words, data)))
            fillings = [stack.enter_context(Filling(job, encoders, data, wanted)) for job in jobs]
            shown = stack.enter_context(Shown(fillings, note))
            while running := [filling for filling in fillings if not filling.writer.complete]:
                min(running, key=Filling.ahead_of_share).step()
                shown.update()
    except OSError as e:
        raise DataError(
            f"data.folder = {data.folder!r}: token stores cannot be written ({e}); free some space or name another place, "
            f"and start again: what was committed is kept"
        ) from e


def _processes(jobs: list[Job], words: Tokenizer, data: settings.Data) -> int:
    """How many processes tokenize; 0: this one, for little text or bytes, which need no work."""
    size = sum(job.source.bytes_total for job in jobs)
    wanted = data.num_workers or cores()
    most = size // BYTES_OF_A_PROCESS if all(job.source.bytes_total for job in jobs) else wanted
    return 0 if isinstance(words, Bytes) or min(wanted, most) < 2 else min(wanted, most)


def cores() -> int:
    """Cores that this process may use: fewer than the machine has under Slurm or in a container
    (only Linux tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Chunk:
    """Some documents on their way; `progress` is how the source stands after them."""

    encoded: "Future[Ids]"
    text_bytes: np.ndarray
    heldout: np.ndarray
    progress: dict[str, Any]


class Filling:
    """One store being filled. A context manager: closes the store's files."""

    def __init__(
        self, job: Job, encoders: Encoders, data: settings.Data, wanted: settings.Tokenizer
    ) -> None:
        self.job, self.encoders, self.data, self.wanted = job, encoders, data, wanted
        self.writer = StoreWriter(job.folder, job.header)
        self.progress = {
            "position": {},
            "empty_documents": 0,
            "bad_documents": 0,
            "bad": [],
            **self.writer.progress,
        }
        self.documents = job.source.documents(self.progress["position"])
        self.losses = losses_in(self.progress)
        self.unchanged_files = self.progress["position"].get(
            "file", 0
        )  # those before were read and did not change
        self.chunks = self._read()
        self.all_read = False
        self.ahead: deque[Chunk] = deque()
        self.committed_at = float(
            "-inf"
        )  # the first chunk is committed at once: training behind it can begin

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *exc) -> None:
        self.writer.close()

    def ahead_of_share(self) -> float:
        return self.tokens() / self.job.share

    def tokens(self) -> int:
        return self.writer.tokens("train")

    def step(self) -> None:
        """Read ahead as far as the processes can use, append one chunk, commit when it is time."""
        while not self.all_read and len(self.ahead) <= 2 * self.encoders.count:
            chunk = next(self.chunks, None)
            self.all_read = chunk is None
            self.ahead += [] if chunk is None else [chunk]
        if self.ahead:
            self._append(self.ahead.popleft())
        done = self.all_read and not self.ahead
        if done or time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.commit(done)

    def commit(self, done: bool) -> None:
        """What was appended becomes the store, if it is what the sources held when the store was
        named."""
        self.check_unchanged()
        refuse_losses(self.losses, self.job.source.entry, self.wanted, final=done)
        if done and not self.tokens():
            raise DataError(
                f"{self.job.source.entry}: no document with text is left ({self.progress['empty_documents']} empty, "
                f"{self.progress['bad_documents']} bad, {self.writer.documents('heldout')} held out by data.validation_fraction); "
                "name a source with more text, or hold less of it out"
            )
        self.writer.commit({**self.progress, "losses": list(self.losses.counts())}, complete=done)
        self.committed_at = time.monotonic()

    def check_unchanged(self) -> None:
        """Raises DataError, and drops what was prepared, when a file that was read since the last
        commit changed meanwhile: the store is named by what the files held before."""
        reading = self.documents.position.get("file", 0)
        change = self.job.source.changed(self.unchanged_files, reading + 1)
        if change:
            discard(self.job.folder)
            raise DataError(
                f"{change}; what was prepared of {self.job.source.entry} is dropped: start again when nothing writes to it"
            )
        self.unchanged_files = reading

    def _append(self, chunk: Chunk) -> None:
        encoded = chunk.encoded.result()
        self.losses += encoded.losses
        for stream, mine in (("train", ~chunk.heldout), ("heldout", chunk.heldout)):
            ids = encoded.ids[np.repeat(mine, encoded.lengths)]
            self.writer.append(stream, ids, encoded.lengths[mine], chunk.text_bytes[mine])
        self.progress = chunk.progress

    def _read(self) -> Iterator[Chunk]:
        """The documents that are left, in chunks that are being tokenized."""
        seen = dict(self.progress)
        texts: list[str] = []
        heldout: list[bool] = []
        size = 0
        for document in self.documents:
            if document.problem:
                seen = self._bad(document, seen)
            elif not document.text:
                seen["empty_documents"] += 1
            else:
                for part, is_validation in zip(
                    self.job.validation_split.parts(document), (False, True)
                ):
                    if part:
                        texts.append(part)
                        heldout.append(is_validation)
                size += len(document.text)
            if size >= CHUNK_CHARACTERS or len(texts) >= CHUNK_DOCUMENTS:
                yield self._chunk(texts, heldout, {**seen, "position": self.documents.position})
                texts, heldout, size = [], [], 0
        yield self._chunk(texts, heldout, {**seen, "position": self.documents.position})

    def _chunk(self, texts: list[str], heldout: list[bool], progress: dict[str, Any]) -> Chunk:
        sizes = np.array([len(t) if t.isascii() else len(t.encode()) for t in texts], np.int64)
        return Chunk(self.encoders.submit(texts), sizes, np.array(heldout, bool), progress)

    def _bad(self, document: Document, seen: dict[str, Any]) -> dict[str, Any]:
        message = f"{document.where}: {document.problem}"
        if not self.data.skip_bad_documents:
            raise DataError(
                f"{message}; fix it, or set data.skip_bad_documents = true to count and list such documents instead"
            )
        return {
            **seen,
            "bad_documents": seen["bad_documents"] + 1,
            "bad": [*seen["bad"], message][:BAD_LISTED],
        }


class Shown:
    """Progress of stores being filled: a bar on a terminal, else a line now and then. A context
    manager."""

    def __init__(self, fillings: list[Filling], note: Note) -> None:
        self.fillings, self.note = fillings, note
        self.names = ", ".join(filling.job.source.name for filling in fillings)
        sizes = [filling.job.source.bytes_total for filling in fillings]
        self.total = sum(sizes) if all(sizes) else None
        self.tokens_before, self.bytes_before = self._done()
        self.started_at = self.noted_at = time.monotonic()
        console = Console(stderr=True)
        columns = (
            TextColumn("tokenize {task.description}"),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self.bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(
            self.names, total=self.total, completed=self.bytes_before, speed=""
        )

    def __enter__(self) -> "Shown":
        self.bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self.bar.stop()

    def _done(self) -> tuple[int, int]:
        """(tokens, bytes of the sources) behind us."""
        return sum(f.tokens() for f in self.fillings), sum(
            f.documents.bytes_read for f in self.fillings
        )

    def update(self) -> None:
        tokens, size = self._done()
        now = time.monotonic()
        seconds = max(now - self.started_at, 1e-9)
        speed = (tokens - self.tokens_before) / seconds
        said = f"{tokens / 1e6:.1f}M tokens, {size / 1e6:.0f} MB, {speed / 1e6:.2f}M tokens/s"
        self.bar.update(self.task, completed=size, speed=said)
        if self.bar.disable and now - self.noted_at > NOTE_SECONDS:
            self.noted_at = now
            left = (
                seconds * (self.total - size) / max(size - self.bytes_before, 1)
                if self.total
                else 0
            )
            self.note(f"data: {self.names}: {said}" + (f", {left:.0f} s left" if left else ""))


class Behind:
    """Preparation in a process of its own, which ends when this one does."""

    def __init__(self, data: settings.Data, tokenizer: settings.Tokenizer) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        command = [sys.executable, "-m", "longfire.data.prepare"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=self._said, start_new_session=True
        )
        self._process.stdin.write(json.dumps([asdict(data), asdict(tokenizer)]).encode() + b"\n")
        self._process.stdin.flush()

    def wait_for(self, jobs: list[Job]) -> None:
        """Until every store can be opened. Raises DataError if the process ends before."""
        while not all((job.folder / "manifest.json").exists() for job in jobs):
            if self._process.poll() not in (None, 0):
                self._fail()
            time.sleep(0.02)

    def check(self, stores: tuple[TokenStore, ...]) -> None:
        code = self._process.poll()
        if code or (code == 0 and not all(TokenStore(store.folder).complete for store in stores)):
            self._fail()

    def _fail(self) -> None:
        self._said.seek(0)
        last = (
            self._said.read().strip().split("\n")[-1]
            or f"it ended with code {self._process.returncode}"
        )
        raise DataError(f"preparation behind training failed: {last}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdin.close()
        self._said.close()


def _behind() -> None:
    """The process of `Behind`: prepare what the first line of its input says; end when the input
    does."""
    data, tokenizer = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        prepare(settings.Data(**data), settings.Tokenizer(**tokenizer), note=lambda line: None)
    except UserError as e:
        print(e, file=sys.stderr)
        os._exit(e.exit_code)  # at once: a thread is still waiting for input


if __name__ == "__main__":
    _behind()
