"""What the training step asks of a batch, whatever its records are."""

from typing import Protocol, Self

import torch


class StepBatch(Protocol):
    """B records of one step. Of text it is a data.batch.Batch."""

    @property
    def sequences(self) -> int:
        """B, the number of records."""
        ...

    @property
    def tokens(self) -> int:
        """T, the tokens of the model that each record has."""
        ...

    @property
    def pieces(self) -> int:
        """How many of the records are one record of the run's count."""
        ...

    def real_tokens(self) -> int:
        """Labels to be learned, which the loss is a mean over; waits for the device."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device."""
        ...

    def split(self, microbatches: int) -> tuple[Self, ...]:
        """The same records in `microbatches` equal parts, in order."""
        ...
