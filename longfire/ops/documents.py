"""Where documents lie in a batch of packed sequences: made once a batch, read by every op."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longfire.ops.device_copy import copy_to


@dataclass(frozen=True)
class Documents:
    """Documents of B packed sequences of T tokens. A document never crosses a sequence; ids grow
    along it.

    ids_BT:      int64, the document of each token; tokens with equal ids are neighbours
    cu_lengths:  int32 (documents + 1,), cumulative lengths over the sequences laid end to end: what
    varlen kernels take
    max_length:  longest document, in tokens
    cu_lengths_cpu: int64, the same lengths on the CPU, for what the host decides by them: on CUDA
    it would wait for the device in every layer
    cu_lengths_int64: the same on the device; fla's kernels keep tables by this tensor's identity
    """

    ids_BT: Tensor
    cu_lengths: Tensor
    max_length: int
    cu_lengths_cpu: Tensor
    cu_lengths_int64: Tensor

    def __post_init__(self) -> None:
        """A compiled block takes any number of documents: its graph is not made anew."""
        if self.cu_lengths.is_cuda:
            for lengths in (self.cu_lengths, self.cu_lengths_cpu, self.cu_lengths_int64):
                torch._dynamo.maybe_mark_dynamic(lengths, 0)

    def to(self, device: torch.device | str) -> "Documents":
        ids_BT, lengths = copy_to(self.ids_BT, device), copy_to(self.cu_lengths, device)
        int64 = copy_to(self.cu_lengths_cpu, device)
        return replace(self, ids_BT=ids_BT, cu_lengths=lengths, cu_lengths_int64=int64)

    def of(self, numbers: Any) -> "Documents":
        """Those of some sequences: a slice, or their numbers."""
        return Documents.from_ids(self.ids_BT[numbers])

    def lengths(self) -> Tensor:
        """(B, T): tokens of the document of each token."""
        lengths_N = self.cu_lengths.diff().long()
        return lengths_N.repeat_interleave(lengths_N).view_as(self.ids_BT)

    @classmethod
    def from_ids(cls, ids_BT: Tensor) -> "Documents":
        """Documents from their ids alone; waits for the device."""
        starts_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        starts = starts_BT.flatten().nonzero().flatten().cpu()
        cu_lengths_cpu = torch.cat([starts, starts.new_tensor([ids_BT.numel()])])
        cu_lengths = cu_lengths_cpu.int().to(ids_BT.device)
        longest = int(cu_lengths_cpu.diff().max())
        return cls(ids_BT, cu_lengths, longest, cu_lengths_cpu, cu_lengths_cpu.to(ids_BT.device))


def continues(documents: Documents | None) -> Tensor | None:
    """(B, T) bool: whether a token belongs to the document of the token before it. The first token
    of the call always does, so that the initial state belongs to the first document of each
    sequence."""
    if documents is None:
        return None
    return documents.ids_BT.diff(dim=1, prepend=documents.ids_BT[:, :1]) == 0
