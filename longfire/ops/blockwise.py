"""Softmax attention, block by block: a chunk of queries meets a chunk of keys, and only what one such pair makes is in memory.

softmax(scores) v is gathered over chunks of keys by their running maximum and sum (Milakov 2018; Liu and Abbeel 2023, Blockwise
Parallel Transformer, algorithm 1). Queries 3 and 4 that meet keys in chunks of 2, no window, one document:

    query chunk (3, 4)   keys 0 1 | 2 3 | 4      keys after 4 are no query's, and a chunk never begins before the first key seen

Kept for the backward are q, k, v, the output and the logsumexp of each query's scores, from which each pair's weights are made
again. What a pair needs is decided on positions and document ids, never on numbers of chunks: query and key chunks may have any sizes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longfire.ops import chosen, only_shapes
from longfire.ops.attention import attention, weight_mask
from longfire.ops.linear import working_dtype


class How(NamedTuple):
    """What is computed, as numbers (an operator of torch takes no other object).

    window: keys a query sees, itself included; 0: all. dropout: share of the weights that become 0, where there is noise.
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


class Place(NamedTuple):
    """Where a piece of the rows lies: its first token's place in the row, and its tokens' documents (None: one document a row),
    whose numbers grow along a row."""

    start: int = 0
    ids_BT: Tensor | None = None


def blockwise(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, chunks: tuple[int, int] = (1024, 1024), **given: Any
) -> Tensor:
    """`attention` by chunks (queries, keys) of tokens; what is given and the result are as there. Generation (a query a row, keys to
    skip) goes there too: its scores are a row."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if chosen("attention") == "slow" or T == 1 or given.get("skip_B") is not None:
        return attention(q_BTHK, k_BSGK, v_BSGV, **given)
    window, documents, scale, noise_BT = (given.get(name) for name in ("window", "documents", "scale", "noise_BT"))
    assert T == S or (documents is None and noise_BT is None), "documents and dropout are for whole rows"
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    dropout = 0.0 if noise_BT is None else given.get("dropout", 0.0)
    how = How(scale, window or 0, dropout, given.get("first_head", 0), *chunks)
    ids_BT = None if documents is None else documents.ids_BT
    return attend_blocks(q_BTHK, k_BSGK, v_BSGV, ids_BT, noise_BT if dropout else None, how)[0]


# An operator of its own: a compiled block would else unroll the loop over all pairs into its graph.


@torch.library.custom_op("longfire::attend_blocks", mutates_args=())
def attend_blocks(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, ids_BT: Tensor | None, noise_BT: Tensor | None, how: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, V) in q's dtype and logsumexp (B, H, T), queries the last T of S positions."""
    queries, keys = Place(k_BSGK.shape[1] - q_BTHK.shape[1], ids_BT), Place(0, ids_BT)
    o_BTHV = q_BTHK.new_empty(*q_BTHK.shape[:-1], v_BSGV.shape[-1])
    lse_BHT = attend_piece(q_BTHK, k_BSGK, v_BSGV, queries, keys, How.of(how), noise_BT, o_BTHV)
    return o_BTHV, lse_BHT


