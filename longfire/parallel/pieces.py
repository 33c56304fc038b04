"""Which part of each parameter this process holds: boxes of the whole tensor, and where they lie in
the local one.

Tensor parallelism splits a dim into ranges; sharding cuts what is left into rows. Initialisation,
checkpoints and gathering read boxes only, so they know nothing of either.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


class Split(NamedTuple):
    """What tensor parallelism left of a parameter: ranges of one dim, side by side."""

    dim: int
    size: int  # of the whole dim
    ranges: tuple[tuple[int, int], ...]  # begin, end


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor and where it begins in the local one."""

    begin: tuple[int, ...]
    size: tuple[int, ...]
    local: tuple[int, ...]

    def of_whole(self, tensor: Tensor) -> Tensor:
        """A view of the box in the whole tensor."""
        return cut(tensor, self.begin, self.size)

    def of_local(self, tensor: Tensor) -> Tensor:
        """A view of the box in the local tensor."""
        return cut(tensor, self.local, self.size)


def cut(tensor: Tensor, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    for dim, (first, length) in enumerate(zip(begin, size)):
        tensor = tensor.narrow(dim, first, length)
    return tensor


def local(tensor: Tensor) -> Tensor:
    """The part on this process, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Tensor, split: Split | None) -> torch.Size:
    """The shape of the parameter before anything was split. Of a sharded one, `tensor.shape` is
    that of all its shards."""
    shape = list(tensor.shape)
    if split is not None:
        shape[split.dim] = split.size
    return torch.Size(shape)


def boxes(tensor: Tensor, split: Split | None) -> list[Box]:
    """What of the whole is on this process; none where the rows did not go round."""
    shape = tuple(tensor.shape)
    first, last = rows(tensor)
    ranges = split.ranges if split is not None else (((0, shape[0]),) if shape else ())
    dim = split.dim if split is not None else 0
    if not shape:
        return [Box((), (), ())]
    found, passed = [], 0
    for begin, end in ranges:
        size, at, where = list(shape), [0] * len(shape), [0] * len(shape)
        at[dim], size[dim], where[dim] = begin, end - begin, passed
        if dim == 0:  # rows of this range that are ours
            low, high = max(first, passed), min(last, passed + end - begin)
            at[0], size[0], where[0] = begin + low - passed, high - low, low - first
        else:
            at[0], size[0], where[0] = first, last - first, 0
        passed += end - begin
        if size[0] > 0 and prod(size):
            found.append(Box(tuple(at), tuple(size), tuple(where)))
    return found


def take(tensor: Tensor, split: Split | None, whole: Tensor) -> None:
    """Copy what of the whole is on this process."""
    for box in boxes(tensor, split):
        box.of_local(local(tensor)).copy_(box.of_whole(whole))


def rows(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 of the rows (dim 0) on this process, as torch's `chunk` cuts them over the
    axis that shards them."""
    if not tensor.dim():
        return 0, 0
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    first, last = 0, len(tensor)
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "parameters are sharded by rows"
            each = -(-len(tensor) // tensor.device_mesh.size(axis))
            first = min(each * tensor.device_mesh.get_local_rank(axis), len(tensor))
            last = min(first + each, len(tensor))
    return first, last
