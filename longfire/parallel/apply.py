"""One model -> the same model on its devices: the only place that wraps, compiles or shards."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from longfire.config.settings import ActivationCheckpoint, Attention, Float8, Parallelism
from longfire.ops.attention_choice import local_sequence
from longfire.parallel import context, float8_layers, pipeline, remat, tensor
from longfire.parallel.activation_offload import ActivationOffload
from longfire.parallel.axes import DATA, SHARDS
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.parameter_gather import gather_rounded, gathers_float8, gathers_rounded
from longfire.parallel.plan import reshards
from longfire.parallel.sharding import local, placed_parameters

if TYPE_CHECKING:
    from longfire.model import Model

DEFAULTS = Parallelism()
FUSED = Attention()
UNROUNDED = Float8()


def parallelize(
    model: "Model",
    keeping: ActivationCheckpoint,
    compiled: bool,
    mesh: Mesh = ALONE,
    parallelism: Parallelism = DEFAULTS,
    seq_len: int = 1,
    attention: Attention = FUSED,
    mlp_chunk_size: int = 0,
    float8: Float8 = UNROUNDED,
) -> "Model":
    """Apply the run's plan in place, on a model that may be on meta still, and return it. The
    order, and why:

    1. which attention computes, then tensor and context parallelism: tensor parallelism replaces
       submodules, so it comes before anything else looks at a block. Which matrices multiply 8-bit
       numbers is chosen of the whole model before, and they know after it how they are split;
    2. a pipeline takes away the layers of other processes: of what is left, nothing below needs to
       know (seq_len weighs layers);
    3. a block's execution says which parts run in chunks or again, so that what is compiled already
       knows what it may drop;
    4. compilation sees a block with its recomputation inside, one graph for all equal blocks;
    5. sharding is outermost: its gathers and scatters run between compiled blocks.
    What is kept on the host goes there by hooks around all blocks, outside of what is compiled.
    """
    if attention.kind != "auto":
        model.local_ops = local_sequence(attention)
    again = keeping.mode != "none" or mlp_chunk_size > 0
    of_8_bits = float8_layers.choose_matrices(model, float8)
    if mesh.size("tp") > 1:
        tensor.split(model, mesh, parallelism.sequence_parallel)
    float8_layers.set_float8(model, of_8_bits, float8, mesh)
    if mesh.size("cp") > 1:
        model.context = context.make_context(model, mesh, parallelism)
    if mesh.size("pp") > 1:
        model.pipeline = pipeline.cut(
            model,
            mesh,
            parallelism,
            seq_len,
            halves=not again and not compiled,
        )
    if again:
        for layer, block in model.layers.numbered():
            here = keeping
            if not remat.is_recomputed(keeping, layer):
                here = replace(keeping, mode="none")
            remat.save_memory(block, here, mlp_chunk_size, compiled)
    if keeping.offload:
        offload = ActivationOffload()
        for root in roots(model):
            root.saved_activations = offload
    if compiled:
        for block in model.layers:
            block.compile(dynamic=False)
    if mesh.size(*DATA, "cp") > 1 or parallelism.cpu_offload:
        shard(model, mesh, parallelism, float8)
    return model


def shard(
    model: "Model",
    mesh: Mesh,
    parallelism: Parallelism,
    float8: Float8 = UNROUNDED,
) -> None:
    """Cut every parameter by rows over dp_shard and cp, with replicas over dp_replicate (FSDP2;
    HSDP, Zhao 2023): a block is gathered when it computes, its gradients are summed and scattered
    when they are there.

    Gradients are sums, not means: the loss is divided by the tokens of the world already (promise
    7). What is outside the blocks, the head among it, stays gathered from the forward to its
    backward, because the loss uses it.
    """
    assert mesh.shards is not None, "several processes have a mesh, and one that offloads"
    axes = ("dp_replicate", "shards") if mesh.size("dp_replicate") > 1 else ("shards",)
    data_mesh = mesh.shards[axes]
    narrow = parallelism.param_gather_dtype == "bfloat16"
    precision = MixedPrecisionPolicy(
        torch.bfloat16 if narrow else None,
        torch.float32 if narrow else None,
        cast_forward_inputs=False,
    )
    offload = OffloadPolicy()
    if parallelism.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    again = reshards(parallelism, mesh.size("pp"), mesh.size(*SHARDS))
    for block in model.layers:
        fully_shard(
            block,
            mesh=data_mesh,
            reshard_after_forward=again,
            mp_policy=precision,
            offload_policy=offload,
        )
        gather_for(block, "mix_alone")
    for root in roots(model):
        fully_shard(
            root,
            mesh=data_mesh,
            reshard_after_forward=False,
            mp_policy=precision,
            offload_policy=offload,
        )
        gather_for(root, "mix_layers")
    shards = mesh.size(*SHARDS)
    rounds = gathers_rounded(parallelism, model.compute_dtype, shards)
    rounds_to_8_bits = gathers_float8(float8, shards)
    for module in sharded(model):
        if rounds or rounds_to_8_bits:
            gather_rounded(module, shards, model.compute_dtype, rounds, rounds_to_8_bits)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(
            True
        )  # else the factor becomes an operation that gloo has not


def gather_for(module: nn.Module, method: str) -> None:
    """Let another method than the forward gather what it uses, too. (Modules of transformers lack
    ours.)"""
    if hasattr(module, method):
        register_fsdp_forward_method(module, method)


def roots(model: "Model") -> "Sequence[Model]":
    """What is called to compute: the model, or each of its stages."""
    if model.pipeline:
        return list(model.pipeline.stages)
    return (model,)


def sharded(model: "Model") -> list[FSDPModule]:
    """What is gathered by itself; a stage is in no module of the model."""
    modules = dict.fromkeys(module for root in roots(model) for module in root.modules())
    return [module for module in modules if isinstance(module, FSDPModule)]


def sync_gradients(model: "Model", mesh: Mesh, last: bool) -> None:
    """Before a micro-batch's backward: shards are summed after every one, replicas after the last
    only, since whole gradients are at hand to wait with; where parameters are kept elsewhere, so
    are gradients, after every one. (The schedule of a pipeline does this itself.)"""
    is_offloaded = next(model.parameters()).device != device_of(model)
    for module in sharded(model):
        if mesh.size(*SHARDS) == 1 and not is_offloaded:
            module.set_requires_gradient_sync(last, recurse=False)
        else:
            module.set_requires_all_reduce(last, recurse=False)


def gradients(model: "Model", mesh: Mesh) -> tuple[list[Tensor], list[float]]:
    """The gradients on this process, and how many processes hold each: every number of the model is
    counted once in the norm, that of a copy by its owner (here its share is 1 / infinity)."""
    found = []
    copies = []
    everywhere = mesh.size("dp_replicate")
    for _, parameter, spec in placed_parameters(model):
        if parameter.grad is not None:
            found.append(local(parameter.grad))
            shared = everywhere * (1 if spec.split else mesh.size("tp"))
            copies.append(math.inf if spec.is_copy else shared)
    return found, copies


def device_of(model: "Model") -> torch.device:
    """Where a model computes; its parameters may be kept elsewhere."""
    return model.computes_on or next(model.parameters()).device


def reshard(model: "Model") -> None:
    """After a forward without a backward: what is still gathered is freed, so that the next step
    gathers what it updated."""
    for module in sharded(model):
        module.reshard()


def recompilations() -> int:
    """Graphs that torch.compile has made in this process so far. (A private counter: torch has no
    public one.)"""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
