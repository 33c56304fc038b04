"""Softmax attention of queries to keys that come block by block: outputs that are joined, and
gradients that are added up.

One process computes what it has of a sequence when the keys of another one come by
(parallel/context_strategies), one device a chunk after the other (ops/blockwise.py).
Which keys are seen follows from positions: what nobody sees is cut off before, and what is left is

    all      every query sees every key     a call of torch's fused kernel
    causal   a square on the diagonal       another call of it
    band     the edges of a window          BLOCK queries at a time, under a mask

so that a mask costs nothing but the blocks that it cuts through. Each block gives its output and
the log of the sum of its exponentials, in fp32 (float64 for float64 inputs), by which it is joined
with those before it (Milakov 2018; Liu 2023, RingAttention). The backward needs the joined output
and logsumexp only: with P = exp(scores - lse) each block's part is its own (Dao 2022, alg. 4).
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.attention import attention_reference, weight_mask
from longfire.ops.forms import chosen
from longfire.ops.linear import in_fp32, working_dtype
from longfire.ops.pretending import as_on_cuda

BLOCK = 256  # queries of a block that is written out: its scores are BLOCK x the keys that they see
ENDLESS = 2**62  # a window that hides nothing


class Span(NamedTuple):
    """Positions start to stop of a sequence, which lie in a tensor from `at` on."""

    start: int
    stop: int
    at: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def here(self) -> slice:
        return slice(self.at, self.at + self.length)

    def within(self, start: int, stop: int) -> "Span":
        """What of it lies between these positions; its length is at least 0."""
        first = min(max(self.start, start), self.stop)
        return Span(first, max(first, min(self.stop, stop)), self.at + first - self.start)


class Piece(NamedTuple):
    """Queries and keys of one document, of which each query sees at least one. seen: all, causal or
    band; rows: the sequences of the batch."""

    rows: slice
    queries: Span
    keys: Span
    seen: str

    def pairs(self, rows: int) -> int:
        """Scores of a head that are computed; of the causal square, those that are seen."""
        T = self.queries.length
        S = self.keys.length
        return len(range(rows)[self.rows]) * (T * (T + 1) // 2 if self.seen == "causal" else T * S)


class Manner(NamedTuple):
    """How queries and keys meet. window: keys a query sees, itself included. p: of the dropout of
    weights, by each query's noise, the key's position and the head's number. fused: whether a
    kernel takes what is whole. chunks: of queries and keys of a process that meet at a time, in
    tokens; None: all."""

    window: int | None
    scale: float
    p: float
    first_head: int
    fused: bool
    chunks: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        v: Tensor,
        window: int | None,
        scale: float | None,
        p: float = 0.0,
        first_head: int = 0,
    ) -> "Manner":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return cls(
            window,
            scale,
            p,
            first_head,
            p == 0 and chosen("attention") != "reference" and has_kernel(q, v),
        )


def has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether torch has a fused kernel that gives the logsumexp: on a CPU always, on CUDA for half
    precision (Ampere or newer)."""
    if not on_cuda(q):
        return q.device.type == "cpu"
    half = q.dtype in (torch.bfloat16, torch.float16)
    size = max(q.shape[-1], v.shape[-1])
    return (
        half
        and size <= 256
        and (as_on_cuda() or torch.cuda.get_device_capability(q.device) >= (8, 0))
    )


def on_cuda(x: Tensor) -> bool:
    """Whether x goes the way of CUDA, be it there or a planner's, without numbers."""
    return x.device.type == "cuda" or as_on_cuda()


def first_seen(first_query: int, starts: list[list[int]], window: int | None) -> int:
    """The first key that a query sees in any sequence. starts: where the documents of each sequence
    begin."""
    earliest = min(of_row[bisect_right(of_row, first_query) - 1] for of_row in starts)
    return max(earliest, first_query - (window or ENDLESS) + 1)


def seen_between(
    queries: Span, keys: Span, starts: list[list[int]], manner: Manner
) -> Iterator[Piece]:
    """What these queries see of these keys in all sequences. Documents are contiguous; starts:
    where those of each sequence begin, of a single sequence that stands for all."""
    for row, of_row in enumerate(starts):
        rows = slice(row, row + 1) if len(starts) > 1 else slice(None)
        first = bisect_right(of_row, max(queries.start, keys.start)) - 1
        last = bisect_right(of_row, min(queries.stop, keys.stop) - 1)
        for start, stop in zip(of_row[first:last], [*of_row[first + 1 : last + 1], ENDLESS]):
            yield from meetings(rows, queries.within(start, stop), keys.within(start, stop), manner)


