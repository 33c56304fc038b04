"""Where a parameter is: what tensor parallelism left of it here, and which slices of the whole
tensor the local one holds.

    sharding_of(model, "layers.0.mlp.up_proj.weight")    its ShardSpec
    placed_parameters(model)                             name, parameter and ShardSpec of all
    slices_of(parameter, spec)                           slices of the whole tensor, and where they
                                                         lie in the local one

Two things shard a parameter. FSDP2 makes it a DTensor, sharded by rows (dim 0), which the tensor
says itself. Tensor parallelism leaves ranges of one dim in a plain tensor, and pipeline parallelism
may leave a second copy of a tied matrix: a `ShardSpec` says both. The module that owns the
parameter keeps it, because torch replaces the parameter's object (`fully_shard`, each gathering of
FSDP2, `to_empty`, `deepcopy`) and never its owner; an attribute of the parameter would be lost in
all four. docs/design.md, section 6, says why these parameters are no DTensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longfire.row_shards import local, local_rows

OWNED = "shard_specs"  # attribute of a module: leaf -> ShardSpec of the parameters that it owns


@dataclass(frozen=True)
class DimSplit:
    """What tensor parallelism left of a parameter: ranges of one dim, side by side.

    A matrix that makes two things, as [gate, up], has two ranges. size: of the whole dim.
    """

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]  # begin, end


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is placed on this process, beside what its DTensor says.

    split: of one dim, by tensor parallelism; None: the dim is whole. gradient_is_partial: the
    gradient of a step is the sum over tp of what each process has. is_copy: another process of the
    pipeline owns the parameter, and this copy has the same numbers.
    """

    split: DimSplit | None = None
    gradient_is_partial: bool = False
    is_copy: bool = False


WHOLE = ShardSpec()


def sharding_of(model: nn.Module, name: str) -> ShardSpec:
    """The spec of a parameter, by its name in the model."""
    path, _, leaf = name.rpartition(".")
    return owned_specs(model.get_submodule(path)).get(leaf, WHOLE)


def owned_specs(owner: nn.Module) -> dict[str, ShardSpec]:
    """What a module says of the parameters that it owns, by their names in it."""
    return vars(owner).get(OWNED, {})


class PlacedParameter(NamedTuple):
    """A parameter and where it is."""

    name: str
    parameter: nn.Parameter
    spec: ShardSpec


def placed_parameters(model: nn.Module) -> Iterator[PlacedParameter]:
    """Those of `model.named_parameters()`, in that order, each with its spec."""
    seen: set[nn.Parameter] = set()
    for path, owner in model.named_modules():
        specs = owned_specs(owner)
        prefix = f"{path}." if path else ""
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield PlacedParameter(prefix + leaf, parameter, specs.get(leaf, WHOLE))


def set_sharding(model: nn.Module, name: str, spec: ShardSpec) -> None:
    """Let the module that owns the parameter say this of it from now on."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    assert leaf in owner._parameters, f"{name} is no parameter"
    setattr(owner, OWNED, {**owned_specs(owner), leaf: spec})


def keep_specs(old: nn.Module, new: nn.Module) -> None:
    """Let a module that stands for another one, with its parameters, say the same of them."""
    setattr(new, OWNED, owned_specs(old))


@dataclass(frozen=True)
class TensorSlice:
    """A slice of the whole tensor and where it begins in the local one, a number for each dim."""

    begin: tuple[int, ...]
    size: tuple[int, ...]
    local: tuple[int, ...]

    def of_whole(self, tensor: Tensor) -> Tensor:
        """A view of the slice in the whole tensor."""
        return narrowed(tensor, self.begin, self.size)

    def of_local(self, tensor: Tensor) -> Tensor:
        """A view of the slice in the local tensor."""
        return narrowed(tensor, self.local, self.size)


def narrowed(
    tensor: Tensor,
    begin: tuple[int, ...],
    size: tuple[int, ...],
) -> Tensor:
    """A view of `size` numbers from `begin` on, along each dim."""
    for dim, (first, length) in enumerate(zip(begin, size)):
        tensor = tensor.narrow(dim, first, length)
    return tensor


def global_shape(tensor: Tensor, spec: ShardSpec) -> torch.Size:
    """The shape of the parameter before anything was split. (Of a DTensor, `tensor.shape` is that
    of all its shards.)"""
    shape = list(tensor.shape)
    if spec.split is not None:
        shape[spec.split.dim] = spec.split.size
    return torch.Size(shape)


def slices_of(tensor: Tensor, spec: ShardSpec) -> list[TensorSlice]:
    """The slices of the whole tensor on this process; none where there were too few rows for all
    processes."""
    shape = tuple(tensor.shape)
    if not shape:
        return [TensorSlice((), (), ())]
    split = spec.split or DimSplit(0, shape[0], ((0, shape[0]),))
    first, last = local_rows(tensor)
    found = []
    passed = 0  # numbers of the split dim in the ranges before
    for begin, end in split.ranges:
        start = [0] * len(shape)
        size = list(shape)
        where = [0] * len(shape)
        start[split.dim] = begin
        size[split.dim] = end - begin
        where[split.dim] = passed
        if split.dim == 0:  # rows of this range that are ours
            low = max(first, passed)
            high = min(last, passed + end - begin)
            start[0] = begin + low - passed
            size[0] = high - low
            where[0] = low - first
        else:
            start[0] = first
            size[0] = last - first
        passed += end - begin
        if all(length > 0 for length in size):
            found.append(TensorSlice(tuple(start), tuple(size), tuple(where)))
    return found


def copy_from_whole(
    tensor: Tensor,
    spec: ShardSpec,
    whole: Tensor,
) -> None:
    """Copy the slices of the whole tensor on this process."""
    for part in slices_of(tensor, spec):
        part.of_local(local(tensor)).copy_(part.of_whole(whole))
