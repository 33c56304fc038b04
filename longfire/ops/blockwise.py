"""Softmax attention on one device, a chunk of queries by a chunk of keys: only what one such pair
makes is in memory.

What RingAttention computes between processes (ops/attention_blocks.py, the engine of both) is
computed here between chunks of the same sequences (Liu and Abbeel 2023, Blockwise Parallel
Transformer, algorithm 1). Queries 3 and 4 that meet keys in chunks of 2:

    query chunk (3, 4)   keys 0 1 | 2 3 | 4      (none after 4, none before a window or document)

Kept for the backward are q, k, v, the output and the logsumexp of each query's scores. What a pair
needs is decided on positions, never on numbers of chunks: query and key chunks may have any sizes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longfire.ops.attention import attention
from longfire.ops.attention_blocks import (
    Gradients,
    Manner,
    Outputs,
    Piece,
    Span,
    first_seen,
    seen_between,
)
from longfire.ops.document_starts import starts_of
from longfire.ops.forms import chosen
from longfire.ops.linear import working_dtype
from longfire.ops.pretending import only_shapes

ONE_DOCUMENT = [[0]]  # where documents begin: one sequence that stands for all


class How(NamedTuple):
    """What is computed, as numbers (an operator of torch takes no other object).

    window: keys a query sees, itself included; 0: all. dropout: share of the weights that become 0,
    where there is noise.
    first_head: the number of the first head here. query_chunk, key_chunk: tokens.
    """

    scale: float
    window: int = 0
    dropout: float = 0.0
    first_head: int = 0
    query_chunk: int = 1024
    key_chunk: int = 1024

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "How":
        scale, window, dropout, *whole = numbers
        return cls(scale, int(window), dropout, *map(int, whole))

    def manner(self, q: Tensor, v: Tensor) -> Manner:
        return Manner.of(q, v, self.window or None, self.scale, self.dropout, self.first_head)


def blockwise(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    chunks: tuple[int, int] = (1024, 1024),
    **given: Any,
) -> Tensor:
    """`attention` by chunks (queries, keys) of tokens; what is given and the result are as there.
    Generation (one query, keys to skip) goes there too: its scores are a vector."""
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    if chosen("attention") == "reference" or T == 1 or given.get("skip_B") is not None:
        return attention(q_BTHK, k_BSGK, v_BSGV, **given)
    window = given.get("window")
    documents = given.get("documents")
    scale = given.get("scale")
    noise_BT = given.get("noise_BT")
    dropout = 0.0 if noise_BT is None else given.get("dropout", 0.0)
    noise_BT = noise_BT if dropout else None  # that of other dropouts is given, too
    assert T == S or (documents is None and noise_BT is None), (
        "documents and dropout are for whole rows"
    )
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    how = How(scale, window or 0, dropout, given.get("first_head", 0), *chunks)
    ids_BT = None if documents is None else documents.ids_BT
    return attend_blocks(q_BTHK, k_BSGK, v_BSGV, ids_BT, noise_BT, how)[0]


# An operator of its own: a compiled block would else unroll the loop over all pairs into its graph.


@torch.library.custom_op("longfire::attend_blocks", mutates_args=())
def attend_blocks(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    ids_BT: Tensor | None,
    noise_BT: Tensor | None,
    how: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, V) in q's dtype and logsumexp (B, H, T), queries the last T of S
    positions."""
    how, (o_BTHV, lse_BHT) = (
        How.of(how),
        attend_blocks_shapes(q_BTHK, k_BSGK, v_BSGV, ids_BT, noise_BT, how),
    )
    manner = how.manner(q_BTHK, v_BSGV)
    for here, meetings in chunks_of(q_BTHK.shape[1], k_BSGK.shape[1], ids_BT, how, manner):
        outputs = Outputs(q_BTHK[:, here], v_BSGV.shape[-1], manner, noise_of(noise_BT, here))
        for there, pieces in meetings:
            outputs.meet(k_BSGK[:, there], v_BSGV[:, there], pieces)
        o_BTHV[:, here], lse_BHT[..., here] = outputs.o, outputs.lse
    return o_BTHV, lse_BHT


