"""Which tokens of a sequence are on which of the processes that share it, and what a process knows
of the whole sequence.

A sequence of T tokens is padded at its end and cut into segments of equal length; each process has
equally many, in the order of the sequence. With 2 processes and T = 7:

    contiguous   a b c d | e f g .         process 0: a b c d          process 1: e f g .
    zigzag       a b | c d | e f | g .     process 0: a b, g .         process 1: c d, e f
    balanced     any: the segments are distributed by the work that their documents make for
                 softmax attention

A causal query looks back, so that the last process of a contiguous sequence has 2 n - 1 times the
work of the first one; in a zigzag (Zhu 2024) each has an early and a late segment, whose work adds
up to the same. Documents break that symmetry (a sequence may end with a single long one, and have
all its work there), which the balanced layout repairs. Padding comes last: no real token sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.attention_blocks import Manner, Piece
from longfire.ops.device_copy import copy_to
from longfire.ops.document_starts import starts_of
from longfire.ops.documents import Documents

KINDS = ("contiguous", "zigzag", "balanced")
# Segments of a process in a balanced layout. Sequences of 32k to 1M bytes of Python's library: 4
# left 1.35 max / mean, 6 1.04, 8 1.02.
BALANCED_SEGMENTS = 8


class SequenceLayout(NamedTuple):
    """places[r]: the numbers of the segments on process r, in the order of the sequence. length:
    tokens of a segment; tokens: of a sequence."""

    places: tuple[tuple[int, ...], ...]
    length: int
    tokens: int

    @classmethod
    def of_kind(
        cls,
        kind: str,
        processes: int,
        tokens: int,
        multiple: int = 1,
        work_T: Tensor | None = None,
    ) -> "SequenceLayout":
        """multiple: what must divide the tokens of a segment. work_T: of each token, for
        `balanced`."""
        each = segments_each(kind, processes, tokens)
        length = multiple * -(-tokens // (each * processes * multiple))
        places = contiguous(processes)
        if each == 2:
            places = zigzag(processes)
        elif each > 2:
            assert work_T is not None, "balanced segments are dealt by their work"
            work = (
                F.pad(work_T.double(), (0, each * processes * length - tokens))
                .view(-1, length)
                .sum(1)
            )
            places = balanced(work.tolist(), processes)
        return cls(places, length, tokens)

    @property
    def segments(self) -> int:
        """Of a whole sequence."""
        return len(self.places) * len(self.places[0])

    @property
    def padded_tokens(self) -> int:
        """Tokens of a padded sequence."""
        return self.segments * self.length

    def segments_of(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        """(B, T, ...) -> (B, segments, length, ...), filled up."""
        missing = self.padded_tokens - x_BT.shape[1]
        if missing:
            x_BT = torch.cat(
                [x_BT, x_BT.new_full((x_BT.shape[0], missing, *x_BT.shape[2:]), fill)],
                1,
            )
        return x_BT.unflatten(1, (self.segments, self.length))

    def cut(
        self,
        x_BT: Tensor,
        rank: int,
        fill: float = 0,
    ) -> Tensor:
        """What process `rank` has of sequences (B, T, ...): (B, its segments x length, ...)."""
        return self.segments_of(x_BT, fill)[:, list(self.places[rank])].flatten(1, 2)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The sequences (B, T, ...) of which these are the parts of all processes: the inverse of
        `cut`."""
        segments_BSL = torch.cat([part.unflatten(1, (-1, self.length)) for part in parts], 1)
        return segments_BSL[:, self.in_sequence_order()].flatten(1, 2)[:, : self.tokens]

    def in_sequence_order(self) -> list[int]:
        """Where each segment is when those of all processes come one after the other."""
        order = self.by_rank()
        return sorted(range(len(order)), key=order.__getitem__)

    def by_rank(self) -> list[int]:
        """The segments of all processes, one after the other."""
        found: list[int] = []
        for place in self.places:
            for segment in place:
                found.append(segment)
        return found

    def balance(self, work_BT: Tensor) -> float:
        """The most work of a process over the mean of all; 1 is even."""
        work_S = self.segments_of(work_BT.double()).sum((0, 2))
        work = [work_S[list(place)].sum().item() for place in self.places]
        return max(work) * len(work) / sum(work)