def meetings(rows: slice, queries: Span, keys: Span, manner: Manner) -> Iterator[Piece]:
    """The pieces of these queries and keys of one document, together exactly what is seen, but for
    the corners of bands."""
    window = manner.window or ENDLESS
    keys = keys.within(queries.start - window + 1, queries.stop)
    queries = queries.within(keys.start, keys.stop - 1 + window)
    if not keys.length or not queries.length:
        return
    reaches = keys.start > queries.stop - 1 - window  # the last query sees the first key
    seen = "band"
    if reaches and keys.stop - 1 <= queries.start:
        seen = "all"
    elif reaches and (keys.start, keys.stop) == (queries.start, queries.stop):
        seen = "causal"
    if queries.length > BLOCK and seen == "band" and reaches and manner.fused:
        yield from without_band(rows, queries, keys, manner)
        return
    if queries.length > BLOCK and (seen == "band" or not manner.fused):
        for start in range(queries.start, queries.stop, BLOCK):
            yield from meetings(rows, queries.within(start, start + BLOCK), keys, manner)
        return
    first, last = (
        max(keys.start, queries.stop - window),
        min(keys.stop, queries.start),
    )  # all queries see those between
    if seen == "band" and manner.fused and last - first >= BLOCK:
        for start, stop in ((keys.start, first), (first, last), (last, keys.stop)):
            yield from meetings(rows, queries, keys.within(start, stop), manner)
        return
    yield Piece(rows, queries, keys, seen)


def without_band(rows: slice, queries: Span, keys: Span, manner: Manner) -> Iterator[Piece]:
    """No window cuts: a square on the diagonal, the keys before it, and the queries after it."""
    own = queries.within(queries.start, keys.stop)
    corner = keys.within(queries.start, keys.stop)
    yield from meetings(rows, queries, keys.within(keys.start, queries.start), manner)
    yield from meetings(rows, own, corner, manner)
    yield from meetings(rows, queries.within(keys.stop, queries.stop), corner, manner)


class Outputs:
    """Outputs of queries (B, T, H, K) over the keys that they met so far: o (B, T, H, V) and lse
    (B, H, T), -inf before the first."""

    def __init__(self, q_BTHK: Tensor, V: int, manner: Manner, noise_BT: Tensor | None) -> None:
        (B, T, H), dtype = q_BTHK.shape[:3], working_dtype(q_BTHK)
        self.q = multipliable(q_BTHK, manner)
        self.manner = manner
        self.noise_BT = noise_BT
        self.o = q_BTHK.new_zeros(B, T, H, V, dtype=dtype)
        self.lse = q_BTHK.new_full((B, H, T), -torch.inf, dtype=dtype)

    def meet(self, k_BSGK: Tensor, v_BSGV: Tensor, pieces: Iterable[Piece]) -> None:
        k = multipliable(k_BSGK, self.manner)
        v = multipliable(v_BSGV, self.manner)
        for piece in pieces:
            at = (piece.rows, piece.queries.here)
            of = (piece.rows, piece.keys.here)
            o, lse = block(self.q[at], k[of], v[of], piece, self.manner, self.noise_BT)
            join(self.o[at], self.lse[piece.rows, :, piece.queries.here], o, lse)


class Gradients:
    """Gradients of the same queries, whose outputs and logsumexp are known; d_q (B, T, H, K) is
    added up here, in fp32."""

    def __init__(
        self,
        q: Tensor,
        o: Tensor,
        lse: Tensor,
        d_o: Tensor,
        manner: Manner,
        noise_BT: Tensor | None,
    ) -> None:
        self.q = multipliable(q, manner)
        self.o = multipliable(o, manner)
        self.d_o = multipliable(d_o.contiguous(), manner)
        self.lse = lse
        self.manner = manner
        self.noise_BT = noise_BT
        self.delta = (in_fp32(d_o) * in_fp32(o)).sum(-1).transpose(1, 2)
        self.d_q = torch.zeros_like(
            q, dtype=working_dtype(q), memory_format=torch.contiguous_format
        )

    def meet(
        self, k_BSGK: Tensor, v_BSGV: Tensor, d_k: Tensor, d_v: Tensor, pieces: Iterable[Piece]
    ) -> None:
        """Adds what these queries say to d_k and d_v."""
        k = multipliable(k_BSGK, self.manner)
        v = multipliable(v_BSGV, self.manner)
        for piece in pieces:
            at = (piece.rows, piece.queries.here)
            of = (piece.rows, piece.keys.here)
            of_rows = (piece.rows, slice(None), piece.queries.here)
            known = (self.o[at], self.lse[of_rows], self.d_o[at], self.delta[of_rows])
            parts = block_gradients(
                self.q[at], k[of], v[of], *known, piece, self.manner, self.noise_BT
            )
            for whole, where, part in zip((self.d_q, d_k, d_v), (at, of, of), parts):
                whole[where] += part