@attend_blocks.register_fake
def attend_blocks_shapes(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, ids_BT: Tensor | None, noise_BT: Tensor | None, how: Sequence[float]
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHK.shape
    return q_BTHK.new_empty(B, T, H, v_BSGV.shape[-1]), q_BTHK.new_empty(B, H, T, dtype=working_dtype(q_BTHK))


@torch.library.custom_op("longfire::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    d_o_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, o_BTHV: Tensor, lse_BHT: Tensor,
    ids_BT: Tensor | None, noise_BT: Tensor | None, how: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in their dtypes."""
    queries, keys = Place(k_BSGK.shape[1] - q_BTHK.shape[1], ids_BT), Place(0, ids_BT)
    d_q, d_k, d_v = attend_piece_backward(
        d_o_BTHV, q_BTHK, k_BSGK, v_BSGV, o_BTHV, lse_BHT, queries, keys, How.of(how), noise_BT
    )
    return d_q.to(q_BTHK.dtype), d_k.to(k_BSGK.dtype), d_v.to(v_BSGV.dtype)


@attend_blocks_backward.register_fake
def attend_blocks_backward_shapes(
    d_o_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, o_BTHV: Tensor, lse_BHT: Tensor,
    ids_BT: Tensor | None, noise_BT: Tensor | None, how: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q_BTHK, k_BSGK, v_BSGV = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHK, k_BSGK, v_BSGV)
    )
    return q_BTHK, k_BSGK, v_BSGV


def gradients(ctx: Any, d_o_BTHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, ids_BT, noise_BT = ctx.saved_tensors
    return *attend_blocks_backward(d_o_BTHV, q, k, v, o, lse, ids_BT, noise_BT, ctx.how), None, None, None


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ids_BT, noise_BT, ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, ids_BT, noise_BT)


attend_blocks.register_autograd(gradients, setup_context=keep)


# A piece of queries with a piece of keys: what a ring could join, too.


def attend_piece(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, queries: Place, keys: Place, how: How, noise_BT: Tensor | None,
    out_BTHV: Tensor,
) -> Tensor:  # fmt: skip
    """Write the output of these queries for these keys into out (fp32 if it is to be joined with others), and return its logsumexp
    (B, H, T), in fp32 (float64 for float64). A query that sees none of the keys has 0 and -inf.

    Parts of one softmax over keys in several pieces join as o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i).
    """
    B, T, H, _ = q_BTHK.shape
    lse_BHT = q_BTHK.new_empty(B, H, T, dtype=working_dtype(q_BTHK))
    for span, seen in chunks_of(q_BTHK, k_BSGK, queries, keys, how):
        q = by_group(q_BTHK[:, span], k_BSGK).mul(how.scale)
        o, total = q.new_zeros(*q.shape[:-1], v_BSGV.shape[-1]), q.new_zeros(*q.shape[:-1], 1)
        highest = torch.full_like(total, -torch.inf)
        for of_keys in seen:
            pair = Pair(span, of_keys, queries, keys, how, noise_BT)
            k, v = (by_group(x[:, of_keys], k_BSGK) for x in (k_BSGK, v_BSGV))
            scores = pair.hide(q @ k.mT)
            before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
            zero = highest.masked_fill(highest == -torch.inf, 0.0)  # a query that saw nothing yet
            weights, shrunk = scores.sub_(zero).exp_(), before.sub_(zero).exp_()
            total.mul_(shrunk).add_(weights.sum(-1, keepdim=True))
            o.mul_(shrunk).add_(pair.drop(weights) @ v)
        o.div_(total.masked_fill(total == 0, 1.0))
        out_BTHV[:, span] = o.unflatten(2, (-1, span.stop - span.start)).flatten(1, 2).transpose(1, 2)
        lse_BHT[..., span] = total.log_().add_(highest).unflatten(2, (-1, span.stop - span.start)).flatten(1, 2)[..., 0]
    return lse_BHT


def attend_piece_backward(
    d_o_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, o_BTHV: Tensor, lse_BHT: Tensor, queries: Place,
    keys: Place, how: How, noise_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in fp32 (float64 for float64). o and lse are those of the whole softmax, whatever pieces it has.

    With P = exp(scores - lse): d v = P^T dO, and d scores = P (dO v^T - rowsum(dO o)).
    """
    dtype = working_dtype(q_BTHK)
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q_BTHK, k_BSGK, v_BSGV))
    for span, seen in chunks_of(q_BTHK, k_BSGK, queries, keys, how):
        q, d_o, o = (by_group(x[:, span], k_BSGK) for x in (q_BTHK, d_o_BTHV, o_BTHV))
        q, delta = q.mul(how.scale), o.mul(d_o).sum(-1, keepdim=True)
        del o
        lse = lse_BHT[..., span].unflatten(1, (k_BSGK.shape[2], -1)).flatten(2)[..., None]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        d_q_chunk = torch.zeros_like(q)
        for of_keys in seen:
            pair = Pair(span, of_keys, queries, keys, how, noise_BT)
            k, v = (by_group(x[:, of_keys], k_BSGK) for x in (k_BSGK, v_BSGV))
            weights = pair.hide(q @ k.mT).sub_(lse).exp_()
            d_scores = pair.drop(d_o @ v.mT).sub_(delta).mul_(weights)
            d_v[:, of_keys].transpose(1, 2).add_(pair.drop(weights).mT @ d_o)
            d_k[:, of_keys].transpose(1, 2).add_(d_scores.mT @ q)
            d_q_chunk.add_(d_scores @ k)
        d_q_chunk = d_q_chunk.mul_(how.scale).unflatten(2, (-1, span.stop - span.start))
        d_q[:, span] = d_q_chunk.flatten(1, 2).transpose(1, 2)
    return d_q, d_k, d_v


