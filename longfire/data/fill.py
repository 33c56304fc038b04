"""Fills token stores: documents are read in order, tokenized in chunks by any number of processes,
and written in order. A kill at any moment costs the work since the last commit, about a second.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from longfire.config import settings
from longfire.data.chunks import Chunk, gathered
from longfire.data.fill_progress import FillProgress
from longfire.data.jobs import Job
from longfire.data.losses import Losses
from longfire.data.manifest import TRAIN, VALIDATION, Progress, locked
from longfire.data.record_format import EndTokens
from longfire.data.records import Texts
from longfire.data.store_writer import StoreWriter, discard
from longfire.data.tokenizer import Bytes, Tokenizer
from longfire.data.workers import Encoders
from longfire.errors import DataError

COMMIT_SECONDS = 1.0
JUDGED_CHARACTERS = 100_000  # sampled before a tokenizer that loses text ends an unfinished store
BYTES_OF_A_PROCESS = 2_000_000  # less text than this does not pay for another process
BAD_LISTED = 100  # bad documents that the manifest names; all of them are counted


def fill(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    tokenizer_settings: settings.Tokenizer,
    data: settings.Data,
) -> None:
    """Fill stores side by side, in the proportion in which training will read them. Raises
    DataError."""
    ends = EndTokens(
        bos=tokenizer.bos_id if tokenizer_settings.add_bos else None,
        eos=tokenizer.eos_id if tokenizer_settings.add_eos else None,
    )
    processes = process_count(jobs, tokenizer, data)
    try:
        with ExitStack() as stack:
            # All processes lock in the same order, so that no two wait for each other.
            for folder in sorted(job.folder for job in jobs):
                stack.enter_context(locked(folder))
            encoders = stack.enter_context(Encoders(tokenizer, ends, processes))
            fillers = []
            for job in jobs:
                filler = StoreFiller(job, encoders, data, tokenizer_settings)
                fillers.append(stack.enter_context(filler))
            progress = stack.enter_context(FillProgress(fillers))
            while running := [filler for filler in fillers if not filler.writer.complete]:
                min(running, key=StoreFiller.tokens_by_share).step()
                progress.update()
    except OSError as error:
        raise DataError(
            f"data.folder = {data.folder!r}: token stores cannot be written ({error}); free some "
            "space or name another place, and start again: what was committed is kept"
        ) from error


def process_count(jobs: Sequence[Job], tokenizer: Tokenizer, data: settings.Data) -> int:
    """How many processes tokenize. 0: only this one, for little text, or for bytes, which need no
    work."""
    if isinstance(tokenizer, Bytes):
        return 0
    wanted = data.num_workers or cores()
    of_texts = [job for job in jobs if isinstance(job.source.record_format, Texts)]
    sizes = [job.source.bytes_total for job in of_texts]
    if all(sizes):
        wanted = min(wanted, sum(sizes) // BYTES_OF_A_PROCESS)
    if wanted < 2:
        return 0
    return wanted


def cores() -> int:
    """CPU cores that this process may use: fewer than the machine has under Slurm or in a container
    (only Linux knows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class StoreFiller:
    """One store that is being filled. A context manager: closes the store's files."""

    def __init__(
        self,
        job: Job,
        encoders: Encoders,
        data: settings.Data,
        tokenizer_settings: settings.Tokenizer,
    ) -> None:
        self.job = job
        self.encoders = encoders
        self.data = data
        self.tokenizer_settings = tokenizer_settings
        self.writer = StoreWriter(job.folder, job.header)
        self.progress: Progress = {
            "position": {},
            "empty_documents": 0,
            "bad_documents": 0,
            "bad": [],
            **self.writer.progress,
        }
        self.documents = job.source.documents(self.progress["position"])
        self.losses = losses_in(self.progress)
        # The files before this one were read and did not change.
        self.unchanged_files = self.progress["position"].get("file", 0)
        self.chunks = self._read()
        self.all_read = False
        self.waiting: deque[Chunk] = deque()
        # The first chunk is committed at once, so that training can begin beside the preparation.
        self.committed_at = float("-inf")

    def __enter__(self) -> "StoreFiller":
        return self

    def __exit__(self, *exc: object) -> None:
        self.writer.close()

    def tokens_by_share(self) -> float:
        """Training tokens, divided by the source's share of the mixture."""
        return self.tokens() / self.job.share

    def tokens(self) -> int:
        """Training tokens so far."""
        return self.writer.tokens(TRAIN)

    def step(self) -> None:
        """Read as many chunks as the processes can use, append one, commit when it is time."""
        while not self.all_read and len(self.waiting) <= 2 * self.encoders.count:
            chunk = next(self.chunks, None)
            if chunk is None:
                self.all_read = True
            else:
                self.waiting.append(chunk)
        if self.waiting:
            self._append(self.waiting.popleft())
        done = self.all_read and not self.waiting
        if done or time.monotonic() - self.committed_at > COMMIT_SECONDS:
            self.commit(done)

    def commit(self, done: bool) -> None:
        """Make what was appended part of the store, if the sources still hold what they held when
        the store got its name. Raises DataError."""
        entry = self.job.source.entry
        self.check_unchanged()
        check_losses(self.losses, entry, self.tokenizer_settings, final=done)
        if done and not self.tokens():
            raise DataError(
                f"{entry}: no document with text is left to train on "
                f"({self.progress['empty_documents']} empty, {self.progress['bad_documents']} bad, "
                f"{self.writer.documents(VALIDATION)} kept for validation by "
                "data.validation_fraction); name a source with more text, or set a smaller "
                "data.validation_fraction"
            )
        if done and not self.writer.loss_tokens(TRAIN):
            raise DataError(
                f"{entry}: none of its {self.tokens():,} tokens counts in the loss: its loss masks "
                "(data.record_format) leave out every token"
            )
        self.writer.commit(
            {**self.progress, "losses": list(self.losses.counts())},
            complete=done,
        )
        self.committed_at = time.monotonic()

    def check_unchanged(self) -> None:
        """Raises DataError, and deletes the store, when a file that was read since the last commit
        has changed: the store is named by what the files held before."""
        reading = self.documents.position.get("file", 0)
        change = self.job.source.changed(self.unchanged_files, reading + 1)
        if change:
            discard(self.job.folder)
            raise DataError(
                f"{change}; what was prepared of {self.job.source.entry} is deleted: start again "
                "when nothing writes to it"
            )
        self.unchanged_files = reading

    def _append(self, chunk: Chunk) -> None:
        encoded = chunk.encoded.result()
        self.losses += encoded.losses
        selections = {TRAIN: ~chunk.is_validation, VALIDATION: chunk.is_validation}
        for stream, selected in selections.items():
            record = encoded.record.select(selected)
            self.writer.append(stream, record, encoded.text_bytes[selected])
        self.progress = chunk.progress

    def _read(self) -> Iterator[Chunk]:
        """The documents that are left, in chunks that are being tokenized."""
        job = self.job
        counted: Progress = {**self.progress}
        waiting = gathered(job.source.record_format, job.validation_split, self.encoders)
        for document in self.documents:
            problem = document.problem
            if not problem and document.is_empty:
                counted["empty_documents"] += 1
            elif not problem:
                problem = waiting.add(document)
            if problem:
                waiting.close_document()
                counted = self._count_bad(document.where, problem, counted)
            if waiting.is_full:
                yield waiting.chunk({**counted, "position": self.documents.position})
        yield waiting.chunk({**counted, "position": self.documents.position})

    def _count_bad(self, where: str, problem: str, counted: Progress) -> Progress:
        """Count a document that cannot be read. Raises DataError unless the settings allow it."""
        message = f"{where}: {problem}"
        if not self.data.skip_bad_documents:
            raise DataError(
                f"{message}; fix it, or set data.skip_bad_documents = true to count and list such "
                "documents instead"
            )
        return {
            **counted,
            "bad_documents": counted["bad_documents"] + 1,
            "bad": [*counted["bad"], message][:BAD_LISTED],
        }


def losses_in(progress: Progress) -> Losses:
    """How much text the tokenizer lost, as a manifest counts it. No losses in stores of versions
    that did not count them."""
    return Losses(*progress.get("losses", ()))


def check_losses(
    losses: Losses, entry: str, tokenizer_settings: settings.Tokenizer, final: bool
) -> None:
    """Raises DataError when the tokenizer loses more than tokenizer.max_lost_share.

    entry: the source. final: nothing more will be counted.
    """
    limit = tokenizer_settings.max_lost_share
    is_enough = final or losses.sampled_characters >= JUDGED_CHARACTERS
    if is_enough and losses.share > limit:
        raise DataError(
            f"{entry}: {losses.describe()}; name a tokenizer that was made for this text "
            f"(tokenizer.path), or set tokenizer.max_lost_share, now {limit:g}, to at least "
            f"{losses.share:.2g}"
        )
