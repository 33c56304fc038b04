"""The processes of a run as a box with named axes: who is rank what, and sums over some of the axes.

Innermost comes first in `AXES` reversed: neighbours on a machine share tensors (tp), then rows (cp), shards, replicas, layers (pp).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DATA = ("dp_replicate", "dp_shard")  # axes along which rows differ


@dataclass(frozen=True)
class Mesh:
    """degrees: processes along each axis. Without a device mesh (one process) every sum is what it is given."""

    degrees: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    device_mesh: DeviceMesh | None = None

    @classmethod
    def of_degrees(cls, degrees: Mapping[str, int], device_type: str) -> "Mesh":
        """The mesh of all processes that have joined (launch.joined). Collective."""
        degrees = {axis: degrees.get(axis, 1) for axis in AXES}
        if prod(degrees.values()) == 1 and not dist.is_initialized():
            return cls(degrees)
        return cls(degrees, init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=AXES))

    def size(self, *axes: str) -> int:
        """Processes along these axes together; of all without a name."""
        return prod(self.degrees[axis] for axis in axes or AXES)

    def rank(self, *axes: str) -> int:
        """This process's number among them, the last axis counting fastest."""
        number = 0
        for axis in axes or AXES:
            here = 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)
            number = number * self.degrees[axis] + here
        return number

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one along this axis only."""
        return self.device_mesh.get_group(axis)

    def sum(self, tensor: Tensor, *axes: str) -> Tensor:
        """The tensor, added up in place over the processes along these axes. Collective over them."""
        for axis in axes:
            if self.degrees[axis] > 1:
                dist.all_reduce(tensor, group=self.group(axis))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process of the run says so. Collective over all."""
        return bool(self.sum(torch.tensor(int(flag)), *AXES))

    def from_first(self, value: Any) -> Any:
        """What process 0 says (a small Python object). Collective over all."""
        if self.size() == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said)
        return said[0]

    def all_say(self, value: Any) -> list[Any]:
        """What every process says, by rank (small Python objects). Collective over all."""
        if self.size() == 1:
            return [value]
        said: list[Any] = [None] * self.size()
        dist.all_gather_object(said, value)
        return said


ALONE = Mesh()
