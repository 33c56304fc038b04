"""Heads in exchange for tokens: each process has all tokens of some heads (Jacobs 2023, Ulysses).

q, k, v by heads instead of tokens, the output by tokens again; the backward the same. It needs
heads that the processes can share. Each sees whole sequences, so its work is even whatever the
layout.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from longfire.ops.fast.attention import multipliable
from longfire.ops.linear import in_fp32
from longfire.parallel import cost
from longfire.parallel.collectives import gathered, group_known_as
from longfire.parallel.context_cost import (
    BYTES,
    DEGREE,
    AttentionHeads,
    CommunicationCost,
    Workload,
)
from longfire.parallel.context_cost import STRATEGY as STRATEGY_KEY
from longfire.parallel.context_strategies.contract import AttentionCall, Processes
from longfire.parallel.context_strategies.key_blocks import work
from longfire.parallel.cost import Device
from longfire.parallel.layout import ContextShard


class AllToAll:
    """Two exchanges each way; attention itself is that of one process, by any op."""

    name = "alltoall"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        shard: ContextShard,
        groups: tuple[Processes, ...],
    ) -> Tensor:
        (processes,) = groups
        return heads_for_tokens(q, k, v, call, shard, processes)

    def cost(
        self,
        heads: AttentionHeads,
        cut: Workload,
        device: Device,
    ) -> CommunicationCost:
        """Copies of q, k, v and the output by heads. Where there are fewer key/value heads than
        processes, several get the same."""
        n = cut.processes
        narrow = BYTES[cut.dtype]
        copies = max(1, n // heads.kv_heads)
        numbers = (
            cut.sequences * cut.here * (heads.queries + heads.outputs + copies * heads.keys_values)
        )
        kept = (
            cut.sequences * cut.here * (heads.outputs + (copies - 1) * heads.keys_values) * narrow
        )
        sent = (2 + cut.again) * numbers * narrow * (n - 1) / n
        seconds = (
            sent / cost.between_neighbours(device, n, cut.inner)
            + 4 * (2 + cut.again) * cost.LATENCY
        )
        return CommunicationCost(
            "q, k, v, o: all-to-all",
            sent,
            seconds,
            seconds,
            kept=kept,
            forward=numbers * narrow,
            backward=2 * numbers * narrow,
        )

    def refusal(
        self,
        layer: str,
        heads: int,
        kv_heads: int,
        sizes: tuple[int, ...],
    ) -> str:
        (processes,) = sizes
        reason = (
            f"{STRATEGY_KEY} = alltoall shares the heads of {layer} among {DEGREE} = "
            f"{processes} processes"
        )
        here = "(of a tensor-parallel process)"
        fix = f"set {STRATEGY_KEY} to ring or allgather"
        if processes > heads:
            return (
                f"{reason}, but it has {heads} {here}; lower {DEGREE} to {heads} or less, or {fix}"
            )
        if heads % processes:
            return (
                f"{reason}, which does not divide its {heads} {here}; {fix}, or choose a degree "
                "that does"
            )
        if kv_heads % processes and processes % kv_heads:
            return (
                f"{reason}, of which its {kv_heads} key/value heads {here} are neither a multiple "
                f"nor a divisor; {fix}, or choose a degree that is one of theirs"
            )
        return ""


STRATEGY = AllToAll()


def heads_for_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    shard: ContextShard,
    processes: Processes,
) -> Tensor:
    """Each process gives the tokens of other heads for the other tokens of its own heads, attends
    on whole sequences, and gives back."""
    q_BTHK, k_BTGK, v_BTGV = of_own_heads(q, k, v, processes, shard)
    noise_BT = call.noise_BT
    if noise_BT is not None:
        noise_BT = everyones_noise(noise_BT, processes, shard)
    o_BTHV = call.local.attention(
        q_BTHK,
        k_BTGK,
        v_BTGV,
        window=call.window,
        documents=shard.whole,
        scale=call.scale,
        dropout=call.dropout,
        noise_BT=noise_BT,
        first_head=call.first_head + processes.rank * q_BTHK.shape[2],
    )
    segments_BSLHV = shard.layout.segments_of(o_BTHV.to(q.dtype))
    theirs = torch.stack(
        [segments_BSLHV[:, list(place)].flatten(1, 2) for place in shard.layout.places]
    )
    return exchanged(theirs, processes).movedim(0, 2).flatten(2, 3)


def of_own_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    processes: Processes,
    shard: ContextShard,
) -> tuple[Tensor, ...]:
    """Whole sequences of the heads that this process attends with: (B, T, H / n, K), (B, T, G / n
    or 1, K), (B, T, G / n or 1, V)."""
    n = processes.size
    heads = (q, k, v)
    if k.shape[2] >= n:  # all that a process needs of a token, side by side
        mine_BTNX = torch.cat([x.unflatten(2, (n, -1)).flatten(3) for x in heads], -1)
        rows_BTX = whole_rows(exchanged(mine_BTNX.movedim(2, 0), processes), shard)
        parts = rows_BTX.split([x[0, 0].numel() // n for x in heads], 2)
        return tuple(part.unflatten(2, (-1, x.shape[-1])) for part, x in zip(parts, heads))
    q = multipliable(whole_rows(exchanged(q.unflatten(2, (n, -1)).movedim(2, 0), processes), shard))
    kv_BT1X = whole_rows(_Copies.apply(torch.cat([k, v], -1), processes), shard)[:, :, None].to(
        q.dtype
    )
    return q, *kv_BT1X.split([k.shape[-1], v.shape[-1]], 3)


def whole_rows(parts: Tensor, shard: ContextShard) -> Tensor:
    """(n, B, its tokens, ...) of all processes -> (B, T, ...) in the order of the sequence, without
    padding."""
    return shard.layout.joined(parts.unbind(0))


def everyones_noise(
    noise_BT: Tensor,
    processes: Processes,
    shard: ContextShard,
) -> Tensor:
    """The noise of the whole sequences."""
    noise_BP = noise_BT if processes.size == 1 else gathered(noise_BT, processes.group)
    return whole_rows(torch.stack(noise_BP.chunk(processes.size, 1)), shard)


def exchanged(x: Tensor, processes: Processes) -> Tensor:
    """(n, ...): part i goes to process i, and what process i had for this one comes instead. Its
    gradient goes back the same way."""
    if processes.size == 1:
        return x
    return _Exchange.apply(x, processes)


class ExchangeContext(FunctionCtx):
    """What the forward of _Exchange leaves for its backward."""

    processes: Processes


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: ExchangeContext,
        x: Tensor,
        processes: Processes,
    ) -> Tensor:
        ctx.processes = processes
        return swapped(x, processes)

    @staticmethod
    def backward(ctx: ExchangeContext, d_found: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(d_found, ctx.processes), None


class CopiesContext(FunctionCtx):
    """What the forward of _Copies leaves for its backward."""

    processes: Processes
    dtype: torch.dtype
    heads: int


class _Copies(torch.autograd.Function):
    """(B, T, G, X) of fewer heads than processes -> (n, B, T, X): what each process has of the head
    that serves this one's queries. Values are given in fp32 (float64), and so are their gradients:
    those of a head's copies are added up before they are rounded."""

    @staticmethod
    def forward(
        ctx: CopiesContext,
        x_BTGX: Tensor,
        processes: Processes,
    ) -> Tensor:
        ctx.processes = processes
        ctx.dtype = x_BTGX.dtype
        ctx.heads = x_BTGX.shape[2]
        return in_fp32(
            swapped(
                x_BTGX.repeat_interleave(processes.size // ctx.heads, 2).movedim(2, 0),
                processes,
            )
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: CopiesContext, d_found: Tensor) -> tuple[Tensor, None]:
        d_copies = swapped(d_found, ctx.processes).unflatten(0, (ctx.heads, -1))
        return d_copies.sum(1).movedim(0, 2).to(ctx.dtype), None


def swapped(x: Tensor, processes: Processes) -> Tensor:
    """Part i to process i, and what it had for this one."""
    x = x.contiguous()
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group_known_as(processes.group))
    work.sent_bytes += x.nbytes * (processes.size - 1) // processes.size
    return found
