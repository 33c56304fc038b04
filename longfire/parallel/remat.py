"""What a block keeps for its backward: which attention computes, MLPs in chunks of tokens, parts
recomputed, host memory.

Every function here changes a block (or a model) in place, by its seams, before it is compiled or
sharded; none knows of a forward's inside. docs/long-context.md says what each saves and costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from longfire.config.settings import ActivationCheckpoint, Attention
from longfire.ops.attention import attention_reference
from longfire.ops.blockwise import blockwise

MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION_KERNELS = {
    "longfire::attend_blocks",
    "torch_attn::_varlen_attn",
}  # besides those with "attention" in their name


def choose_attention(block: nn.Module, chosen: Attention) -> None:
    """Let the block's mixer attend as [attention] says; a mixer without softmax attention stays as
    it is."""
    if "attention" in block.mixer.context and chosen.kind == "vanilla":
        block.mixer.attend = attention_reference
    elif "attention" in block.mixer.context and chosen.kind == "blockwise":
        block.mixer.attend = partial(
            blockwise, chunks=(chosen.query_chunk_size, chosen.key_chunk_size)
        )


def save_memory(
    block: nn.Module, remat: ActivationCheckpoint, mlp_chunk_size: int = 0, compiled: bool = False
) -> None:
    """MLPs in chunks first, so that a block that is recomputed computes its MLP in chunks
    again. An MLP in chunks keeps its input only: there is nothing to add for it."""
    parts = {"none": (), "block": (block,), "attention": (block.mixer,), "mlp": (block.mlp,)}
    parts["attention+mlp"] = (block.mixer, block.mlp)
    if mlp_chunk_size and block.mlp is not None:
        in_chunks(block.mlp, mlp_chunk_size, compiled)
    for part in parts[remat.mode]:
        if part is not None and not (part is block.mlp and mlp_chunk_size):
            recompute(part, remat.policy)


def recompute(part: nn.Module, policy: tuple[str, ...]) -> None:
    """Make it compute its activations again in the backward instead of keeping them, but for what
    the policy keeps.

    Nothing here draws from torch's generators (dropout is made of a token's noise), so none is
    kept.
    """
    forward, kept = part.forward, kept_operations(policy)
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kept is not None:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, partial(decide, kept))

    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, **how)

    part.forward = recomputed


def decide(
    kept: frozenset[str], context: Any, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Whether an operation's output is kept."""
    name = operation.name().split(".")[0]
    by_kind = "matmuls" in kept and (name in MATMULS | ATTENTION_KERNELS or "attention" in name)
    return (
        CheckpointPolicy.MUST_SAVE if by_kind or name in kept else CheckpointPolicy.PREFER_RECOMPUTE
    )


def kept_operations(policy: tuple[str, ...]) -> frozenset[str] | None:
    """The operations of a policy by torch's names (`aten::mm`), `matmuls` as it is; None for
    `nothing`."""
    if policy in ((), ("nothing",)):
        return None
    return frozenset(name if name == "matmuls" else operation_name(name) for name in policy)


def operation_name(name: str) -> str:
    """mm, aten.mm, aten::mm and aten.mm.default are one operation."""
    parts = name.replace("::", ".").split(".")
    return f"aten::{name}" if len(parts) == 1 else "::".join(parts[:2])


def unknown_operations(policy: tuple[str, ...]) -> list[str]:
    """Names in a policy that no operation has."""

    def exists(name: str) -> bool:
        namespace, _, leaf = operation_name(name).partition("::")
        return hasattr(getattr(torch.ops, namespace), leaf)

    return [name for name in policy if name not in ("nothing", "matmuls") and not exists(name)]


def in_chunks(mlp: nn.Module, size: int, compiled: bool) -> None:
    """Compute the MLP for so many tokens of a row at a time, each chunk again in its backward, so
    that what is wider than the row (gate, up) is there for one chunk only (Liu and Abbeel 2023,
    section 3.2). What looks back, as ChannelMix does, has a `feed` beside its forward: the part
    that sees tokens one by one. Its outputs may go home to the processes that the row came from,
    each chunk by itself, so a chunk has equally many tokens of each of them.

    A loop of which only the inside is compiled: unrolled, a long row would make a graph of a
    thousand copies.
    """
    seam = "feed" if hasattr(mlp, "feed") else "forward"
    inside, sources = getattr(mlp, seam), mlp.tokens_from if seam == "feed" else 1
    inside = torch.compile(inside, dynamic=False) if compiled else inside

    def cut(x_BTD: Tensor) -> list[Tensor]:
        pieces_BSTD = x_BTD.unflatten(1, (sources, -1)).split(max(1, size // sources), 2)
        return [piece.flatten(1, 2) for piece in pieces_BSTD]

    def chunked(*rows_BTD: Tensor) -> Tensor:
        pieces = zip(*map(cut, rows_BTD))
        if not torch.is_grad_enabled():
            return torch.cat([inside(*piece) for piece in pieces], 1)
        return torch.cat(
            [checkpoint(inside, *p, use_reentrant=False, preserve_rng_state=False) for p in pieces],
            1,
        )

    setattr(mlp, seam, torch.compiler.disable(chunked) if compiled else chunked)


def offload(root: nn.Module) -> None:
    """What the blocks of a model (or of a stage) keep for their backward waits in the host's
    memory."""
    blocks = root.blocks

    def blocks_offloaded(*args: Any) -> Any:
        with kept_on("cpu"):
            return blocks(*args)

    root.blocks = blocks_offloaded


@contextmanager
def kept_on(host: str) -> Iterator[None]:
    """Inside, what autograd keeps goes to the host as soon as it is kept, and comes back when its
    backward asks for it. Copies run in the order of the device's stream. Parameters stay: they are
    there anyway, or gathered again; so do whole numbers and masks."""

    def go(x: Tensor) -> Any:
        owner = x if x._base is None else x._base  # a matrix is kept as its transpose
        expanded = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride()))
        if isinstance(owner, nn.Parameter) or not x.is_floating_point() or expanded:
            return x
        return x.device, copied(x, torch.device(host), x.is_cuda)

    def come(kept: Any) -> Tensor:
        return (
            kept if isinstance(kept, Tensor) else copied(kept[1], kept[0], kept[0].type == "cuda")
        )

    with torch.autograd.graph.saved_tensors_hooks(go, come):
        yield


def copied(x: Tensor, device: torch.device, by_cuda: bool) -> Tensor:
    """x on another device with the same strides, on which compiled code relies; by CUDA: pinned on
    the host, not waited for."""
    there = torch.empty_strided(
        x.shape,
        x.stride(),
        dtype=x.dtype,
        device=device,
        pin_memory=by_cuda and device.type == "cpu",
    )
    return there.copy_(x, non_blocking=by_cuda)
