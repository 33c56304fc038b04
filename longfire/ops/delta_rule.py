"""The delta rule with decay: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,
o_t = scale * S_t^T q_t.

What the key k_t held is erased before v_t is written. No decay is DeltaNet (Schlag 2021; Yang
2024a), a scalar Gated DeltaNet (Yang 2024b, eq. 10), a vector over the key channels KDA (Kimi
Linear, 2025). The state decays first, and the decayed state is what is erased: fla's order.
"""

from functools import partial
from typing import Any

import torch
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


def delta_rule(
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
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V), fp32 (float64 for float64
    inputs).

    beta: how much of what the key held is replaced, 0 to 2; the state stays bounded if |k| <= 1 and
    beta <= 2.
    g: log decay (<= 0) of each step: None, (B, T, H), or (B, T, H, K) per key channel. scale:
    K**-0.5 if None. With documents the state starts from zero at each of them; the initial state
    belongs to the first document of each row, and the final state is that of its last.
    Differentiable in every tensor.
    """
    return FORMS[chosen("delta_rule")](
        q_BTHK,
        k_BTHK,
        v_BTHV,
        beta_BTH,
        g,
        scale=scale,
        initial_state_BHKV=initial_state_BHKV,
        documents=documents,
    )


def delta_rule_reference(
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
    """The truth: the recurrence, a token at a time. Same arguments and result."""
    (B, T, H, K), dtype = q_BTHK.shape, working_dtype(q_BTHK)
    scale = K**-0.5 if scale is None else scale
    S_BHKV = start(initial_state_BHKV, q_BTHK, v_BTHV)
    g = q_BTHK.new_zeros(H) if g is None else g
    g_BTHK = (g if g.dim() == 4 else g[..., None]).expand(B, T, H, K)
    tokens = zip(
        *(x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g_BTHK))
    )
    outputs = []
    for t, (q_BHK, k_BHK, v_BHV, beta_BH1, g_BHK) in enumerate(tokens):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            S_BHKV = torch.where(same_B[:, None, None, None], S_BHKV, 0.0)
        S_BHKV = g_BHK.exp()[..., None] * S_BHKV
        held_BHV = (k_BHK[..., None, :] @ S_BHKV).squeeze(-2)
        S_BHKV = S_BHKV + k_BHK[..., None] * (beta_BH1 * (v_BHV - held_BHV))[..., None, :]
        outputs.append(scale * (q_BHK[..., None, :] @ S_BHKV).squeeze(-2))
    return torch.stack(outputs, 1).to(q_BTHK.dtype), S_BHKV


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


def delta_rule_fla(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """fla's kernels; same arguments and result."""
    from longfire.ops import kernels  # imports fla, which is not everywhere

    return kernels.delta_rule(*args, **kwargs)


FORMS = {"reference": delta_rule_reference, "torch": delta_rule_chunkwise, "fla": delta_rule_fla}
