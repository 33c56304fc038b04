"""The delta rule with decay by chunks of tokens (ops/delta_rule.py)."""

from functools import partial

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


def delta_rule_chunkwise(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks of tokens by matrix products (the UT transform: Yang 2024a section 3.2, with decay
    Yang 2024b section 3.3)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.shape[1] == 1:
        return step(
            start(initial_state_BHKV, q_BTHK, v_BTHV),
            q_BTHK,
            k_BTHK,
            v_BTHV,
            beta_BTH,
            g,
            scale=scale,
        )
    run = partial(through_chunks, partial(work, scale=scale))
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g, continues(documents))
    o_BTHV, S_BHKV = by_segments(run, start(initial_state_BHKV, q_BTHK, v_BTHV), inputs)
    return o_BTHV.to(q_BTHK.dtype), S_BHKV


def step(
    S_BHKV: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One token, as generation asks for it: the recurrence itself, at a fourteenth of what a chunk
    of one costs."""
    dtype = S_BHKV.dtype
    key = k[:, 0, :, None].to(dtype)
    if g is not None:
        S_BHKV = S_BHKV * step_decays(g, None, q)[:, 0, :, :, None]
    new = beta[:, 0, :, None, None].to(dtype) * (v[:, 0, :, None].to(dtype) - key @ S_BHKV)
    S_BHKV = S_BHKV.addcmul(key.mT, new)
    o_BH1V = (q[:, 0, :, None].to(dtype) * scale) @ S_BHKV
    return o_BH1V.transpose(1, 2).to(q.dtype), S_BHKV


def work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    continues_BT: Tensor | None,
    *,
    scale: float,
) -> Worked:
    """The rule is decayed linear attention S_t = diag(a_t) S_{t-1} + k_t u_t^T with values u_t =
    beta_t (v_t - held_t) that depend on the state: held_i = (k_i a_1..a_i)^T S_in + sum_{j<i} P_ij
    u_j, P the products of keys with keys. So (I + diag(beta) P below the diagonal) u = diag(beta)
    (v - from_start_k S_in): one triangular system per chunk gives u = found + read S_in, and S_out
    = diag(whole) S_in + to_end^T u.
    """
    tokens = q.shape[1]
    dtype = working_dtype(q)
    size = chunk_size(tokens)
    decay = chunked(step_decays(g, continues_BT, q), size, fill=1.0)
    q = in_chunks(scaled(q, scale), size)
    k = in_chunks(k.to(dtype), size)
    v = chunked(v.to(dtype), size)
    parts = decayed([q, k], [k], decay)
    products = parts.products[0][0]
    from_start = parts.from_start[0]

    def outputs(states: Tensor, written: Tensor) -> Tensor:
        return unchunked(products @ written + from_start @ states, tokens)

    return Worked(change(parts, v, chunked(beta.to(dtype), size)), outputs)


def change(parts: Decayed, v: Tensor, beta: Tensor) -> LowRank:
    """What each chunk does to the state. The last queries of the parts are the keys."""
    right_sides = beta * v, -beta * parts.from_start[-1]
    found, read = UnitLowerSolve.apply(beta * parts.products[-1][0], *right_sides)
    return LowRank(parts.whole, parts.to_end[0], found, read)


def chunk_maps(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """(transition, write) of chunks whose outputs nobody asks for; k, v, beta, decay (B, N, H, C,
    ...)."""
    chunks = change(decayed([k], [k], decay), v, beta)
    return chunks.transition, chunks.write
