"""Batches of tensors from the stores: rows i .. i + B of the run, whatever asked for before; the whole state is i.

batches = Batches(prepared, data, seq_len, seed)
batch = batches.at(rows_consumed, rows)     # pure: the same for any workers, accumulation, resumes
for microbatch in batch.split(4): ...
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longfire import settings
from longfire.data.order import Order, mix
from longfire.data.pack import NO_LABEL, Packed, document_starts, pack
from longfire.data.prepare import Prepared
from longfire.data.tokens import TokenStream
from longfire.errors import DataError, SettingsError
from longfire.ops.documents import Documents

POLL_SECONDS = 0.1  # how often a growing store is looked at
PATIENCE_SECONDS = 1.0  # how long training waits before it says so


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens on one device.

    ids_BT, labels_BT (the next token; -100 where nothing is to be learned), positions_BT (in the document, or in the row
    where documents flow on): int64. documents: None where they flow on.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    documents: Documents | None = None

    @property
    def rows(self) -> int:
        return self.ids_BT.shape[0]

    def real_tokens(self) -> int:
        """Labels to be learned."""
        return int((self.labels_BT != NO_LABEL).sum())

    def to(self, device: torch.device | str) -> "Batch":
        documents = self.documents and Documents(
            self.documents.ids_BT.to(device), self.documents.cu_lengths.to(device), self.documents.max_length
        )
        return Batch(self.ids_BT.to(device), self.labels_BT.to(device), self.positions_BT.to(device), documents)

    def split(self, microbatches: int) -> tuple["Batch", ...]:
        """The same rows in equal parts, in order."""
        assert self.rows % microbatches == 0, f"{self.rows} rows do not divide into {microbatches} microbatches"
        parts = zip(*(t.chunk(microbatches) for t in (self.ids_BT, self.labels_BT, self.positions_BT)))
        if self.documents is None:
            return tuple(Batch(*part) for part in parts)
        ids = self.documents.ids_BT.chunk(microbatches)
        return tuple(Batch(*part, Documents.from_ids(ids_BT)) for part, ids_BT in zip(parts, ids))


@dataclass(frozen=True)
class Row:
    """Where a row of a batch came from: tokens [row * T, (row + 1) * T) of a source's training stream."""

    source: str
    row: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.source} row {self.row} (epoch {self.epoch})"