def segments_each(kind: str, processes: int, tokens: int) -> int:
    """Segments of a process; a balanced sequence has fewer where it is short."""
    assert kind in KINDS, kind
    if kind == "balanced":
        return max(2, min(BALANCED_SEGMENTS, tokens // processes))
    return 1 + (kind == "zigzag")


def contiguous(processes: int) -> tuple[tuple[int, ...], ...]:
    return tuple((rank,) for rank in range(processes))


def zigzag(processes: int) -> tuple[tuple[int, ...], ...]:
    return tuple((rank, 2 * processes - 1 - rank) for rank in range(processes))


def balanced(work: Sequence[float], processes: int) -> tuple[tuple[int, ...], ...]:
    """Segments dealt to the process with the least work that has room, the heaviest first (Graham
    1969)."""
    room = len(work) // processes
    load = [0.0] * processes
    places: list[list[int]] = [[] for _ in range(processes)]
    for segment in sorted(range(len(work)), key=lambda s: (-work[s], s)):
        rank = min(
            (r for r in range(processes) if len(places[r]) < room),
            key=lambda r: (load[r], r),
        )
        places[rank].append(segment)
        load[rank] += work[segment]
    return tuple(tuple(sorted(place)) for place in places)


def keys_seen(positions_BT: Tensor) -> Tensor:
    """Keys that each query sees: what softmax attention's work is counted in. (A window is left
    out: it makes work even by itself.)"""
    return positions_BT + 1


@dataclass(frozen=True)
class ContextShard:
    """What a process knows of sequences of which it holds some segments.

    row_ids_BP: the documents of the whole sequences, padding included, which is one more document.
    flows: whether each sequence is one document.
    """

    layout: SequenceLayout
    rank: int
    row_ids_BP: Tensor
    flows: bool

    @classmethod
    def of_rows(
        cls,
        layout: SequenceLayout,
        rank: int,
        documents: Documents | None,
        rows: int,
    ) -> "ContextShard":
        """documents: of the whole sequences (B, T); None where each is one document."""
        if documents is None:
            row_ids_BP = torch.zeros(rows, layout.padded_tokens, dtype=torch.int64)
        else:
            ids_BT = documents.ids_BT
            last_B1 = ids_BT[:, -1:] + 1
            row_ids_BP = torch.cat(
                [ids_BT, last_B1.expand(-1, layout.padded_tokens - layout.tokens)],
                1,
            )
        return cls(layout, rank, row_ids_BP, flows=documents is None)

    def to(self, device: torch.device | str) -> "ContextShard":
        return replace(self, row_ids_BP=copy_to(self.row_ids_BP, device))

    def of(self, rows: slice | Tensor) -> "ContextShard":
        return replace(self, row_ids_BP=self.row_ids_BP[rows])

    @property
    def mine(self) -> tuple[int, ...]:
        """The segments here."""
        return self.layout.places[self.rank]

    def documents(self) -> Documents | None:
        """Documents of the tokens here (B, its tokens), where what a segment has of a document is a
        document of its own; None where they flow on. Waits for the device once."""
        if self.flows:
            return None
        ids_BT = self.layout.cut(self.row_ids_BP, self.rank)
        number_T = torch.arange(len(self.mine), device=ids_BT.device)
        number_T = number_T.repeat_interleave(self.layout.length)
        return Documents.from_ids(ids_BT * len(self.mine) + number_T)

    def fold_documents(self, documents: Documents | None) -> Documents | None:
        """Those of the tokens here as those of segments, each a sequence of its own."""
        if documents is None:
            return None
        ids = self.fold(documents.ids_BT)
        return replace(documents, ids_BT=ids)

    @cached_property
    def starts(self) -> list[list[int]]:
        """Where the documents of each whole sequence begin, in its order; where they flow on, one
        sequence stands for all. Waits for the device once."""
        if self.flows:
            return [[0]]
        return starts_of(self.row_ids_BP)

    @cached_property
    def pieces(self) -> dict[tuple[int, Manner], list[Piece]]:
        """Where the queries here see the keys of a process, by process and manner: many layers ask
        the same."""
        return {}

    @cached_property
    def hops(self) -> dict[int | None, int]:
        """How far keys travel from process to process, by window."""
        return {}

    @cached_property
    def whole(self) -> Documents | None:
        """The documents of the whole sequences, without padding; None where they flow on."""
        if self.flows:
            return None
        return Documents.from_ids(self.row_ids_BP[:, : self.layout.tokens])

    def fold(self, x_BT: Tensor) -> Tensor:
        """(B, each * length, ...) -> (B * each, length, ...): a segment is a sequence."""
        return x_BT.unflatten(1, (-1, self.layout.length)).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return x.unflatten(0, (-1, len(self.mine))).flatten(1, 2)

    def continues(self, before: int, segment: int) -> Tensor:
        """(B,) bool: whether the token so many places before a segment belongs to the document of
        the segment's first one."""
        first = segment * self.layout.length
        return self.row_ids_BP[:, first] == self.row_ids_BP[:, first - before]

    def lengths(self) -> Tensor:
        """(B, its tokens): tokens of the whole document of each; of a sequence that flows on, the
        sequence's."""
        if self.flows:
            return self.row_ids_BP.new_full(
                (len(self.row_ids_BP), len(self.mine) * self.layout.length),
                self.layout.tokens,
            )
        whole = Documents.from_ids(self.row_ids_BP).lengths()
        return self.layout.cut(whole, self.rank)