@attend_blocks.register_fake
def attend_blocks_shapes(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    ids_BT: Tensor | None,
    noise_BT: Tensor | None,
    how: Sequence[float],
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(B, T, H, v_BSGV.shape[-1]), q_BTHK.new_empty(
        B, H, T, dtype=working_dtype(q_BTHK)
    )


@torch.library.custom_op("longfire::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    d_o_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    o_BTHV: Tensor,
    lse_BHT: Tensor,
    ids_BT: Tensor | None,
    noise_BT: Tensor | None,
    how: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes."""
    how = How.of(how)
    d_q = torch.empty_like(q_BTHK, memory_format=torch.contiguous_format)
    manner = how.manner(q_BTHK, v_BSGV)
    dtype = working_dtype(q_BTHK)
    d_k = torch.zeros(k_BSGK.shape, dtype=dtype, device=k_BSGK.device)
    d_v = torch.zeros(v_BSGV.shape, dtype=dtype, device=v_BSGV.device)
    for here, meetings in chunks_of(q_BTHK.shape[1], k_BSGK.shape[1], ids_BT, how, manner):
        known = (q_BTHK[:, here], o_BTHV[:, here], lse_BHT[..., here], d_o_BTHV[:, here])
        gradients = Gradients(*known, manner, noise_of(noise_BT, here))
        for there, pieces in meetings:
            gradients.meet(k_BSGK[:, there], v_BSGV[:, there], d_k[:, there], d_v[:, there], pieces)
        d_q[:, here] = gradients.d_q
    return d_q, d_k.to(k_BSGK.dtype), d_v.to(v_BSGV.dtype)


@attend_blocks_backward.register_fake
def attend_blocks_backward_shapes(
    d_o_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    o_BTHV: Tensor,
    lse_BHT: Tensor,
    ids_BT: Tensor | None,
    noise_BT: Tensor | None,
    how: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    q_BTHK = torch.empty_like(q_BTHK, memory_format=torch.contiguous_format)
    k_BSGK = torch.empty_like(k_BSGK, memory_format=torch.contiguous_format)
    v_BSGV = torch.empty_like(v_BSGV, memory_format=torch.contiguous_format)
    return q_BTHK, k_BSGK, v_BSGV


def backward(ctx: Any, d_o_BTHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, ids_BT, noise_BT = ctx.saved_tensors
    return (
        *attend_blocks_backward(d_o_BTHV, q, k, v, o, lse, ids_BT, noise_BT, ctx.how),
        None,
        None,
        None,
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ids_BT, noise_BT, ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, ids_BT, noise_BT)


attend_blocks.register_autograd(backward, setup_context=keep)


def noise_of(noise_BT: Tensor | None, here: slice) -> Tensor | None:
    if noise_BT is None:
        return None
    return noise_BT[:, here]


def chunks_of(
    T: int, S: int, ids_BT: Tensor | None, how: How, manner: Manner
) -> Iterator[tuple[slice, Iterator[tuple[slice, list[Piece]]]]]:
    """Each chunk of queries (a slice of them) with the chunks of keys (slices, too) that any of its
    queries sees, and what of the two meets. With ids it waits for the device once."""
    starts = ONE_DOCUMENT if ids_BT is None else starts_of(ids_BT)
    for at in range(0, T, how.query_chunk)[-2 if only_shapes() else 0 :]:
        here = slice(at, min(at + how.query_chunk, T))
        yield (
            here,
            keys_met(Span(S - T + here.start, S - T + here.stop, 0), starts, how.key_chunk, manner),
        )


def keys_met(
    queries: Span, starts: list[list[int]], key_chunk: int, manner: Manner
) -> Iterator[tuple[slice, list[Piece]]]:
    """Key chunks begin at multiples of their size, so that those of the queries' size meet them in
    a square on the diagonal."""
    first = first_seen(queries.start, starts, manner.window)
    chunks = range(first // key_chunk * key_chunk, queries.stop, key_chunk)
    if only_shapes():  # those on the edges of what is seen hold the most
        chunks = chunks[:: max(1, len(chunks) - 1)]
    for start in chunks:
        keys = Span(max(start, first), min(start + key_chunk, queries.stop), 0)
        pieces = list(seen_between(queries, keys, starts, manner))
        if pieces:
            yield slice(keys.start, keys.stop), pieces