class Batches:
    """Random access to the rows of a run. `wait_seconds`: how long callers of `at` have stood still for data."""

    def __init__(
        self, prepared: Prepared, data: settings.Data, seq_len: int, seed: int, note: Callable[[str], None] = print
    ):
        self.prepared, self.data, self.seq_len, self.seed, self.note = prepared, data, seq_len, seed, note
        shuffle = data.shuffle if data.shuffle != "auto" else "window" if data.streaming else "global"
        if data.context_len and not data.varlen:
            raise SettingsError("data.context_len splits documents, which needs data.varlen = true")
        self.order = Order(shuffle, data.shuffle_window_rows, seed)
        self.wait_seconds = 0.0
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}
        self._thread = ThreadPoolExecutor(1, "batches") if data.prefetch_factor else None
        self._closed, self._asked_at = threading.Event(), None
        for store in prepared.stores:
            if store.complete:
                self._count_rows(store)

    def close(self) -> None:
        self._closed.set()
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def at(self, rows_consumed: int, rows: int) -> Batch:
        """Rows [rows_consumed, rows_consumed + rows) of the run. Raises DataError if their preparation failed."""
        start = self._asked_at = time.monotonic()
        try:
            if self._thread is None:
                return self._make(rows_consumed, rows)
            future = self._ahead.pop((rows_consumed, rows), None) or self._thread.submit(
                self._make, rows_consumed, rows
            )
            wanted = [(rows_consumed + i * rows, rows) for i in range(1, self.data.prefetch_factor + 1)]
            for key in set(self._ahead) - set(wanted):
                self._ahead.pop(key).cancel()
            for key in wanted:
                if key not in self._ahead:
                    self._ahead[key] = self._thread.submit(self._make, *key)
            return future.result()
        finally:
            self._asked_at = None
            self.wait_seconds += time.monotonic() - start

    def rows(self, index_start: int, count: int) -> tuple[Row, ...]:
        """Where the rows of a batch came from, to name it in a message."""
        source, epoch, row = self._places(index_start, count)
        return tuple(
            Row(self.prepared.stores[s].name, r, e) for s, r, e in zip(source.tolist(), row.tolist(), epoch.tolist())
        )

    def _places(self, index_start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, row) of numbers [index_start, index_start + count) of the run."""
        source, k = mix(np.arange(index_start, index_start + count), self.prepared.shares, self.seed)
        epoch, row = np.empty_like(k), np.empty_like(k)
        for number in np.unique(source).tolist():
            mine = source == number
            epoch[mine], row[mine] = self.order.rows(k[mine], self._rows_there(number, int(k[mine].max())), number)
        return source, epoch, row

    def _make(self, index_start: int, count: int) -> Batch:
        source, _, row = self._places(index_start, count)
        tokens_BS, starts_BS = None, None
        for number in np.unique(source).tolist():
            mine = source == number
            stream = self.prepared.stores[number].train
            first = row[mine] * self.seq_len
            part = stream.rows(first, self.seq_len + 1)
            tokens_BS = np.empty((count, part.shape[1]), part.dtype) if tokens_BS is None else tokens_BS
            tokens_BS[mine] = part
            if self.data.varlen:
                starts_BS = np.empty(tokens_BS.shape, bool) if starts_BS is None else starts_BS
                starts_BS[mine] = document_starts(stream.ends, first, self.seq_len + 1)
        return _batch(pack(tokens_BS, starts_BS, self.data.context_len))

    def _count_rows(self, store) -> int:
        rows = max(store.train.length - 1, 0) // self.seq_len
        if store.complete and not rows:
            raise DataError(
                f"{store.name}: {store.train.length} tokens are less than one row of training.seq_len + 1 = "
                f"{self.seq_len + 1}; take a shorter seq_len or more text"
            )
        return rows

    def _rows_there(self, number: int, k: int) -> int:
        """Rows of a source; while its store grows, waits until number k of its order is known."""
        store = self.prepared.stores[number]
        needed = self.order.rows_needed(k) if self.order.shuffle != "global" else None
        said = False
        while not store.complete and (needed is None or self._count_rows(store) < needed):
            store.refresh()
            self.prepared.check()
            if self._closed.wait(0 if store.complete else POLL_SECONDS):
                raise DataError("the batches were closed")
            if not said and self._asked_at and time.monotonic() - self._asked_at > PATIENCE_SECONDS:
                said = True
                self.note(
                    f"data: training waits for {store.name}: {self._count_rows(store)} of "
                    f"{'all' if needed is None else needed} rows are prepared"
                )
        return self._count_rows(store)

    def heldout(self, source_index: int, tokens: int, rows: int = 8) -> Iterator[Batch]:
        """Held-out documents of a source in order, about `tokens` tokens (whole documents, at least one), `rows` at a time.

        The last row is filled up with id 0 and label -100.
        """
        stream, length = self._heldout_stream(source_index), self.heldout_tokens(source_index, tokens)
        T = self.seq_len
        firsts = np.arange(0, max(length - 1, 0), T)
        for i in range(0, len(firsts), rows):
            yield _batch(self._heldout_rows(stream, firsts[i : i + rows], length))

    def _heldout_rows(self, stream: TokenStream, firsts: np.ndarray, length: int) -> Packed:
        T = self.seq_len
        tokens_BS = np.zeros((len(firsts), T + 1), stream.ids.dtype)
        for row, first in enumerate(firsts.tolist()):
            part = stream.tokens(first, min(first + T + 1, length))
            tokens_BS[row, : len(part)] = part
        packed = pack(
            tokens_BS, document_starts(stream.ends, firsts, T + 1) if self.data.varlen else None, self.data.context_len
        )
        beyond = firsts[:, None] + np.arange(1, T + 1) >= length
        return Packed(
            packed.ids_BT, np.where(beyond, NO_LABEL, packed.labels_BT), packed.positions_BT, packed.starts_BT
        )

    def _heldout_stream(self, source_index: int) -> TokenStream:
        return self.prepared.stores[source_index].heldout

    def heldout_tokens(self, source_index: int, tokens: int) -> int:
        """How many held-out tokens `heldout` reads: whole documents that fit in `tokens`, or the start of a longer first one."""
        stream = self._heldout_stream(source_index)
        fits = int(stream.ends.searchsorted(np.array([tokens]), side="right")[0])
        return int(stream.ends[fits - 1 : fits][0]) if fits else min(tokens, stream.length)


def _batch(packed: Packed) -> Batch:
    ids_BT, labels_BT = (torch.from_numpy(np.ascontiguousarray(a)) for a in (packed.ids_BT, packed.labels_BT))
    positions_BT = torch.from_numpy(np.array(packed.positions_BT))
    if packed.starts_BT is None:
        return Batch(ids_BT, labels_BT, positions_BT)
    starts = np.flatnonzero(packed.starts_BT)
    cu_lengths = np.append(starts, packed.starts_BT.size).astype(np.int32)
    document_ids = torch.from_numpy(np.cumsum(packed.starts_BT, axis=1) - 1)
    return Batch(
        ids_BT,
        labels_BT,
        positions_BT,
        Documents(document_ids, torch.from_numpy(cu_lengths), int(np.diff(cu_lengths).max())),
    )