def by_group(x_BTHK: Tensor, k_BSGK: Tensor) -> Tensor:
    """(B, G, heads of a group x T, K) in the working dtype: heads that share keys are queries of one product."""
    x = x_BTHK.to(working_dtype(x_BTHK)).unflatten(2, (k_BSGK.shape[2], -1))
    return x.permute(0, 2, 3, 1, 4).flatten(2, 3)


def chunks_of(
    q_BTHK: Tensor, k_BSGK: Tensor, queries: Place, keys: Place, how: How
) -> Iterator[tuple[slice, list[slice]]]:
    """Each chunk of queries with the chunks of keys that any of its queries sees; places in the pieces, not in the row."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    starts = range(0, T, how.query_chunk)[-2 if only_shapes() else 0 :]
    bounds = document_bounds(starts, T, queries, keys, how) if keys.ids_BT is not None else [(0, S)] * len(starts)
    for start, (first, last) in zip(starts, bounds):
        stop, ahead = min(start + how.query_chunk, T), queries.start - keys.start
        last = min(last, stop + ahead)  # a query sees no key after it
        if how.window:
            first = max(first, start + ahead - how.window + 1)
        blocks = range(first, last, how.key_chunk)[: 2 if only_shapes() else None]
        yield slice(start, stop), [slice(n, min(n + how.key_chunk, last)) for n in blocks]


def document_bounds(starts: range, T: int, queries: Place, keys: Place, how: How) -> list[tuple[int, int]]:
    """For each chunk of queries the keys, first to last, of its documents in any row; waits for the device once."""
    begins = torch.tensor(list(starts), device=queries.ids_BT.device)
    ends = (begins + how.query_chunk).clamp_max(T) - 1
    sorted_BS = keys.ids_BT.contiguous()
    first = torch.searchsorted(sorted_BS, queries.ids_BT[:, begins].contiguous()).amin(0)
    last = torch.searchsorted(sorted_BS, queries.ids_BT[:, ends].contiguous(), right=True).amax(0)
    return list(zip(*torch.stack([first, last]).tolist()))


class Pair:
    """A chunk of queries and a chunk of keys: which keys are hidden from which queries, and whose weights are dropped."""

    def __init__(
        self, of_queries: slice, of_keys: slice, queries: Place, keys: Place, how: How, noise_BT: Tensor | None
    ) -> None:
        self.of_queries, self.of_keys, self.queries, self.keys, self.how = of_queries, of_keys, queries, keys, how
        self.noise_BT, self.kept = noise_BT, None

    def hide(self, scores: Tensor) -> Tensor:
        """-inf for scores (B, G, heads x queries, keys) of keys that are not seen, in place; nothing is done where all are."""
        first_query, last_query = (self.queries.start + n for n in (self.of_queries.start, self.of_queries.stop - 1))
        first_key, last_key = (self.keys.start + n for n in (self.of_keys.start, self.of_keys.stop - 1))
        window, hidden = self.how.window, None
        if last_key > first_query or (window and first_key <= last_query - window):
            query = torch.arange(first_query, last_query + 1, device=scores.device)[:, None]
            key = torch.arange(first_key, last_key + 1, device=scores.device)
            hidden = key > query
            if window:
                hidden |= key <= query - window
        if self.keys.ids_BT is not None:
            ids_BT, ids_BS = self.queries.ids_BT[:, self.of_queries, None], self.keys.ids_BT[:, None, self.of_keys]
            others = ids_BT != ids_BS
            hidden = (others if hidden is None else others | hidden)[:, None, None]
        if hidden is not None:
            scores.unflatten(2, (-1, last_query - first_query + 1)).masked_fill_(hidden, -torch.inf)
        return scores

    def drop(self, weights: Tensor) -> Tensor:
        """What dropout leaves of weights (B, G, heads x queries, keys), in place."""
        if self.noise_BT is None:
            return weights
        if self.kept is None:
            _, G, rows, _ = weights.shape
            heads = G * rows // (self.of_queries.stop - self.of_queries.start)
            span = self.keys.start + self.of_keys.start, self.keys.start + self.of_keys.stop
            noise_BT = self.noise_BT[:, self.of_queries]
            self.kept = weight_mask(noise_BT, heads, *span, self.how.dropout, self.how.first_head).reshape(
                weights.shape
            )
        return weights.mul_(self.kept).div_(1 - self.how.dropout)
