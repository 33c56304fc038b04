"""Whether the state of a run fits into the memory of its machine, before any of it is made."""

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longfire import launch
from longfire.config.settings import Optimizer
from longfire.errors import SettingsError
from longfire.optim import rule_of, updates_of

# What the control group of a container may use (Linux, version 2 and 1).
CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
GB = 10**9


def check_memory(
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    on_host: bool,
    frozen: Sequence[nn.Module] = (),
) -> None:
    """Raises SettingsError where parameters, gradients and the state of the optimizer alone are
    more than the memory there is; activations come on top of them, which `longfire plan` forecasts.

    model: as it is sharded, on any device, meta included. on_host: parallelism.cpu_offload. frozen:
    models beside it that do not learn (a teacher).
    """
    needed = sum(state_bytes(one, optimizer) for one in (model, *frozen))
    if device.type == "cuda" and not on_host:
        there = torch.cuda.get_device_properties(device).total_memory
        place = "this device"
        whose = "this process"
    else:
        processes = int(launch.started("processes of this machine"))
        needed *= processes
        there = host_memory_bytes()
        place = "this machine"
        whose = f"the {processes} processes of this machine" if processes > 1 else "this run"
    if needed > there:
        beside = " with its teacher" if frozen else ""
        raise SettingsError(
            f"the parameters, gradients and {optimizer.name} state of {whose}{beside} are "
            f"{needed / GB:,.1f} GB, and {place} has {there / GB:,.1f} GB: take a smaller model, "
            "or shard them over more devices (parallelism.data_parallel_shard_degree); `longfire "
            "plan` shows what fits"
        )


def state_bytes(model: nn.Module, optimizer: Optimizer) -> float:
    """Bytes of this process's share of parameters, their gradients, and what the optimizer keeps
    of them."""
    updates = updates_of(model, rule_of(optimizer))
    total = 0.0
    for parameter in model.parameters():
        here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        each = float(here.element_size())
        if parameter in updates:
            each += here.element_size() + updates[parameter].state_bytes(here.dtype)
        total += here.numel() * each
    return total


def host_memory_bytes() -> int:
    """Memory and swap that this machine, or the container in it, has."""
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    for file in CONTAINER_LIMITS:
        try:
            limit = file.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():  # "max" is no limit
            total = min(total, int(limit))
    return total
