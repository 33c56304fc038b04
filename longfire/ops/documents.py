"""Where documents lie in a batch of packed sequences: made once a batch, read by every op."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Documents of B packed sequences of T tokens. A document never crosses a sequence; ids grow
    along it.

    ids_BT:      int64, the document of each token; tokens with equal ids are neighbours
    cu_lengths:  int32 (documents + 1,), cumulative lengths over the sequences laid end to end: what
    varlen kernels take
    max_length:  longest document, in tokens
    """

    ids_BT: Tensor
    cu_lengths: Tensor
    max_length: int

    def to(self, device: torch.device | str) -> "Documents":
        return Documents(self.ids_BT.to(device), self.cu_lengths.to(device), self.max_length)

    def of(self, numbers: Any) -> "Documents":
        """Those of some sequences: a slice, or their numbers."""
        return Documents.from_ids(self.ids_BT[numbers])

    def lengths(self) -> Tensor:
        """(B, T): tokens of the document of each token."""
        lengths_N = self.cu_lengths.diff().long()
        return lengths_N.repeat_interleave(lengths_N).view_as(self.ids_BT)

    @classmethod
    def from_ids(cls, ids_BT: Tensor) -> "Documents":
        """Documents from their ids alone; waits for the device once."""
        starts_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        starts = starts_BT.flatten().nonzero().flatten()
        cu_lengths = torch.cat([starts, starts.new_tensor([ids_BT.numel()])]).int()
        return cls(ids_BT, cu_lengths, int(cu_lengths.diff().max()))


def starts_of(ids_BT: Tensor) -> list[list[int]]:
    """Where the documents of each sequence begin, in its order; waits for the device once."""
    ids_BT = ids_BT.cpu()
    begins_BT = F.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0), value=True)
    return [begins_T.nonzero().flatten().tolist() for begins_T in begins_BT]


def continues(documents: Documents | None) -> Tensor | None:
    """(B, T) bool: whether a token belongs to the document of the token before it. The first token
    of the call always does, so that the initial state belongs to the first document of each
    sequence."""
    if documents is None:
        return None
    return documents.ids_BT.diff(dim=1, prepend=documents.ids_BT[:, :1]) == 0
