"""What a block keeps for its backward: parts recomputed, MLPs in chunks of tokens.

A block is computed in parts (model.Block), and its `execution` says how each is called. What is
decided here are those calls, before a block is compiled or sharded; none knows of a forward's
inside. docs/long-context.md says what each saves and costs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from longfire.block_execution import Execution, Result
from longfire.config.settings import ActivationCheckpoint

MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"}
# besides those with "attention" in their name
ATTENTION_KERNELS = {
    "longfire::attend_blocks",
    "torch_attn::_varlen_attn",
}


# The contexts of a forward, and of the one that is computed again.
Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


class Operator(Protocol):
    """An operation of torch, with its overload."""

    def name(self) -> str: ...


class Executed(Protocol):
    """A block (model.Block), as this file sees it."""

    execution: Execution

    @property
    def mlp(self) -> nn.Module | None: ...


def is_recomputed(remat: ActivationCheckpoint, layer: int) -> bool:
    """Whether a block of this number, from 0, is one of those that are recomputed."""
    if remat.layers:
        return layer in remat.layers
    return (layer + 1) % remat.layer_interval == 0


def save_memory(
    block: Executed,
    remat: ActivationCheckpoint,
    mlp_chunk_size: int = 0,
    compiled: bool = False,
) -> None:
    """Decide how the parts of a block are called. A block that is recomputed in the backward
    computes its MLP in chunks again. An MLP in chunks keeps its input only: there is nothing to add
    for it."""
    again = Checkpointed.of_policy(remat.policy)
    in_chunks = bool(mlp_chunk_size) and block.mlp is not None
    if in_chunks:
        made = CompiledChunks if compiled else InChunks
        block.execution.mlp_tokens = made(mlp_chunk_size, getattr(block.mlp, "tokens_from", 1))
    if remat.mode == "block":
        block.execution.block = again
    if remat.mode in ("attention", "attention+mlp"):
        block.execution.mixer = again
    if remat.mode in ("mlp", "attention+mlp") and block.mlp is not None and not in_chunks:
        block.execution.mlp = again


@dataclass(frozen=True)
class Checkpointed:
    """A call that keeps its inputs, and what a policy names, and computes the rest again in the
    backward.

    Nothing here draws from torch's generators (dropout is made of a token's noise), so none is
    kept. contexts: those of the forward and of the second one; None: everything is recomputed.
    """

    contexts: Contexts | None = None

    @classmethod
    def of_policy(cls, policy: tuple[str, ...]) -> "Checkpointed":
        """policy: what is kept besides the inputs (`kept_operations`)."""
        kept = kept_operations(policy)
        if kept is None:
            return cls()
        decided = partial(decide, kept)
        return cls(partial(create_selective_checkpoint_contexts, decided))

    def __call__(
        self,
        part: Callable[..., Result],
        *inputs: object,
    ) -> Result:
        if not torch.is_grad_enabled():
            return part(*inputs)
        if self.contexts is None:
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(
            part,
            *inputs,
            use_reentrant=False,
            context_fn=self.contexts,
            preserve_rng_state=False,
        )


def decide(
    kept: frozenset[str],
    context: object,
    operation: Operator,
    *args: object,
    **kwargs: object,
) -> CheckpointPolicy:
    """Whether an operation's output is kept."""
    name = operation.name().split(".")[0]
    is_attention = name in ATTENTION_KERNELS or "attention" in name
    is_matmul = name in MATMULS or is_attention
    if name in kept or (is_matmul and "matmuls" in kept):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def kept_operations(policy: tuple[str, ...]) -> frozenset[str] | None:
    """The operations of a policy by torch's names (`aten::mm`), `matmuls` as it is; None for
    `nothing`."""
    if policy in ((), ("nothing",)):
        return None
    kept: set[str] = set()
    for name in policy:
        if name == "matmuls":
            kept.add(name)
        else:
            kept.add(operation_name(name))
    return frozenset(kept)


def operation_name(name: str) -> str:
    """mm, aten.mm, aten::mm and aten.mm.default are one operation."""
    parts = name.replace("::", ".").split(".")
    if len(parts) == 1:
        return f"aten::{name}"
    return "::".join(parts[:2])


def unknown_operations(policy: tuple[str, ...]) -> list[str]:
    """Names in a policy that no operation has."""

    def exists(name: str) -> bool:
        namespace, _, leaf = operation_name(name).partition("::")
        return hasattr(getattr(torch.ops, namespace), leaf)

    unknown: list[str] = []
    for name in policy:
        if name not in ("nothing", "matmuls") and not exists(name):
            unknown.append(name)
    return unknown


class InChunks:
    """The MLP for `size` tokens of a sequence at a time, each chunk again in its backward, so that
    what is wider than the input (gate, up) is there for one chunk only (Liu and Abbeel 2023,
    section 3.2).

    A part's outputs may go home to the `sources` processes that the sequence came from, each chunk
    by itself, so a chunk has equally many tokens of each of them.
    """

    def __init__(self, size: int, sources: int = 1) -> None:
        self.size = size
        self.sources = sources

    def __call__(
        self,
        part: Callable[..., Tensor],
        *rows_BTD: Tensor,
    ) -> Tensor:
        chunks = list(zip(*(self.cut(x_BTD) for x_BTD in rows_BTD)))
        if not torch.is_grad_enabled():
            return torch.cat([part(*chunk) for chunk in chunks], 1)
        outputs: list[Tensor] = []
        for chunk in chunks:
            output = checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False)
            outputs.append(output)
        return torch.cat(outputs, 1)

    def cut(self, x_BTD: Tensor) -> list[Tensor]:
        """Chunks in which each source has equally many tokens."""
        x_BSTD = x_BTD.unflatten(1, (self.sources, -1))
        pieces_BSTD = x_BSTD.split(max(1, self.size // self.sources), 2)
        return [piece.flatten(1, 2) for piece in pieces_BSTD]


class CompiledChunks(InChunks):
    """The same as a loop of which only the inside is compiled: unrolled, a long sequence would make
    a graph of a thousand copies."""

    def __init__(self, size: int, sources: int = 1) -> None:
        super().__init__(size, sources)
        self.compiled: Callable[..., Tensor] | None = None  # the part, when it is first called

    @torch.compiler.disable
    def __call__(
        self,
        part: Callable[..., Tensor],
        *rows_BTD: Tensor,
    ) -> Tensor:
        if self.compiled is None:
            self.compiled = torch.compile(part, dynamic=False)
        return super().__call__(self.compiled, *rows_BTD)
