"""What cuts batches of sequences that several processes share, as models and batches see it."""

from typing import Protocol

from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.sequence_ops import SequenceOps


class SequenceSharding(Protocol):
    """Processes that share sequences (parallel/context.Context): what makes their SequenceOps."""

    def share(
        self, positions_BT: Tensor, documents: Documents | None
    ) -> tuple[SequenceOps, Documents | None]:
        """For whole sequences (B, T): the operations on what of them is in this process, and the
        documents of that."""
        ...

    def describe(self) -> dict[str, float]:
        """Of the last batch, for a step's record."""
        ...
