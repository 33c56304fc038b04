"""The processes of a run as a box with named axes: who is rank what, and sums over some of the
axes.

The last axis counts fastest, so neighbours on a machine share matrices (tp), then sequences (cp),
shards, replicas and layers (pp).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longfire import launch
from longfire.config import settings
from longfire.errors import TrainingError, UserError, first_line
from longfire.parallel.axes import AXES, SHARDS

FOR_EVER = timedelta(days=365)
LOST = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
    "gloo",
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Mesh:
    """degrees: processes along each axis. Without a device mesh (one process that offloads nothing)
    every sum is what it is given.

    shards: the same processes, those along dp_shard and cp as one axis, "shards".
    """

    degrees: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    device_mesh: DeviceMesh | None = None
    shards: DeviceMesh | None = None

    @classmethod
    def of_degrees(
        cls,
        degrees: Mapping[str, int],
        device_type: str,
    ) -> "Mesh":
        """The mesh of all processes that have joined. Collective."""
        degrees = {axis: degrees.get(axis, 1) for axis in AXES}
        if prod(degrees.values()) == 1 and not dist.is_initialized():
            return cls(degrees)
        device_mesh = init_device_mesh(device_type, tuple(degrees.values()), mesh_dim_names=AXES)
        together = {axis: degree for axis, degree in degrees.items() if axis not in SHARDS}
        together = {
            "pp": 1,
            "dp_replicate": 1,
            "shards": prod(degrees[axis] for axis in SHARDS),
            "tp": 1,
        } | together
        shards = init_device_mesh(
            device_type,
            tuple(together.values()),
            mesh_dim_names=tuple(together),
        )
        return cls(degrees, device_mesh, shards)

    def size(self, *axes: str) -> int:
        """Processes along these axes together; of all without a name."""
        return prod(self.degrees[axis] for axis in axes or AXES)

    @property
    def has_whole_parameters(self) -> bool:
        """Whether parameters are plain tensors, neither shared by processes nor offloaded."""
        return self.device_mesh is None

    def rank(self, *axes: str) -> int:
        """This process's number among them, the last axis counting fastest."""
        number = 0
        for axis in axes or AXES:
            here = 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)
            number = number * self.degrees[axis] + here
        return number

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks that share what this axis shares, for every such group of the run."""
        ranks = torch.arange(self.size()).view(tuple(self.degrees[one] for one in AXES))
        return ranks.movedim(AXES.index(axis), -1).reshape(-1, self.degrees[axis]).tolist()

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one along this axis only."""
        assert self.device_mesh is not None, "one process has no groups"
        return self.device_mesh.get_group(axis)

    def sum(self, tensor: Tensor, *axes: str) -> Tensor:
        """The tensor, added up in place over the processes along these axes. Collective over
        them."""
        for axis in axes:
            if self.degrees[axis] > 1:
                dist.all_reduce(tensor, group=self.group(axis))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any process of the run says so. Collective over all."""
        return bool(self.sum(torch.tensor(int(flag)), *AXES))

    def broadcast_object(self, value: Value) -> Value:
        """What process 0 says (a small Python object). Collective over all."""
        if self.size() == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def all_gather_object(self, value: Value) -> list[Value]:
        """What every process says, by rank (small Python objects). Collective over all."""
        if self.size() == 1:
            return [value]
        values = [value] * self.size()
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What one process cannot do, no process continues without: its UserError is raised there,
        and ElsewhereError in the others. Collective over all; what is inside must not be."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        errors = self.all_gather_object(None if error is None else (error.exit_code, str(error)))
        if error is not None:
            # the first that failed says it
            error.reported_elsewhere |= any(report is not None for report in errors[: self.rank()])
            raise error
        for rank, report in enumerate(errors):
            if report is not None:
                raise ElsewhereError(rank, *report)

    def rank_0_first(self, work: Callable[[], Value]) -> Value:
        """The same work in process 0, and when it is done there, in all others: what is made once
        is then found."""
        for turn in (True, False):
            with self.raise_on_all_ranks():
                if (self.rank() == 0) is turn:
                    made = work()
        return made


class ElsewhereError(UserError):
    """What another process of the run reports."""

    reported_elsewhere = True

    def __init__(
        self,
        rank: int,
        exit_code: int,
        message: str,
    ) -> None:
        super().__init__(f"process {rank}: {message}")
        self.exit_code = exit_code


ALONE = Mesh()


def backend_of(device: torch.device) -> str:
    """What carries collectives. Tensors of the host go through gloo also where the device has
    NCCL: flags and counts need not wait for it."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """torch's process group for a process that is alone."""
    store = dist.HashStore()
    dist.init_process_group(backend_of(device), store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def joined(
    world: launch.World,
    degrees: Mapping[str, int],
    comm: settings.Comm,
    device: torch.device,
    offloads: bool = False,
) -> Iterator[Mesh]:
    """The mesh of the run, while its processes are joined. Raises TrainingError when they cannot
    meet, or lose each other.

    offloads: FSDP2 moves parameters from the host and back, which asks for a group of processes
    also where there is one."""
    if world.size == 1 and offloads:
        with group_of_one(device):
            yield Mesh.of_degrees(degrees, device.type)
        return
    if world.size == 1:
        yield Mesh(degrees)
        return
    if comm.init_timeout_seconds:
        to_meet = timedelta(seconds=comm.init_timeout_seconds)
    else:
        to_meet = FOR_EVER
    if comm.trace_buf_size:
        launch.record_collectives(comm.trace_buf_size)
    try:
        backend = backend_of(device)
        with launch.Watchdog(
            comm,
            "to join the other processes",
        ):  # who answers at the address may be a stranger
            store, rank, size = next(
                dist.rendezvous("env://", world.rank, world.size, timeout=to_meet)
            )
            # torchrun may keep its store when it starts all again, and in it the addresses of those
            # who died
            store = dist.PrefixStore(f"attempt-{launch.attempt()}", store)
            # One process may prepare data for hours while the others wait: who hangs is found by
            # the watchdogs, not by time-outs here
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=FOR_EVER,
            )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"process {world.rank} of {world.size} could not join the others at "
            f"{launch.meeting_point()}: {first_line(error)}. The address must be that of the "
            "machine of rank 0, and the port free there: set MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield Mesh.of_degrees(degrees, device.type)
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise TrainingError(
            f"process {world.rank} lost the others ({first_line(error)}): the one that ended "
            "first says why. The newest whole checkpoint stays, and the same command resumes "
            "from it"
        ) from error
    finally:
        dist.destroy_process_group()
