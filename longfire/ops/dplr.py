"""Diagonal plus low rank: S_t = diag(exp g_t) S_{t-1} + b_t (c_t^T S_{t-1}) + k_t v_t^T, o_t =
scale * S_t^T q_t.

RWKV-7 (Peng 2025): c_t is the negative of the key that is removed, b_t that key times its learning
rate. What c reads is the state before this step's decay. The delta rules are the case c = exp(g) *
k, b = -beta * k and beta * k written; ops/delta_rule.py computes them with half the work.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops import chosen
from longfire.ops.chunkwise import (
    Decayed,
    by_segments,
    chunk_size,
    chunked,
    decayed,
    in_chunks,
    scaled,
    start,
    step_decays,
    unchunked,
)
from longfire.ops.documents import Documents, continues
from longfire.ops.linear import working_dtype
from longfire.ops.low_rank import LowRank, UnitLowerSolve, Worked, through_chunks


def dplr(
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
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V), fp32 (float64 for float64
    inputs).

    c reads the state and b writes what was read; the state stays bounded if no diag(exp g) + b c^T
    lengthens a vector.
    g: log decay (<= 0) of each step per key channel. scale: K**-0.5 if None. With documents the
    state starts from zero at each of them; the initial state belongs to the first document of each
    row, and the final state is that of its last. Differentiable in every tensor.
    """
    return FORMS[chosen("dplr")](
        q_BTHK,
        k_BTHK,
        v_BTHV,
        c_BTHK,
        b_BTHK,
        g_BTHK,
        scale=scale,
        initial_state_BHKV=initial_state_BHKV,
        documents=documents,
    )


def dplr_reference(
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
    """The truth: the recurrence, a token at a time. Same arguments and result."""
    dtype = working_dtype(q_BTHK)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    S_BHKV = start(initial_state_BHKV, q_BTHK, v_BTHV)
    tokens = zip(*(x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK)))
    outputs = []
    for t, (q_BHK, k_BHK, v_BHV, c_BHK, b_BHK, g_BHK) in enumerate(tokens):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            S_BHKV = torch.where(same_B[:, None, None, None], S_BHKV, 0.0)
        read_BHV = (c_BHK[..., None, :] @ S_BHKV).squeeze(-2)
        S_BHKV = g_BHK.exp()[..., None] * S_BHKV + b_BHK[..., None] * read_BHV[..., None, :]
        S_BHKV = S_BHKV + k_BHK[..., None] * v_BHV[..., None, :]
        outputs.append(scale * (q_BHK[..., None, :] @ S_BHKV).squeeze(-2))
    return torch.stack(outputs, 1).to(q_BTHK.dtype), S_BHKV


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
    """Chunks of tokens by matrix products, as in ops/delta_rule.py. Same arguments and result."""
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


def dplr_fla(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """fla's kernels; same arguments and result."""
    from longfire.ops import kernels  # imports fla, which is not everywhere

    return kernels.dplr(*args, **kwargs)


FORMS = {"reference": dplr_reference, "torch": dplr_chunkwise, "fla": dplr_fla}