def attention_in_blocks(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    keys: int,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention -> (B, T, H, V) of the last T of S positions, whose keys come so many at a
    time as if they came by in a ring."""
    return _InBlocks.apply(q_BTHK, k_BSGK, v_BSGV, keys, Manner.of(q_BTHK, v_BSGV, window, scale))


def attention_in_blocks_reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    keys: int,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The reference: all scores at once. Same arguments and result."""
    assert keys > 0
    return attention_reference(q_BTHK, k_BSGK, v_BSGV, window=window, scale=scale)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: int, manner: Manner) -> Tensor:
        outputs = Outputs(q, v.shape[-1], manner, None)
        for here, pieces in key_blocks(q.shape[1], k.shape[1], keys, manner):
            outputs.meet(k[:, here], v[:, here], pieces)
        o = outputs.o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, outputs.lse)
        ctx.keys = keys
        ctx.manner = manner
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        gradients = Gradients(q, o, lse, d_o, ctx.manner, None)
        d_k = torch.zeros_like(k, dtype=working_dtype(k))
        d_v = torch.zeros_like(v, dtype=working_dtype(v))
        for here, pieces in key_blocks(q.shape[1], k.shape[1], ctx.keys, ctx.manner):
            gradients.meet(k[:, here], v[:, here], d_k[:, here], d_v[:, here], pieces)
        return gradients.d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


def key_blocks(
    T: int, S: int, keys: int, manner: Manner
) -> Iterator[tuple[slice, Iterator[Piece]]]:
    """Where so many of S keys at a time lie, and what the last T queries see of them."""
    queries = Span(S - T, S, 0)
    for start in range(0, S, keys):
        stop = min(start + keys, S)
        yield slice(start, stop), meetings(slice(None), queries, Span(start, stop, 0), manner)


def multipliable(x: Tensor, manner: Manner) -> Tensor:
    """x as the kernel takes it: on CUDA as it is; a CPU's kernel would round outputs to bf16 before
    they are joined."""
    if manner.fused and on_cuda(x):
        return x
    return in_fp32(x)


def join(o_BTHV: Tensor, lse_BHT: Tensor, other_o: Tensor, other_lse: Tensor) -> None:
    """Two softmaxes over different keys become one over both, in place of the first one. Nothing is
    exponentiated but differences that are below 0, and what has seen no key (-inf) has no weight,
    on either side."""
    share = torch.sigmoid(other_lse - lse_BHT).masked_fill_(other_lse == -torch.inf, 0.0)
    o_BTHV.lerp_(other_o.to(o_BTHV.dtype), share.transpose(1, 2)[..., None].to(o_BTHV.dtype))
    lse_BHT.copy_(torch.logaddexp(lse_BHT, other_lse))


def block(
    q: Tensor, k: Tensor, v: Tensor, piece: Piece, manner: Manner, noise_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(o, lse) of the queries and keys of a piece: by a kernel, or written out."""
    if manner.fused and (piece.seen != "band" or takes_mask(q)):
        return fused(q, k, v, manner.scale, piece.seen == "causal", bias_of(piece, manner, q))
    return written(
        q,
        k,
        v,
        manner.scale,
        seen_of(piece, manner, q.device),
        weights_kept(piece, manner, q, noise_BT),
        manner.p,
    )


def block_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    delta: Tensor,
    piece: Piece,
    manner: Manner,
    noise_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_q, d_k, d_v) of a piece. o, lse: of all keys; d_o: the gradient of that o; delta (B, H,
    T): rowsum(d_o * o)."""
    if manner.fused and (piece.seen != "band" or takes_mask(q)):
        known = (o, lse, d_o)
        causal = piece.seen == "causal"
        return fused_gradients(q, k, v, *known, manner.scale, causal, bias_of(piece, manner, q))
    seen = seen_of(piece, manner, q.device)
    kept = weights_kept(piece, manner, q, noise_BT)
    return written_gradients(q, k, v, lse, d_o, delta, manner.scale, seen, kept, manner.p)


def seen_of(piece: Piece, manner: Manner, device: torch.device) -> Tensor | None:
    """(T, S) bool: which keys of a piece each query sees; None for all."""
    if piece.seen == "all":
        return None
    query = torch.arange(piece.queries.start, piece.queries.stop, device=device)[:, None]
    key = torch.arange(piece.keys.start, piece.keys.stop, device=device)
    return (key <= query) & (key > query - (manner.window or ENDLESS))


def takes_mask(q: Tensor) -> bool:
    """Whether the kernel does, and gives the logsumexp. On a CPU, bands take 0.3 of the time of
    writing them out in the forward."""
    return not on_cuda(q)


def bias_of(piece: Piece, manner: Manner, q: Tensor) -> Tensor | None:
    """What is added to the scores of a band, for a kernel that has no other mask: (T, S), 0 or
    -inf."""
    if piece.seen != "band":
        return None
    seen = seen_of(piece, manner, q.device)
    assert seen is not None, "a band is never all"
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)


