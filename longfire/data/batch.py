"""A batch: sequences of one length as tensors."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longfire.data.pack import NO_LABEL, Packed
from longfire.ops.device_copy import copy_to
from longfire.ops.documents import Documents
from longfire.ops.sequence_ops import UNDECIDED, SequenceOps
from longfire.ops.sequence_sharding import SequenceSharding


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens on one device.

    ids_BT: int64. labels_BT: int64, the next token, -100 where nothing is to be learned.
    positions_BT: int64, in the document, or in the sequence where documents are not separated.
    documents: None where documents are not separated. pieces: how many of the sequences are one
    sequence of the run's count (training.seq_len_schedule). ops: what computes along the sequences
    that several processes share (`context_part`); where they are complete the model has its own.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    documents: Documents | None = None
    pieces: int = 1
    ops: SequenceOps = UNDECIDED

    @property
    def sequences(self) -> int:
        """B, the number of sequences."""
        return self.ids_BT.shape[0]

    @property
    def tokens(self) -> int:
        """T, the tokens of each sequence."""
        return self.ids_BT.shape[1]

    def real_tokens(self) -> int:
        """Labels to be learned; waits for the device."""
        return int((self.labels_BT != NO_LABEL).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on a device."""
        return Batch(
            ids_BT=copy_to(self.ids_BT, device),
            labels_BT=copy_to(self.labels_BT, device),
            positions_BT=copy_to(self.positions_BT, device),
            documents=None if self.documents is None else self.documents.to(device),
            pieces=self.pieces,
            ops=self.ops.to(device),
        )

    def split(self, microbatches: int) -> tuple["Batch", ...]:
        """The same sequences in `microbatches` equal parts, in order."""
        assert self.sequences % microbatches == 0, (
            f"{self.sequences} sequences do not divide into {microbatches} micro-batches"
        )
        if microbatches == 1:
            return (self,)
        size = self.sequences // microbatches
        return tuple(
            self.select(slice(first, first + size)) for first in range(0, self.sequences, size)
        )

    def select(self, numbers: slice | Tensor) -> "Batch":
        """Some of the sequences: a slice, or their numbers."""
        return Batch(
            ids_BT=self.ids_BT[numbers],
            labels_BT=self.labels_BT[numbers],
            positions_BT=self.positions_BT[numbers],
            documents=None if self.documents is None else self.documents.of(numbers),
            pieces=self.pieces,
            ops=self.ops.of(numbers),
        )

    def context_part(self, context: SequenceSharding) -> "Batch":
        """This process's part of sequences that several processes share (parallel/context.Context).

        Labels, positions and documents were made of complete sequences. Padding has no label.
        """
        ops, documents = context.share(self.positions_BT, self.documents)
        return Batch(
            ids_BT=ops.cut(self.ids_BT),
            labels_BT=ops.cut(self.labels_BT, NO_LABEL),
            positions_BT=ops.cut(self.positions_BT),
            documents=documents,
            pieces=self.pieces,
            ops=ops,
        )

    def process_part(self, number: int, parts: int) -> "Batch":
        """Part `number` of `parts` parts of the same size. The last ones are padded with sequences
        without labels, so that all processes compute equally many."""
        if parts == 1:
            return self
        size = -(-self.sequences // parts)
        numbers_B = torch.arange(number * size, (number + 1) * size)
        exists_B = numbers_B < self.sequences
        part = self.select(torch.where(exists_B, numbers_B, 0))
        labels_BT = torch.where(exists_B[:, None], part.labels_BT, NO_LABEL)
        return replace(part, labels_BT=labels_BT)


def batch_of(packed: Packed) -> Batch:
    """The tensors of packed sequences."""
    return Batch(
        ids_BT=torch.from_numpy(packed.ids_BT),
        labels_BT=torch.from_numpy(packed.labels_BT),
        positions_BT=torch.from_numpy(packed.positions_BT),
        documents=None if packed.starts_BT is None else documents_of(packed.starts_BT),
    )


def documents_of(starts_BT: np.ndarray) -> Documents:
    """The documents of sequences, where the first token of each is marked."""
    ends = np.append(np.flatnonzero(starts_BT), starts_BT.size)
    cu_lengths = ends.astype(np.int32)
    document_ids_BT = np.cumsum(starts_BT, axis=1) - 1
    lengths_cpu = torch.from_numpy(ends)
    return Documents(
        torch.from_numpy(document_ids_BT),
        torch.from_numpy(cu_lengths),
        int(np.diff(cu_lengths).max()),
        lengths_cpu,
        lengths_cpu,
    )
