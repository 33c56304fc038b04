"""A part of a model, run forward and backward on fake tensors, and the bytes that it holds after
each operation.

A part is the embedding, a kind of block, or the head with the loss.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from longfire.planner.live_bytes import LiveBytes

MASTER_BYTES = 4  # of a parameter and of its gradient
EMBED = "embedding"
HEAD = "head and loss"
Entering = tuple[tuple[int, ...], torch.dtype]  # shape and type of what a part is given


@dataclass(frozen=True)
class Part:
    """The bytes of one part above what was held before it, for so many sequences.

    forward, backward: after each operation; what enters is counted, and so are the parameters'
    gradients. further: the backward of a micro-batch whose gradients are added to those of an
    earlier one, which are held before it. kept: from forward to backward, without what the next
    part is given. passed: that. on_host: of each tensor that is kept in the host's memory.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    further: tuple[int, ...]
    kept: int
    passed: int
    operations: tuple[str, ...] = ()  # of the forward
    on_host: tuple[int, ...] = ()

    @cached_property
    def kept_on_host(self) -> int:
        """What is copied to the host in a forward, and back in its backward."""
        return sum(self.on_host)

    @cached_property
    def pinned_on_host(self) -> int:
        """The memory of the host that this takes."""
        return sum(pinned_bytes(size) for size in self.on_host)

    @cached_property
    def forward_peak(self) -> int:
        """The fullest instant of the forward."""
        return max(self.forward)

    def backward_peak(self, further: bool) -> int:
        """The fullest instant of the backward. further: of a micro-batch that is not the first."""
        return self.peaks[further]

    @cached_property
    def peaks(self) -> tuple[int, int]:
        """Of the first micro-batch's backward, and of a further one's."""
        return max(self.backward), max(self.further)

    @classmethod
    def of_sequences(
        cls,
        one: "Part",
        two: "Part",
        count: float,
    ) -> "Part":
        """The part for any number of sequences, from one and two of them (or for any length, from
        a length and twice it): each instant is a straight line, though their maximum is not."""
        same = (
            alike(one.operations, two.operations),
            alike(one.operations[::-1], two.operations[::-1]),
        )
        return cls(
            peak_on_lines(one.forward, two.forward, same, count),
            peak_on_lines(one.backward, two.backward, (0, 0), count),
            peak_on_lines(one.further, two.further, (0, 0), count),
            on_line(one.kept, two.kept, count),
            on_line(one.passed, two.passed, count),
            on_host=each_on_line(one.on_host, two.on_host, count),
        )


def on_line(one: int, two: int, count: float) -> int:
    """The value at `count` of the straight line through those at 1 and 2."""
    return round(one + (two - one) * (count - 1))


def each_on_line(one: tuple[int, ...], two: tuple[int, ...], count: float) -> tuple[int, ...]:
    """The same for several values, which are as many at 1 as at 2; else their sum."""
    if len(one) != len(two):
        return (on_line(sum(one), sum(two), count),)
    return tuple(on_line(first, second, count) for first, second in zip(one, two))


def pinned_bytes(size: int) -> int:
    """What torch pins for a tensor of so many bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def peak_on_lines(
    one: tuple[int, ...],
    two: tuple[int, ...],
    same: tuple[int, int],
    count: float,
) -> tuple[int, ...]:
    """The fullest instant at `count`, as the only one.

    Where the number of operations grows (the chunks of the loss), instants are paired from the
    front and from the back as long as they are the same operations; of those between, the maximum
    is all that is known. same: how many are paired at the front and at the back.
    """
    if len(one) == len(two):
        pairs = list(zip(one, two))
    else:
        front, back = same
        pairs = list(zip(one[:front], two[:front]))
        pairs += zip(one[len(one) - back :], two[len(two) - back :])
        pairs.append((max(one), max(two)))
    return (max(on_line(first, second, count) for first, second in pairs),)


def alike(some: Sequence[str], others: Sequence[str]) -> int:
    """How many at the front are the same."""
    count = 0
    for one, other in zip(some, others):
        if one != other:
            break
        count += 1
    return count


class Entry(torch.autograd.Function):
    """What a part is given by the one before: a tensor that nobody else holds."""

    @staticmethod
    def forward(
        ctx: object,
        leaf: Tensor,
        size: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        return leaf.new_empty(size, dtype=dtype)

    @staticmethod
    def backward(ctx: object, d_x: Tensor) -> tuple[Tensor | None, ...]:
        return d_x.new_empty(()), None, None


class ExitContext(Protocol):
    """What the forward of Exit leaves for its backward."""

    size: torch.Size
    dtype: torch.dtype


class Exit(torch.autograd.Function):
    """What comes after a part: takes its output, and gives back a gradient that nobody else
    holds."""

    @staticmethod
    def forward(ctx: ExitContext, y: Tensor) -> Tensor:
        ctx.size = y.shape
        ctx.dtype = y.dtype
        return y.new_empty(())

    @staticmethod
    def backward(ctx: ExitContext, d_loss: Tensor) -> Tensor:
        return d_loss.new_empty(ctx.size, dtype=ctx.dtype)


def traced(
    forward: Callable[[list[Tensor]], Tensor],
    enters: Entering | None,
    module: nn.Module,
    existing: object,
    with_gradient: Iterable[Tensor] = (),
) -> Part:
    """Run a part on fake tensors. `forward` gets what enters, if anything does, in a list that it
    may empty.

    existing: tensors that are no part's. with_gradient: parameters that another part has given
    their gradients already.
    """
    leaf = torch.zeros((), requires_grad=True)
    others_gradients: list[Tensor] = []
    earlier = list(with_gradient)
    give_gradients(module, set(earlier))
    for parameter in earlier:
        assert parameter.grad is not None
        others_gradients.append(parameter.grad)
    live = LiveBytes(leaf, existing, others_gradients, owners=module.parameters())
    before = live.now
    with live:
        box = [Entry.apply(leaf, *enters)] if enters else []
        y = forward(box)
        del box
        passed = y.untyped_storage().nbytes() if y.dim() else 0
        kept = live.now - before - passed
        on_host = live.host_tensors
        operations = len(live.instants)
        loss = Exit.apply(y) if y.dim() else y
        del y
        loss.backward()
    theirs = sum(gradient.nbytes for gradient in others_gradients)
    all_bytes = tuple(now - before for now, _ in live.instants)
    further = tuple(now - before - (gradients - theirs) for now, gradients in live.instants)
    return Part(
        forward=all_bytes[:operations],
        backward=all_bytes[operations:],
        further=further[operations:],
        kept=kept,
        passed=passed,
        operations=tuple(live.operations[:operations]),
        on_host=on_host,
    )


def give_gradients(module: nn.Module, parameters: set[Tensor]) -> None:
    """These of the module's parameters have gradients, the others have none."""
    for parameter in module.parameters():
        parameter.grad = None
        if parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
