"""Sequences of T+1 tokens -> ids, labels, positions, document ids; all sequences of a batch at
once, without work for each token in Python."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

NO_LABEL = -100  # nothing is to be learned here: what torch's cross entropy ignores


class Ends(Protocol):
    """Ascending ends of documents: an array, or a column of a token store."""

    def searchsorted(self, values: np.ndarray, /) -> np.ndarray: ...

    def __getitem__(self, items: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Packed:
    """ids_BT, labels_BT, positions_BT int64; starts_BT bool: a document (or a piece of one) begins
    here; None if not varlen."""

    ids_BT: np.ndarray
    labels_BT: np.ndarray
    positions_BT: np.ndarray
    starts_BT: np.ndarray | None


def pack(
    tokens_BS: np.ndarray,
    starts_BS: np.ndarray | None = None,
    context_len: int = 0,
    loss_mask_BS: np.ndarray | None = None,
) -> Packed:
    """Pack sequences of S = T+1 tokens; the last one is only a label.

    Without `starts_BS` attention and state continue over document ends: positions 0 .. T-1, every
    label real. With it (a document begins at this token) positions count from 0 in each document,
    a sequence's first token begins a piece too, and a label that belongs to another document is
    NO_LABEL. `context_len` > 0 cuts longer pieces after so many tokens. The label at such a cut
    stays, since it continues the same document. A label whose token `loss_mask_BS` (bool) leaves
    out is NO_LABEL.

    An example, T = 6, documents "abcd" and "xyz", context_len = 3:
        tokens     a b c d x y z        starts     1 0 0 0 1 0 0
        ids        a b c d x y          labels     b c d . y z          (. = NO_LABEL)
        positions  0 1 2 0 0 1          documents  0 0 0 1 2 2
    """
    ids_BT = tokens_BS[:, :-1].astype(np.int64)
    labels_BT = tokens_BS[:, 1:].astype(np.int64)
    if loss_mask_BS is not None:
        labels_BT[~loss_mask_BS[:, 1:]] = NO_LABEL
    places_T = np.arange(ids_BT.shape[1])
    if starts_BS is None:
        return Packed(ids_BT, labels_BT, np.tile(places_T, (len(ids_BT), 1)), None)
    labels_BT[starts_BS[:, 1:]] = NO_LABEL
    starts_BT = starts_BS[:, :-1].copy()
    starts_BT[:, 0] = True
    positions_BT = places_T - np.maximum.accumulate(starts_BT * places_T, axis=1)
    if context_len:
        positions_BT %= context_len
        starts_BT = positions_BT == 0
    return Packed(ids_BT, labels_BT, positions_BT, starts_BT)


def document_starts(ends: Ends, first: np.ndarray, length: int) -> np.ndarray:
    """starts_BS bool: where a document begins in sequences of S = `length` tokens, whose first
    tokens are number `first` (B,) of the stream.

    ends: ascending ends of documents in the stream, each the start of the next one.
    Cost: two binary searches for a batch, then work for each document.
    """
    first = np.asarray(first, np.int64)
    starts_BS = np.zeros((len(first), length), bool)
    low = ends.searchsorted(first)
    high = ends.searchsorted(first + length)
    for number, start in enumerate(first.tolist()):
        inside = np.asarray(ends[low[number] : high[number]], np.int64)
        starts_BS[number, inside - start] = True
    starts_BS[:, 0] |= first == 0
    return starts_BS
