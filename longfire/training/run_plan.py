"""What the planner decides and shows of a run that trains in several processes."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from longfire.config.run import Run
from longfire.config.settings import ContextStrategyName
from longfire.model import Model
from longfire.optim import rule_of, updates_of
from longfire.parallel import cost, strategy
from longfire.parallel.mesh import Mesh
from longfire.parallel.sharding import local
from longfire.planner import tables
from longfire.planner.planner import Planner

logger = logging.getLogger(__name__)


def with_context_strategy(run: Run, dtype: torch.dtype, device: torch.device, mesh: Mesh) -> Run:
    """The same run with its strategy of context parallelism for softmax attention: where
    context_parallel_strategy is auto, the one that the planner expects to be fastest, which is
    logged with the second. Collective over the mesh."""
    parallelism = run.parallelism
    if mesh.size("cp") == 1 or parallelism.context_parallel_strategy != "auto":
        return run
    chosen: ContextStrategyName = (
        "ring"  # of a model without softmax attention: nothing asks for it
    )
    with mesh.raise_on_all_ranks():
        if mesh.rank() == 0:
            planner = Planner(run, cost_device(device), name_of(dtype), device.type == "cuda")
            plan = planner.of_recipe()
            ranked = planner.strategies(plan)
            if ranked:
                chosen = ranked[0].strategy
                logger.info(f"context: {strategy.describe(ranked, planner.cut(plan))}")
    chosen = mesh.broadcast_object(chosen)
    return replace(run, parallelism=replace(parallelism, context_parallel_strategy=chosen))


def cost_device(device: torch.device) -> cost.Device:
    """What the planner knows of the device that this process trains on."""
    if device.type != "cuda":
        return cost.device_here("", 0)
    properties = torch.cuda.get_device_properties(device)
    return cost.device_here(properties.name, properties.total_memory)


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16 ..., as settings name them."""
    return str(dtype).removeprefix("torch.")


def note_plan(
    run: Run, model: Model, dtype: torch.dtype, mesh: Mesh, frozen: Sequence[Model] = ()
) -> None:
    """Log the processes and the bytes that each holds, as a table. frozen: models that do not
    learn. Collective over the mesh."""
    parameter_bytes = sum(local(parameter).nbytes for parameter in model.parameters())
    optimizer_bytes = 0.0
    for parameter, update in updates_of(model, rule_of(run.optimizer)).items():
        optimizer_bytes += local(parameter).numel() * update.state_bytes(parameter.dtype)
    bytes_here = {
        "parameters": parameter_bytes,
        "gradients": parameter_bytes,
        "optimizer": int(optimizer_bytes),
    }
    if frozen:
        bytes_here["teacher"] = sum(local(p).nbytes for one in frozen for p in one.parameters())
    bytes_of_all = mesh.all_gather_object(bytes_here)
    if mesh.rank() == 0:
        any_device = cost.device_of(cost.DEFAULT_DEVICE)  # the table has bytes only, no seconds
        planner = Planner(run, any_device, name_of(dtype), as_cuda=False)
        logger.info(tables.describe_plan(planner, mesh, bytes_of_all))
