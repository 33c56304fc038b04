"""Attention to keys and values that come from other processes, a process's at a time.

What is computed is decided on positions (ops/attention_blocks.py): a segment of keys that no query
sees here is not computed. All sums are fp32 (float64 for float64 inputs), the gradients that travel
too; q, k, v, the output and its logsumexp are all that is kept for the backward. How keys come and
their gradients go home is a KeyBlockStrategy: ring.py, allgather.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.attention_blocks import Gradients, Manner, Outputs, Piece, Span, seen_between
from longfire.parallel.autograd_context import SavedTensors
from longfire.parallel.context_strategies.contract import AttentionCall, Processes
from longfire.parallel.layout import ContextShard, SequenceLayout


@dataclass
class Work:
    """What this process did since `forget`. pairs: of queries and keys, for each head, that
    forwards of ring and allgather computed;
    sent_bytes: by all strategies, forward and backward; hops: of keys and values that were sent
    on."""

    pairs: int = 0
    sent_bytes: int = 0
    hops: int = 0

    def forget(self) -> None:
        self.pairs = self.sent_bytes = self.hops = 0


work = Work()


class KeyBlockStrategy(ABC):
    """A context strategy that attends to the keys and values of one process after the other. Any
    number of processes may share any heads.

    A subclass says how the keys and values of all processes come, packed as one message each, and
    how their gradients get home.
    """

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
        manner = call.manner(q, v)
        return _Attend.apply(
            q,
            k,
            v,
            call.noise_BT,
            processes,
            shard,
            manner,
            self,
        )

    def refusal(
        self,
        layer: str,
        heads: int,
        kv_heads: int,
        sizes: tuple[int, ...],
    ) -> str:
        return ""

    @abstractmethod
    def come(
        self,
        mine: Tensor,
        shard: ContextShard,
        window: int | None,
        processes: Processes,
    ) -> Iterator[tuple[int, Tensor]]:
        """(process, its keys and values), the own ones first; those that no query sees may be left
        out."""

    @abstractmethod
    def bring_home(
        self,
        mine: Tensor,
        shard: ContextShard,
        window: int | None,
        processes: Processes,
        meet: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """The gradient of the keys and values here, of all queries. meet(process, kv, d_kv) adds
        that of the queries here."""


class AttendContext(SavedTensors):
    """What the forward of _Attend leaves for its backward."""

    processes: Processes
    shard: ContextShard
    manner: Manner
    transport: KeyBlockStrategy


class _Attend(torch.autograd.Function):
    """Attention to keys that come by, or are gathered. o is kept in q's dtype: it is the output
    itself, and costs nothing; in bf16 its rounding adds a tenth to the error of d_q and d_k."""

    @staticmethod
    def forward(
        ctx: AttendContext,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        noise_BT: Tensor | None,
        processes: Processes,
        shard: ContextShard,
        manner: Manner,
        transport: KeyBlockStrategy,
    ) -> Tensor:
        ctx.processes = processes
        ctx.shard = shard
        ctx.manner = manner
        ctx.transport = transport
        outputs = Outputs(q, v.shape[-1], manner, noise_BT)
        mine = packed(k, v)
        shapes = (k.shape, v.shape)
        for source, kv in transport.come(mine, shard, manner.window, processes):
            pieces = met(shard, source, manner)
            outputs.meet(*unpacked(kv, shapes), pieces)
            work.pairs += sum(piece.pairs(len(q)) for piece in pieces)
        o = outputs.o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, outputs.lse, noise_BT)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: AttendContext, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, noise_BT = ctx.saved_tensors
        processes = ctx.processes
        shard = ctx.shard
        manner = ctx.manner
        shapes = (k.shape, v.shape)
        gradients = Gradients(q, o, lse, d_o, manner, noise_BT)

        def meet(source: int, kv: Tensor, d_kv: Tensor) -> None:
            gradients.meet(
                *unpacked(kv, shapes),
                *unpacked(d_kv, shapes),
                met(shard, source, manner),
            )

        d_kv = ctx.transport.bring_home(
            packed(k, v),
            shard,
            manner.window,
            processes,
            meet,
        )
        d_k, d_v = unpacked(d_kv, shapes)
        return gradients.d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *[None] * 5


def packed(k: Tensor, v: Tensor) -> Tensor:
    """Both as one message."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def unpacked(kv: Tensor, shapes: tuple[torch.Size, torch.Size]) -> tuple[Tensor, Tensor]:
    """Views of k and v in the message."""
    k, v = kv.split([config.numel() for config in shapes])
    return k.view(shapes[0]), v.view(shapes[1])


def met(
    shard: ContextShard,
    source: int,
    manner: Manner,
) -> list[Piece]:
    """Where the queries here see the keys of a process."""
    if (source, manner) not in shard.pieces:
        query_size, key_size = manner.chunks or (shard.layout.length,) * 2
        mine = spans(shard.layout, shard.rank, query_size)
        others = spans(shard.layout, source, key_size)
        pieces: list[Piece] = []
        for queries, keys in product(mine, others):
            pieces += seen_between(queries, keys, shard.starts, manner)
        shard.pieces[source, manner] = pieces
    return shard.pieces[source, manner]


def spans(layout: SequenceLayout, rank: int, chunk: int) -> list[Span]:
    """The segments of a process, so many tokens at a time."""
    L = layout.length
    segments = [
        Span(segment * L, (segment + 1) * L, at * L)
        for at, segment in enumerate(layout.places[rank])
    ]
    return [
        span.within(at, at + chunk)
        for span in segments
        for at in range(span.start, span.stop, chunk)
    ]