def weights_kept(piece: Piece, manner: Manner, q: Tensor, noise_BT: Tensor | None) -> Tensor | None:
    """(B, H, T, S) bool: which weights dropout leaves, the same ones as on whole sequences; None
    for all."""
    if manner.p == 0:
        return None
    assert noise_BT is not None, "dropout is made of noise"
    noise_BT = noise_BT[piece.rows, piece.queries.here]
    return weight_mask(
        noise_BT, q.shape[2], piece.keys.start, piece.keys.stop, manner.p, manner.first_head
    )


def written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None,
    kept: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The reference: o (B, T, H, V) and lse (B, H, T) with all scores written out, in the working
    dtype."""
    scores_BGRTS = scores(q, k, scale, seen)
    lse = scores_BGRTS.logsumexp(-1)
    weights = dropped((scores_BGRTS - lse[..., None]).exp_(), kept, p)
    return torch.einsum("bgrts,bsgv->btgrv", weights, in_fp32(v)).flatten(2, 3), lse.flatten(1, 2)


def written_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    d_o: Tensor,
    delta: Tensor,
    scale: float,
    seen: Tensor | None,
    kept: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: (d_q, d_k, d_v) with all scores written out; lse and delta of all keys that
    the queries see."""
    by_group = (k.shape[2], q.shape[2] // k.shape[2])
    lse = lse.unflatten(1, by_group)[..., None]
    delta = delta.unflatten(1, by_group)[..., None]
    weights = (scores(q, k, scale, seen) - lse).exp_()
    q = in_fp32(q).unflatten(2, by_group)
    d_o = in_fp32(d_o).unflatten(2, by_group)
    d_v = torch.einsum("bgrts,btgrv->bsgv", dropped(weights, kept, p), d_o)
    d_weights = dropped(torch.einsum("btgrv,bsgv->bgrts", d_o, in_fp32(v)), kept, p)
    d_scores = weights.mul_(d_weights.sub_(delta)).mul_(scale)
    d_q = torch.einsum("bgrts,bsgk->btgrk", d_scores, in_fp32(k)).flatten(2, 3)
    return d_q, torch.einsum("bgrts,btgrk->bsgk", d_scores, q), d_v


def scores(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """(B, G, H / G, T, S), -inf where a key is not seen. Products are not changed in place: a block
    that is recomputed may keep them (activation_checkpoint.policy)."""
    q = (in_fp32(q) * scale).unflatten(2, (k.shape[2], -1))
    found = torch.einsum("btgrk,bsgk->bgrts", q, in_fp32(k))
    if seen is None:
        return found
    return found.masked_fill(~seen, -torch.inf)


def dropped(weights_BGRTS: Tensor, kept: Tensor | None, p: float) -> Tensor:
    if kept is None:
        return weights_BGRTS
    return torch.where(kept.view_as(weights_BGRTS), weights_BGRTS / (1 - p), 0.0)


def fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by the kernels behind torch's SDPA, which are private but give the logsumexp that
    the public face drops: torch's own context parallelism calls them so. Equal head sizes only: the
    smaller one is padded with zeros.

    The path of CUDA follows their schemas and that caller; where this was written no GPU was at
    hand, so that `longfire doctor` is the first to run it. Its outputs are rounded to half
    precision once a block, before they are joined in fp32.
    """
    V = v.shape[-1]
    q, k, v = for_kernel(q, k, v)
    if q.device.type == "cuda":
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    return o.transpose(1, 2)[..., :V], lse


def fused_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_q, d_k, d_v) by the same kernels, which make delta of o and d_o themselves."""
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    q, k, v, o, d_o = for_kernel(q, k, v, o, d_o)
    lse = lse.contiguous()
    if q.device.type == "cuda":
        unused = torch.zeros(
            2, dtype=torch.uint64, device=q.device
        )  # the state of a dropout that does not happen
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d_o,
            q,
            k,
            v,
            o,
            lse,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            unused,
            unused[:1],
            scale=scale,
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_o, q, k, v, o, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    return tuple(x.transpose(1, 2)[..., :size] for x, size in zip(found, sizes))


def for_kernel(*tensors: Tensor) -> list[Tensor]:
    """(B, T, H, size) -> (B, H, T, one size for all), a multiple of 8 on CUDA."""
    size = max(x.shape[-1] for x in tensors)
    size += -size % 8 if tensors[0].device.type == "cuda" else 0
    return [
        (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))).transpose(1, 2)
        for x in tensors
    ]
