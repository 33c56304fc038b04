"""Token records: ids, where their documents end, and which of them are learned."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TokenRecord(NamedTuple):
    """The tokens of one document or of several: what a token store is written from.

    ids: (N,) unsigned, the documents end to end. lengths: (D,) int64, the tokens of each document;
    their sum is N. loss_mask: (N,) bool, whether a token counts in the loss where it is the label;
    None: all of them do. It belongs to the token itself and not to the one before, so it stays
    right wherever sequences are cut. is_open: whether the last document continues in the record
    that is joined to this one.
    """

    ids: np.ndarray
    lengths: np.ndarray
    loss_mask: np.ndarray | None = None
    is_open: bool = False

    @property
    def loss_tokens(self) -> int:
        """How many tokens count in the loss."""
        if self.loss_mask is None:
            return len(self.ids)
        return int(np.count_nonzero(self.loss_mask))

    def select(self, selected: np.ndarray) -> "TokenRecord":
        """Some of the documents: bool (D,)."""
        if selected.all():
            return self
        selected_N = np.repeat(selected, self.lengths)
        loss_mask = None if self.loss_mask is None else self.loss_mask[selected_N]
        return TokenRecord(self.ids[selected_N], self.lengths[selected], loss_mask)

    def cut(self, place: int) -> tuple["TokenRecord", "TokenRecord"]:
        """The first `place` tokens, and the others. A document that is cut becomes two, of which
        the first does not continue."""
        ends = np.cumsum(self.lengths)
        before = np.diff(np.minimum(ends, place), prepend=0)
        after = self.lengths - before
        first_mask = None
        second_mask = None
        if self.loss_mask is not None:
            first_mask = self.loss_mask[:place]
            second_mask = self.loss_mask[place:]
        first = TokenRecord(self.ids[:place], before[before > 0], first_mask)
        second = TokenRecord(self.ids[place:], after[after > 0], second_mask, self.is_open)
        return first, second


def document_record(ids: np.ndarray, loss_mask: np.ndarray | None = None) -> TokenRecord:
    """The record of one document."""
    return TokenRecord(ids, np.array([len(ids)], np.int64), loss_mask)


def join_records(records: Sequence[TokenRecord], dtype: str) -> TokenRecord:
    """All documents of several records, in order; with a mask where one of them has one. The last
    document of an open record and the first one after it are one. dtype: of the ids."""
    no_ids = np.array([], dtype)
    ids = np.concatenate([no_ids, *[record.ids for record in records]], dtype=dtype)
    lengths = sum_documents([record.lengths for record in records], begins_document(records))
    if all(record.loss_mask is None for record in records):
        return TokenRecord(ids, lengths)
    return TokenRecord(ids, lengths, np.concatenate([mask_of(record) for record in records]))


def begins_document(records: Sequence[TokenRecord]) -> np.ndarray:
    """Which documents of several records, one after another, begin a document of the joined record,
    and do not continue the one before; bool."""
    begins = []
    continues = False
    for record in records:
        of_record = np.ones(len(record.lengths), bool)
        of_record[:1] = not continues
        begins.append(of_record)
        continues = record.is_open
    return np.concatenate([np.array([], bool), *begins])


def sum_documents(values: Sequence[np.ndarray], begins: np.ndarray) -> np.ndarray:
    """Sums of a number of each document of several records over those that are one document of the
    joined record, int64. begins: as `begins_document` says."""
    joined = np.concatenate([np.array([], np.int64), *values])
    if not len(joined):
        return joined
    return np.add.reduceat(joined, np.flatnonzero(begins))


def mask_of(record: TokenRecord) -> np.ndarray:
    """The loss mask of a record, bool (N,); ones where it has none."""
    if record.loss_mask is None:
        return np.ones(len(record.ids), bool)
    return record.loss_mask
