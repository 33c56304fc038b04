"""The rows of a tensor that are on this process: FSDP2 makes a parameter a DTensor, sharded by rows
(dim 0). (parallel/sharding.py knows what tensor parallelism cuts, too.)"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """The part on this process, sharing its memory."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 of the rows (dim 0) on this process, as torch's `chunk` cuts them over the
    axis that shards them."""
    if not tensor.dim():
        return 0, 0
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    first = 0
    last = len(tensor)
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "parameters are sharded by rows"
            each = -(-len(tensor) // tensor.device_mesh.size(axis))
            first = min(each * tensor.device_mesh.get_local_rank(axis), len(tensor))
            last = min(first + each, len(tensor))
    return first, last


def sums_over_shards(parameters: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """For each parameter the sum of a vector over all processes that hold rows of it, on every one
    of them.

    parts: the vectors of this process, fp32 or wider. Collective over these processes: one
    all-reduce for all parameters of one mesh.
    """
    of_mesh: dict[DeviceMesh, list[int]] = {}
    for index, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            of_mesh.setdefault(parameter.device_mesh, []).append(index)
    sums = list(parts)
    for mesh, indices in of_mesh.items():
        first = parameters[indices[0]]
        assert isinstance(first, DTensor), "only these have a mesh"
        device = parts[indices[0]].device  # the host's, where parameters are offloaded
        joined = torch.cat([parts[index] for index in indices]).to(mesh.device_type)
        for axis, placement in enumerate(first.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(joined, group=mesh.get_group(axis))
        sizes = [len(parts[index]) for index in indices]
        for index, total in zip(indices, joined.to(device).split(sizes)):
            sums[index] = total
    return sums
