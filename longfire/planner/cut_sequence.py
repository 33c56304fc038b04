"""A planner's operations along sequences of which a process has a piece."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.maps import recurrence_of
from longfire.ops.maps.contract import Affine
from longfire.ops.recurrence import RecurrenceOp
from longfire.ops.sequence_ops import LocalSequence


@dataclass(frozen=True)
class CutSequence(LocalSequence):
    """As parallel/context.ContextSequence computes a piece, without the other processes: a
    recurrence makes the map of its piece beside its outputs.

    What is sent, and held for that, is counted by parallel/strategy.exchanges.
    """

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        recurrence = recurrence_of(op)
        options.pop(recurrence.state, None)
        y = recurrence.on_segments(state_before, *inputs, documents=documents, **options)
        return y, y.new_empty(0)


def state_before(mine: Affine) -> Tensor:
    """The state before a piece, of the shape that its map has."""
    return _StateBefore.apply(mine.transition, mine.write)


class _StateBefore(torch.autograd.Function):
    """The place of parallel/context_exchange._StatesBefore."""

    @staticmethod
    def forward(ctx: Any, transition: Tensor, write: Tensor) -> Tensor:
        ctx.sizes = transition.shape, write.shape
        return torch.empty_like(write)

    @staticmethod
    def backward(ctx: Any, d_before: Tensor) -> tuple[Tensor, ...]:
        return tuple(d_before.new_empty(size) for size in ctx.sizes)
