"""What crosses between processes inside a forward and its backward: operators that autograd,
recomputation and torch.compile know.

A tensor crosses twice, in the forward as it is, in the backward as its gradient; `communicate`
takes both ways:

    "same"     as it is: the backward of "sum", where every process has the whole gradient
    "sum"      added up over processes: the backward of "same", where each has a part of the
               gradient
    "gather"   tokens joined: (B, T / n, ...) -> (B, T, ...)
    "scatter"  added up, own tokens: (B, T, ...) -> (B, T / n, ...)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

TOKENS_DIM = 1
_groups: dict[
    str, dist.ProcessGroup
] = {}  # operators take tensors, numbers and words: a group goes by its name


def known_as(group: dist.ProcessGroup) -> str:
    """The name that stands for the group from now on."""
    _groups[group.group_name] = group
    return group.group_name


def group_known_as(name: str) -> dist.ProcessGroup:
    """The group that a name stands for."""
    return _groups[name]


@torch.library.custom_op("longfire::summed", mutates_args=())
def summed(x: Tensor, group: str) -> Tensor:
    """x added up over the group."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


@summed.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def tokens_second(x: Tensor) -> Tensor:
    """(T, B, ...) -> (B, T, ...), contiguous to the letter, as the compiler expects: `view` puts
    right the stride of B = 1."""
    x = x.movedim(0, TOKENS_DIM).contiguous()
    return x.view(x.shape)


@torch.library.custom_op("longfire::gathered", mutates_args=())
def gathered(x: Tensor, group: str) -> Tensor:
    """The tokens of all processes side by side."""
    mine = x.movedim(TOKENS_DIM, 0).contiguous()
    whole = mine.new_empty(len(mine) * _groups[group].size(), *mine.shape[1:])
    dist.all_gather_single(whole, mine, group=_groups[group])
    return tokens_second(whole)


@gathered.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * _groups[group].size(), *x.shape[2:])


@torch.library.custom_op("longfire::scattered", mutates_args=())
def scattered(x: Tensor, group: str) -> Tensor:
    """This process's tokens of the sum over all."""
    parts = x.movedim(TOKENS_DIM, 0).contiguous()
    assert len(parts) % _groups[group].size() == 0, (
        "tokens of a row divide the processes that share it"
    )
    mine = parts.new_empty(len(parts) // _groups[group].size(), *parts.shape[1:])
    dist.reduce_scatter_single(mine, parts, group=_groups[group])
    return tokens_second(mine)


@scattered.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // _groups[group].size(), *x.shape[2:])


@torch.library.custom_op("longfire::highest", mutates_args=())
def highest(x: Tensor, group: str) -> Tensor:
    """The highest of the group's x, element by element; without gradients."""
    most = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=_groups[group])
    return most


@highest.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def add_up(x: Tensor, group: str) -> Tensor:
    """x, added up in place over the group; without gradients."""
    dist.all_reduce(x, group=_groups[group])
    return x


def take_highest(x: Tensor, group: str) -> Tensor:
    """x, the highest of the group's in its place."""
    dist.all_reduce(x, dist.ReduceOp.MAX, group=_groups[group])
    return x


def unchanged(x: Tensor, group: str) -> Tensor:
    """x as it is, as another tensor for autograd."""
    return x.view_as(x)


WAYS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "same": unchanged,
    "sum": summed,
    "gather": gathered,
    "scatter": scattered,
}


class CollectivePair(NamedTuple):
    """How a tensor crosses, how its gradient comes back, and between whom."""

    there: str
    back: str
    group: str


def communicate(
    x: Tensor,
    there: str,
    back: str,
    group: str,
) -> Tensor:
    """x on its way, and its gradient on the way back."""
    return _Communicate.apply(x, there, back, group)


class CommunicateContext(FunctionCtx):
    """What the forward of _Communicate leaves for its backward."""

    back: str
    group: str


class _Communicate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: CommunicateContext,
        x: Tensor,
        there: str,
        back: str,
        group: str,
    ) -> Tensor:
        ctx.back = back
        ctx.group = group
        return WAYS[there](x, group)

    @staticmethod
    def backward(ctx: CommunicateContext, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return WAYS[ctx.back](d_y, ctx.group), None, None, None
