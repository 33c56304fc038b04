"""One model -> the same model on its devices: the only place that wraps, compiles or shards."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longfire.settings import ActivationCheckpoint


def parallelize(model: nn.Module, remat: ActivationCheckpoint, compiled: bool) -> nn.Module:
    """Apply the run's plan in place and return the model. The order, and why:

    1. tensor and context parallelism replace submodules and seams, so they come before anything wraps a block;
    2. recomputation wraps the parts of a block, so that what is compiled already knows what it may drop;
    3. compilation sees a block with its recomputation inside, one graph for all equal blocks;
    4. sharding is outermost: its gathers and scatters run between compiled blocks.
    With one process, 2 and 3 are what there is to do.
    """
    if remat.mode != "none":
        for block in model.layers:
            recompute(block, remat.mode)
    if compiled:
        for block in model.layers:
            block.compile(dynamic=False)
    return model


def recompute(block: nn.Module, mode: str) -> None:
    """Make the block, its MLP or its mixer compute its activations again in the backward instead of keeping them."""
    part = {"block": block, "mlp": block.mlp, "attention": block.mixer}[mode]
    forward = part.forward

    def recomputed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    part.forward = recomputed


def recompilations() -> int:
    """Graphs that torch.compile has made in this process so far. (A private counter: torch has no public one.)"""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
