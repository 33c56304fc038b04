"""Batches of tensors from the stores: rows i .. i + B of the run, whatever was asked for before;
the whole state is i.

batches = Batches(prepared, data, seq_len, seed)
batch = batches.at(rows_consumed, rows)  # pure: the same for any workers, accumulation, resumes
for microbatch in batch.split(4): ...
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longfire.config import settings
from longfire.data.order import Order, mix
from longfire.data.pack import NO_LABEL, Packed, document_starts, pack
from longfire.data.prepare import Prepared, prepare
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import TokenStore, TokenStream
from longfire.errors import DataError, SettingsError
from longfire.ops.documents import Documents
from longfire.ops.sequence_ops import UNDECIDED, SequenceOps, SequenceSharding

POLL_SECONDS = 0.05  # between looks at a growing store
BLOCK_ROWS, BLOCKS_KEPT = (
    4096,
    4,
)  # rows whose places are found at a time (about a millisecond), and kept
PATIENCE_SECONDS = 1.0  # how long training stands still before it says so


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens on one device.

    ids_BT int64; labels_BT int64, the next token, -100 where nothing is to be learned; positions_BT
    int64, in the document, or in the row where documents flow on; documents: None where they flow
    on. pieces: how many of the rows are one row of the run's count (training.seq_len_schedule).
    ops: what computes along the rows (`cut`); the model's own, where they are whole.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    documents: Documents | None = None
    pieces: int = 1
    ops: SequenceOps = UNDECIDED

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    def real_tokens(self) -> int:
        """Labels to be learned; waits for the device."""
        return int((self.labels_BT != NO_LABEL).sum())

    def to(self, device: torch.device | str) -> "Batch":
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(
            self.ids_BT.to(device),
            self.labels_BT.to(device),
            self.positions_BT.to(device),
            documents,
            self.pieces,
            self.ops.to(device),
        )

    def split(self, microbatches: int) -> tuple["Batch", ...]:
        """The same rows in `microbatches` equal parts, in order."""
        assert self.rows % microbatches == 0, (
            f"{self.rows} rows do not divide into {microbatches} microbatches"
        )
        if microbatches == 1:
            return (self,)
        each = self.rows // microbatches
        return tuple(self.of(slice(first, first + each)) for first in range(0, self.rows, each))

    def of(self, rows: Any) -> "Batch":
        """Some of the rows: a slice, or their numbers."""
        documents = None if self.documents is None else self.documents.of(rows)
        return Batch(
            self.ids_BT[rows],
            self.labels_BT[rows],
            self.positions_BT[rows],
            documents,
            self.pieces,
            self.ops.of(rows),
        )

    def cut(self, context: SequenceSharding) -> "Batch":
        """What is on this process of rows that processes share (parallel/context.Context). Labels, positions
        and documents were made of whole rows; padding has no label."""
        ops, documents = context.share(self.positions_BT, self.documents)
        return Batch(
            ops.cut(self.ids_BT),
            ops.cut(self.labels_BT, NO_LABEL),
            ops.cut(self.positions_BT),
            documents,
            self.pieces,
            ops,
        )

    def share(self, number: int, shares: int) -> "Batch":
        """Some of the rows, of `shares` parts of the same size: what is missing is filled up with
        rows without labels, so that whoever computes them keeps step with the others."""
        if shares == 1:
            return self
        each = -(-self.rows // shares)
        mine_B = torch.arange(number * each, (number + 1) * each)
        there_B = mine_B < self.rows
        mine_B = torch.where(there_B, mine_B, 0)
        mine = self.of(mine_B)
        return replace(mine, labels_BT=torch.where(there_B[:, None], mine.labels_BT, NO_LABEL))


@dataclass(frozen=True)
class Row:
    """Where a row of a batch came from: tokens [row * T, row * T + T] of the source's training
    stream, in that epoch; or one of the pieces of these tokens."""

    source: str
    row: int
    epoch: int
    piece: int = 0
    pieces: int = 1

    def __str__(self) -> str:
        piece = f"piece {self.piece} of {self.pieces} of " if self.pieces > 1 else ""
        return f"{self.source} {piece}row {self.row} of epoch {self.epoch}"


class WaitStopped(Exception):
    """Someone asked to stop while a growing store was waited for."""


class Batches:
    """Random access to the rows of a run. A context manager: ends its thread.

    While a store grows behind training, what is not there yet is waited for. `wait_seconds` counts
    how long callers of `at` have stood still, for whatever reason.

    stages: (first row, tokens) where rows are not of seq_len tokens from the start: from that row
    of the run on each is given as pieces of so many tokens. Every token of a stage's rows comes
    once in it, its pieces in an order of their own (order.py).
    stopped: asked while a growing store is waited for; where it says so the waiting ends with
    WaitStopped.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: settings.Data,
        seq_len: int,
        seed: int,
        note: Callable[[str], None] = print,
        stages: tuple[tuple[int, int], ...] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        if data.context_len and not data.varlen:
            raise SettingsError("data.context_len splits documents, which takes data.varlen = true")
        if data.shuffle_window_rows < 1:
            raise SettingsError(
                f"data.shuffle_window_rows = {data.shuffle_window_rows}: at least 1"
            )
        self.prepared, self.data, self.seq_len, self.seed, self.note = (
            prepared,
            data,
            seq_len,
            seed,
            note,
        )
        self.stages = stages or ((0, seq_len),)
        self.stopped = stopped
        by_length = "window" if data.streaming else "global"
        self.order = Order(
            by_length if data.shuffle == "auto" else data.shuffle, data.shuffle_window_rows, seed
        )
        self.wait_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "batches") if data.prefetch_factor else None
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}
        self._standing_since: float | None = None  # when the caller of `at` began to wait
        self._closed = threading.Event()
        self._block = lru_cache(BLOCKS_KEPT)(self._find_block)
        for number, store in enumerate(prepared.stores):
            if store.complete:
                self._rows_there(number, 0)

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

        Raises SettingsError and DataError naming source, file and what to do.
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
        """What made ids of the text."""
        return self.prepared.tokenizer

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def at(self, first: int, rows: int, step_rows: int = 0) -> Batch:
        """Rows [first, first + rows) of the run; makes the next ones ready behind the caller: those
        `step_rows` further on, where other processes take the rest of a step's rows (0: there are
        none).

        Raises DataError if the source is shorter than a row, or if its preparation failed,
        WaitStopped as the class says.
        """
        start = self._standing_since = time.monotonic()
        try:
            if self._thread is None:
                return self._make(first, rows)
            future = self._ahead.pop((first, rows), None) or self._submit(first, rows)
            ahead = step_rows or rows
            wanted = [(first + i * ahead, rows) for i in range(1, self.data.prefetch_factor + 1)]
            for key in self._ahead.keys() - set(wanted):
                self._ahead.pop(key).cancel()
            self._ahead |= {key: self._submit(*key) for key in wanted if key not in self._ahead}
            return future.result()
        finally:
            self._standing_since = None
            self.wait_seconds += time.monotonic() - start

    def _submit(self, first: int, rows: int) -> "Future[Batch]":
        return self._thread.submit(self._make, first, rows)

    def rows(self, index_start: int, count: int) -> tuple[Row, ...]:
        """Where rows [index_start, index_start + count) of the run come from: to name a batch in a
        message."""
        names, pieces = self.prepared.names, self.seq_len // self._length(index_start)
        places = zip(*(a.tolist() for a in self._pieces(index_start, count)))
        return tuple(
            Row(names[source], row, epoch, piece, pieces) for source, epoch, row, piece in places
        )

    def _length(self, row: int) -> int:
        """Tokens that a row of the run is given in."""
        return [length for first, length in self.stages if first <= row][-1]

    def _pieces(self, index_start: int, count: int) -> tuple[np.ndarray, ...]:
        """(source, epoch, row, piece) of what rows [index_start, index_start + count) of the run
        are given as."""
        pieces = self.seq_len // self._length(index_start)
        if pieces == 1:
            return *self._places(index_start, count), np.zeros(count, np.int64)
        firsts = [first for first, _ in self.stages]
        first = [first for first in firsts if first <= index_start][-1]
        stop = min((later for later in firsts if later > index_start), default=None)
        assert stop is None or index_start + count <= stop, "a step lies in one stage"
        index, piece = self.order.pieces(
            np.arange(index_start * pieces, (index_start + count) * pieces), pieces, first, stop
        )
        return *self._find(index), piece

    def _places(self, index_start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, row) of rows [index_start, index_start + count) of the run; int64
        (count,).

        From blocks of many rows, since the cost of a small array is the cost of the call. Rows of a
        growing store are asked for one by one: the rest of the block may not be there yet.
        """
        if not all(store.complete for store in self.prepared.stores):
            return self._find(np.arange(index_start, index_start + count))
        first, last = index_start // BLOCK_ROWS, (index_start + count - 1) // BLOCK_ROWS
        blocks = [self._block(number) for number in range(first, last + 1)]
        start = index_start - first * BLOCK_ROWS
        source, epoch, row = np.concatenate(blocks, axis=1)[:, start : start + count]
        return source, epoch, row

    def _find_block(self, number: int) -> np.ndarray:
        return np.stack(self._find(np.arange(number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS)))

    def _find(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source, k = mix(index, self.prepared.shares, self.seed)
        epoch, row = np.empty_like(k), np.empty_like(k)
        for number in np.unique(source).tolist():
            mine = source == number
            epoch[mine], row[mine] = self.order.rows(
                k[mine], self._rows_there(number, int(k[mine].max())), number
            )
        return source, epoch, row

    def _make(self, index_start: int, count: int) -> Batch:
        (source, _, row, piece), length = (
            self._pieces(index_start, count),
            self._length(index_start),
        )
        tokens_BS = np.empty((len(row), length + 1), self.prepared.tokenizer.dtype)
        starts_BS = np.empty(tokens_BS.shape, bool) if self.data.varlen else None
        for number in np.unique(source).tolist():
            mine, stream = source == number, self.prepared.stores[number].train
            first = row[mine] * self.seq_len + piece[mine] * length
            tokens_BS[mine] = stream.rows(first, length + 1)
            if starts_BS is not None:
                starts_BS[mine] = document_starts(stream.ends, first, length + 1)
        batch = _tensors(pack(tokens_BS, starts_BS, self.data.context_len))
        return replace(batch, pieces=self.seq_len // length)

    def _rows_there(self, number: int, k: int) -> int:
        """Rows of a source; while it grows, waits until there are enough to know number k of its
        order."""
        store, T = self.prepared.stores[number], self.seq_len
        needed = self.order.rows_needed(k)
        self._until(
            self.prepared.names[number],
            store,
            lambda: needed is not None and (store.train.length - 1) // T >= needed,
        )
        rows = (store.train.length - 1) // T
        if store.complete and rows < 1:
            raise DataError(
                f"{self.prepared.names[number]}: {store.train.length} tokens are less than one row and its last label "
                f"(training.seq_len + 1 = {T + 1}); set a smaller training.seq_len or name more text"
            )
        return rows

    def _until(self, name: str, store: TokenStore, enough: Callable[[], bool]) -> None:
        """Wait for a growing store. Raises DataError if its preparation failed."""
        said = False
        while not store.complete and not enough():
            if self.stopped():
                raise WaitStopped(name)
            self.prepared.check()
            store.refresh()
            since = self._standing_since
            if not said and since is not None and time.monotonic() - since > PATIENCE_SECONDS:
                said = True
                self.note(
                    f"data: training waits for {name}, of which {store.train.length:,} tokens are "
                    f"prepared so far; more data.num_workers, or a run without data.streaming, would not wait"
                )
            if not (store.complete or enough()) and self._closed.wait(POLL_SECONDS):
                raise DataError("the batches were closed while waiting for rows")

    def heldout(self, number: int, tokens: int, rows: int = 8, seq_len: int = 0) -> Iterator[Batch]:
        """The first `tokens` tokens of a text of `prepared.validation` (all, if it has fewer),
        `rows` rows (of seq_len tokens) at a time.

        The last row is filled up with id 0 and label -100. The first token of all has no label, nor
        has, with varlen, the first of each document.
        """
        length = self.validation_tokens(number, tokens)
        stream = self.prepared.validation[number].stream
        yield from in_order(stream, length, seq_len or self.seq_len, self.data, rows)

    def validation_tokens(self, number: int, tokens: int) -> int:
        """How many tokens `heldout` reads. While the store grows, waits until it has that many, so
        that evaluations of one run, and of its repetition, see the same text."""
        name, store, stream = self.prepared.validation[number]
        self._until(name, store, lambda: stream.length >= tokens)
        return min(tokens, stream.length)

    def validation_text(self, number: int, tokens: int) -> str:
        """The text of these tokens, without BOS and EOS: its UTF-8 bytes are what bits per byte are
        counted over."""
        length = self.validation_tokens(number, tokens)
        return self.prepared.tokenizer.decode(
            self.prepared.validation[number].stream.tokens(0, length)
        )


def in_order(
    stream: TokenStream, length: int, seq_len: int, data: settings.Data, rows: int = 8
) -> Iterator[Batch]:
    """The first `length` tokens of a stream as they come, `rows` rows at a time; for what they are
    filled up with see `heldout`."""
    firsts = np.arange(0, max(length - 1, 0), seq_len)
    for some in (firsts[i : i + rows] for i in range(0, len(firsts), rows)):
        tokens_BS = np.zeros((len(some), seq_len + 1), stream.ids.dtype)
        for row, first in enumerate(some.tolist()):
            part = stream.tokens(first, min(first + seq_len + 1, length))
            tokens_BS[row, : len(part)] = part
        starts_BS = document_starts(stream.ends, some, seq_len + 1) if data.varlen else None
        packed = pack(tokens_BS, starts_BS, data.context_len)
        beyond = some[:, None] + np.arange(1, seq_len + 1) >= length
        labels_BT = np.where(beyond, NO_LABEL, packed.labels_BT)
        yield _tensors(Packed(packed.ids_BT, labels_BT, packed.positions_BT, packed.starts_BT))


def _tensors(packed: Packed) -> Batch:
    ids_BT, labels_BT, positions_BT = map(
        torch.from_numpy, (packed.ids_BT, packed.labels_BT, packed.positions_BT)
    )
    if packed.starts_BT is None:
        return Batch(ids_BT, labels_BT, positions_BT)
    cu_lengths = np.append(np.flatnonzero(packed.starts_BT), packed.starts_BT.size).astype(np.int32)
    document_ids_BT = torch.from_numpy(np.cumsum(packed.starts_BT, axis=1) - 1)
    documents = Documents(
        document_ids_BT, torch.from_numpy(cu_lengths), int(np.diff(cu_lengths).max())
    )
    return Batch(ids_BT, labels_BT, positions_BT, documents)
