"""Batches of tensors from the token stores: sequences i .. i + B of the run. i is the whole state.

batches = Batches(prepared, data, seq_len, seed)
batch = batches.at(consumed, count)  # the same for any workers, accumulation and resumes
for micro_batch in batch.split(4): ...
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longfire.config import settings
from longfire.data.batch import Batch, batch_of
from longfire.data.order import Order, mix
from longfire.data.pack import document_starts, pack
from longfire.data.prepare import Prepared, prepare
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import TokenStore, TokenStream
from longfire.errors import DataError, SettingsError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # between looks at a growing store
BLOCK_SEQUENCES = 4096  # whose places are computed at once (about a millisecond)
BLOCKS_KEPT = 4
PATIENCE_SECONDS = 1.0  # how long training waits before a message
VALIDATION_SEQUENCES = 8  # of a batch for validation


@dataclass(frozen=True)
class Origin:
    """Where a sequence of a batch comes from: tokens [row * T, row * T + T] of the source's
    training stream, in that epoch; or one of the pieces of these tokens."""

    source: str
    row: int
    epoch: int
    piece: int = 0
    pieces: int = 1

    def __str__(self) -> str:
        piece = ""
        if self.pieces > 1:
            piece = f"piece {self.piece} of {self.pieces} of "
        return f"{self.source} {piece}sequence {self.row} of epoch {self.epoch}"


class Places(NamedTuple):
    """Where sequences come from; int64 (N,) each. piece: which piece of the sequence."""

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray
    piece: np.ndarray


class WaitStopped(Exception):
    """`stopped` ended the wait for a growing store."""


class Batches:
    """Random access to the sequences of a run. A context manager: ends its thread.

    While a store grows beside training, this waits for tokens that do not exist yet. `wait_seconds`
    counts how long callers of `at` have waited, for any reason.

    stages: (first sequence, tokens) where sequences do not have seq_len tokens from the start: from
    that sequence of the run on, each is given as pieces of so many tokens. Each token of a stage
    comes once in it; its pieces have an order of their own (order.py).
    stopped: is called while this waits for a growing store. When it returns True, the wait ends
    with WaitStopped.

    Raises SettingsError, and DataError for a source that is shorter than a sequence.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: settings.Data,
        seq_len: int,
        seed: int,
        stages: tuple[tuple[int, int], ...] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        if 0 < data.context_len < seq_len and not data.varlen:
            raise SettingsError("data.context_len splits documents, which takes data.varlen = true")
        if data.shuffle_window_sequences < 1:
            raise SettingsError(
                f"data.shuffle_window_sequences = {data.shuffle_window_sequences}: at least 1"
            )
        self.prepared = prepared
        self.data = data
        self.seq_len = seq_len
        self.seed = seed
        self.stages = stages or ((0, seq_len),)
        self.stopped = stopped
        self.order = order_of(data, seed)
        self.wait_seconds = 0.0
        self._thread: ThreadPoolExecutor | None = None
        if data.prefetch_factor:
            self._thread = ThreadPoolExecutor(1, "batches")
        self._prefetched: dict[tuple[int, int], Future[Batch]] = {}
        self._waiting_since: float | None = None  # when the caller of `at` began to wait
        self._closed = threading.Event()
        self._block = lru_cache(BLOCKS_KEPT)(self._find_block)
        for number, store in enumerate(prepared.stores):
            if store.complete:
                self._wait_for_sequences(number, 0)

    @classmethod
    def from_text(
        cls,
        dataset: str | Path | Sequence[str | Path],
        tokenizer: str | Path,
        seq_len: int,
        *,
        seed: int = 0,
        varlen: bool = False,
        folder: str | Path = settings.Data.folder,
        num_workers: int = 1,
    ) -> "Batches":
        """Batches of texts, which are tokenized once into token stores in `folder` and found there
        the next time.

        dataset: a source or several, as `data.dataset` takes them: files, folders, globs, hub
        datasets or `embedded`, the source of Python's library. tokenizer: as `tokenizer.path` takes
        it; `train` trains one. seq_len: tokens of a sequence. seed: of their order. varlen: whether
        attention and state end with each document. num_workers: processes that tokenize.

        Raises SettingsError and DataError naming source, file and fix.
        """
        if seq_len < 1:
            raise SettingsError(f"seq_len = {seq_len}: a sequence has at least one token")
        entries = [dataset] if isinstance(dataset, str | Path) else dataset
        sources = tuple(str(entry) for entry in entries)
        data = settings.Data(
            dataset=sources, folder=str(folder), varlen=varlen, num_workers=num_workers
        )
        prepared = prepare(data, settings.Tokenizer(path=str(tokenizer)))
        return cls(prepared, data, seq_len, seed)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the token stores."""
        return self.prepared.tokenizer

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def at(self, first: int, count: int, step: int = 0) -> Batch:
        """Sequences [first, first + count) of the run. The next batches are prefetched: those
        `step` sequences later, where other processes take the rest of a step's sequences (0: there
        are no others).

        Raises DataError if the source is shorter than a sequence, or if its preparation failed,
        and WaitStopped (see the class).
        """
        start = time.monotonic()
        self._waiting_since = start
        try:
            if self._thread is None:
                return self._make(first, count)
            return self._prefetch(self._thread, first, count, step or count).result()
        finally:
            self._waiting_since = None
            self.wait_seconds += time.monotonic() - start

    def _prefetch(
        self, thread: ThreadPoolExecutor, first: int, count: int, step: int
    ) -> "Future[Batch]":
        """Let the thread make this batch and the next ones; the future of this one."""
        future = self._prefetched.pop((first, count), None)
        if future is None:
            future = thread.submit(self._make, first, count)
        wanted = []
        for ahead in range(1, self.data.prefetch_factor + 1):
            wanted.append((first + ahead * step, count))
        for key in self._prefetched.keys() - set(wanted):
            self._prefetched.pop(key).cancel()
        for key in wanted:
            if key not in self._prefetched:
                self._prefetched[key] = thread.submit(self._make, *key)
        return future

    def origins(self, first: int, count: int) -> tuple[Origin, ...]:
        """Where sequences [first, first + count) of the run come from: to name a batch in a
        message."""
        pieces = self.seq_len // self._length(first)
        found = []
        for source, epoch, row, piece in zip(*self._pieces(first, count)):
            name = self.prepared.names[source]
            found.append(Origin(name, int(row), int(epoch), int(piece), pieces))
        return tuple(found)

    def _length(self, number: int) -> int:
        """Tokens of the pieces in which this sequence of the run is given."""
        lengths = [length for first, length in self.stages if first <= number]
        return lengths[-1]

    def _pieces(self, first: int, count: int) -> Places:
        """The places of the sequences that the batch [first, first + count) consists of."""
        pieces = self.seq_len // self._length(first)
        if pieces == 1:
            source, epoch, row = self._places(first, count)
            return Places(source, epoch, row, np.zeros(count, np.int64))
        stage_firsts = [stage_first for stage_first, _ in self.stages]
        start = [stage_first for stage_first in stage_firsts if stage_first <= first][-1]
        stop = min((later for later in stage_firsts if later > first), default=None)
        assert stop is None or first + count <= stop, "a step is in one stage"
        numbers = np.arange(first * pieces, (first + count) * pieces)
        index, piece = self.order.pieces(numbers, pieces, start, stop)
        source, epoch, row = self._find(index)
        return Places(source, epoch, row, piece)

    def _places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, row) of sequences [first, first + count) of the run; int64 (count,).

        From blocks of many sequences, since a small array costs as much as a large one. Those of a
        growing store are found one by one: the rest of the block may not exist yet.
        """
        if not all(store.complete for store in self.prepared.stores):
            return self._find(np.arange(first, first + count))
        first_block = first // BLOCK_SEQUENCES
        last_block = (first + count - 1) // BLOCK_SEQUENCES
        blocks = [self._block(number) for number in range(first_block, last_block + 1)]
        start = first - first_block * BLOCK_SEQUENCES
        source, epoch, row = np.concatenate(blocks, axis=1)[:, start : start + count]
        return source, epoch, row

    def _find_block(self, number: int) -> np.ndarray:
        first = number * BLOCK_SEQUENCES
        return np.stack(self._find(np.arange(first, first + BLOCK_SEQUENCES)))

    def _find(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, row) of these sequences of the run; int64 (N,)."""
        source, k = mix(index, self.prepared.shares, self.seed)
        epoch = np.empty_like(k)
        row = np.empty_like(k)
        for number in np.unique(source).tolist():
            selected = source == number
            available = self._wait_for_sequences(number, int(k[selected].max()))
            epoch[selected], row[selected] = self.order.sequences(k[selected], available, number)
        return source, epoch, row

    def _make(self, first: int, count: int) -> Batch:
        places = self._pieces(first, count)
        length = self._length(first)
        tokens_BS = np.empty((len(places.row), length + 1), self.prepared.tokenizer.dtype)
        starts_BS = np.empty(tokens_BS.shape, bool) if self.data.varlen else None
        loss_mask_BS = None
        for number in np.unique(places.source).tolist():
            selected = places.source == number
            stream = self.prepared.stores[number].train
            first_tokens = places.row[selected] * self.seq_len + places.piece[selected] * length
            tokens_BS[selected] = stream.sequences(first_tokens, length + 1)
            if stream.has_mask:
                if loss_mask_BS is None:
                    loss_mask_BS = np.ones(tokens_BS.shape, bool)
                loss_mask_BS[selected] = stream.loss_masks(first_tokens, length + 1)
            if starts_BS is not None:
                starts_BS[selected] = document_starts(stream.ends, first_tokens, length + 1)
        batch = batch_of(pack(tokens_BS, starts_BS, self.data.context_len, loss_mask_BS))
        return replace(batch, pieces=self.seq_len // length)

    def _wait_for_sequences(self, number: int, k: int) -> int:
        """How many sequences a source has. While it grows, waits until there are enough to find
        number k of its order. Raises DataError."""
        store = self.prepared.stores[number]
        name = self.prepared.names[number]
        needed = self.order.sequences_needed(k)

        def count() -> int:
            return (store.train.length - 1) // self.seq_len

        def is_enough() -> bool:
            return needed is not None and count() >= needed

        self._wait(name, store, is_enough)
        if store.complete and count() < 1:
            raise DataError(
                f"{name}: {store.train.length} tokens are less than one sequence and its last "
                f"label (training.seq_len + 1 = {self.seq_len + 1}); set a smaller "
                "training.seq_len or name more text"
            )
        return count()

    def _wait(self, name: str, store: TokenStore, is_enough: Callable[[], bool]) -> None:
        """Wait for a growing store. Raises DataError if its preparation failed."""
        is_reported = False
        while not store.complete and not is_enough():
            if self.stopped():
                raise WaitStopped(name)
            self.prepared.check()
            store.refresh()
            since = self._waiting_since
            is_long = since is not None and time.monotonic() - since > PATIENCE_SECONDS
            if is_long and not is_reported:
                is_reported = True
                logger.info(
                    f"data: training waits for {name}, of which {store.train.length:,} tokens are "
                    "prepared so far; more data.num_workers, or a run without data.streaming, "
                    "would not wait"
                )
            if not (store.complete or is_enough()) and self._closed.wait(POLL_SECONDS):
                raise DataError("the batches were closed while waiting for sequences")

    def validation_batches(
        self, number: int, tokens: int, count: int = VALIDATION_SEQUENCES, seq_len: int = 0
    ) -> Iterator[Batch]:
        """The first `tokens` tokens of a text of `prepared.validation` (all, if it has fewer),
        `count` sequences (of seq_len tokens) at a time.

        The last sequence is padded with id 0 and label -100. The first token of all has no label,
        and with varlen neither has the first of each document.
        """
        length = self.validation_tokens(number, tokens)
        stream = self.prepared.validation[number].stream
        yield from in_order(stream, length, seq_len or self.seq_len, self.data, count)

    def validation_tokens(self, number: int, tokens: int) -> int:
        """How many tokens `validation_batches` reads. While the store grows, waits until it has
        that many, so that evaluations of a run, and of its repetition, read the same text."""
        name, store, stream = self.prepared.validation[number]
        self._wait(name, store, lambda: stream.length >= tokens)
        return min(tokens, stream.length)

    def validation_text(self, number: int, tokens: int) -> str:
        """The text of these tokens, without BOS and EOS. Bits per byte are counted over its UTF-8
        bytes."""
        length = self.validation_tokens(number, tokens)
        ids = self.prepared.validation[number].stream.tokens(0, length)
        return self.prepared.tokenizer.decode(ids)


def order_of(data: settings.Data, seed: int) -> Order:
    """The order that the settings ask for; `auto` depends on whether stores may grow."""
    window = data.shuffle_window_sequences
    if data.shuffle == "none":
        return Order("none", window, seed)
    if data.shuffle == "window" or (data.shuffle == "auto" and data.streaming):
        return Order("window", window, seed)
    return Order("global", window, seed)


def in_order(
    stream: TokenStream,
    length: int,
    seq_len: int,
    data: settings.Data,
    count: int = VALIDATION_SEQUENCES,
) -> Iterator[Batch]:
    """The first `length` tokens of a stream in their order, `count` sequences at a time, padded as
    `Batches.validation_batches` says."""
    all_firsts = np.arange(0, max(length - 1, 0), seq_len)
    for number in range(0, len(all_firsts), count):
        firsts = all_firsts[number : number + count]
        tokens_BS = np.zeros((len(firsts), seq_len + 1), stream.ids.dtype)
        loss_mask_BS = np.zeros(tokens_BS.shape, bool)  # padding is not learned
        for row, first in enumerate(firsts.tolist()):
            stop = min(first + seq_len + 1, length)
            tokens_BS[row, : stop - first] = stream.tokens(first, stop)
            loss_mask_BS[row, : stop - first] = stream.loss_mask(first, stop)
        starts_BS = document_starts(stream.ends, firsts, seq_len + 1) if data.varlen else None
        yield batch_of(pack(tokens_BS, starts_BS, data.context_len, loss_mask_BS))
