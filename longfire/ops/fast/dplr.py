"""Diagonal plus low rank by chunks of tokens (ops/dplr.py)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.fast.chunkwise import (
    Decayed,
    by_segments,
    chunk_size,
    chunked,
    decayed,
    in_chunks,
    scaled,
    step_decays,
    unchunked,
)
from longfire.ops.fast.low_rank import LowRank, UnitLowerSolve, Worked, through_chunks
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import start


def dplr_chunkwise(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    c_BTHK: Tensor,
    b_BTHK: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks of tokens by matrix products, as in delta_rule.py. Same arguments and result."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.shape[1] == 1:
        state_BHKV = start(initial_state_BHKV, q_BTHK, v_BTHV)
        return step(state_BHKV, q_BTHK, k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK, scale=scale)
    run = partial(through_chunks, partial(work, scale=scale))
    inputs = (q_BTHK, k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK, continues(documents))
    o_BTHV, S_BHKV = by_segments(run, start(initial_state_BHKV, q_BTHK, v_BTHV), inputs)
    return o_BTHV.to(q_BTHK.dtype), S_BHKV


def step(
    S_BHKV: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    b: Tensor,
    g: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token, as generation asks for it: the recurrence itself."""
    dtype = S_BHKV.dtype
    key = k[:, 0, :, :, None].to(dtype)
    to = b[:, 0, :, :, None].to(dtype)
    decay = g[:, 0, :, :, None].to(dtype)
    read = c[:, 0, :, None].to(dtype) @ S_BHKV
    S_BHKV = (S_BHKV * decay.exp()).addcmul(to, read).addcmul(key, v[:, 0, :, None].to(dtype))
    o_BH1V = (q[:, 0, :, None].to(dtype) * scale) @ S_BHKV
    return o_BH1V.transpose(1, 2).to(q.dtype), S_BHKV


def work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    b: Tensor,
    g: Tensor,
    continues_BT: Tensor | None,
    *,
    scale: float,
) -> Worked:
    """This is decayed linear attention with two kinds of keys, k_t with values v_t and b_t with
    values u_t = c_t^T S_{t-1}. What c_t reads is what a query at t - 1 would: so c stands a place
    earlier among the queries, and what its places give moves back by one. The first of a chunk
    reads S_in itself, and the first of a document nothing: there c is zero. With P the products of
    c with k and b, strictly below the diagonal after the move, u = P_k v + P_b u + c_from_start
    S_in, so one triangular system gives u = found + read S_in, and S_out = diag(whole) S_in +
    b_to_end^T u + k_to_end^T v.
    """
    tokens = q.shape[1]
    dtype = working_dtype(q)
    size = chunk_size(tokens)
    decay = chunked(step_decays(g, continues_BT, q), size, fill=1.0)
    c = of_own_document(c, continues_BT)
    q = in_chunks(scaled(q, scale), size)
    k = in_chunks(k.to(dtype), size)
    c = in_chunks(c.to(dtype), size)
    b = in_chunks(b.to(dtype), size)
    v = chunked(v.to(dtype), size)
    parts = decayed([q, a_place_earlier(c)], [k, b], decay)
    (with_k, with_b), from_start = parts.products[0], parts.from_start[0]

    def outputs(states: Tensor, written: Tensor) -> Tensor:
        return unchunked(with_k @ v + with_b @ written + from_start @ states, tokens)

    return Worked(change(parts, c, v), outputs)


def of_own_document(c: Tensor, continues_BT: Tensor | None) -> Tensor:
    """The first token of a document reads nothing."""
    if continues_BT is None:
        return c
    return torch.where(continues_BT[:, :, None, None], c, 0.0)


def a_place_earlier(c: Tensor) -> Tensor:
    return F.pad(c[..., 1:, :], (0, 0, 0, 1))


def change(parts: Decayed, c: Tensor, v: Tensor) -> LowRank:
    """What each chunk does to the state. The last queries of the parts are c, a place earlier."""
    ck, cb = (F.pad(products[..., :-1, :], (0, 0, 1, 0)) for products in parts.products[-1])
    c_from_start = torch.cat([c[..., :1, :], parts.from_start[-1][..., :-1, :]], -2)
    found, read = UnitLowerSolve.apply(-cb, ck @ v, c_from_start)
    k_to_end, b_to_end = parts.to_end
    return LowRank(parts.whole, b_to_end, found, read, added=k_to_end.mT @ v)


def chunk_maps(k: Tensor, v: Tensor, c: Tensor, b: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """(transition, write) of chunks whose outputs nobody asks for; all (B, N, H, C, ...)."""
    chunks = change(decayed([a_place_earlier(c)], [k, b], decay), c, v)
    return chunks.transition, chunks.write
