"""The delta rule with decay: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t.

What the key k_t held is erased before v_t is written. No decay is DeltaNet (Schlag 2021; Yang 2024a), a scalar Gated
DeltaNet (Yang 2024b, eq. 10), a vector over the key channels KDA (Kimi Linear, 2025). The state decays first, and the
decayed state is what is erased: fla's order.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops import chosen
from longfire.ops.chunkwise import (
    Decayed,
    below_diagonal,
    by_segments,
    chunk_size,
    chunked,
    decayed,
    goes_on,
    on_diagonal,
    start,
    step_decays,
    through_chunks,
    unchunked,
)
from longfire.ops.documents import Documents
from longfire.ops.linear import working_dtype


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
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V), fp32 (float64 for float64 inputs).

    beta: how much of what the key held is replaced, 0 to 2; the state stays bounded if |k| <= 1 and beta <= 2.
    g: log decay (<= 0) of each step: None, (B, T, H), or (B, T, H, K) per key channel. scale: K**-0.5 if None.
    With documents the state starts from zero at each of them; the initial state belongs to the first document of each row,
    and the final state is that of its last. Differentiable in every tensor.
    """
    return FORMS[chosen("delta_rule")](
        q_BTHK, k_BTHK, v_BTHV, beta_BTH, g, scale=scale, initial_state_BHKV=initial_state_BHKV, documents=documents
    )


def delta_rule_slow(
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
    tokens = zip(*(x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g_BTHK)))
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
    """Chunks of tokens by matrix products (the UT transform: Yang 2024a section 3.2, with decay Yang 2024b section 3.3)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.shape[1] == 1:
        return step(start(initial_state_BHKV, q_BTHK, v_BTHV), q_BTHK, k_BTHK, v_BTHV, beta_BTH, g, scale=scale)
    run = partial(through_chunks, partial(work, scale=scale), read)
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g, goes_on(documents))
    o_BTHV, S_BHKV = by_segments(run, start(initial_state_BHKV, q_BTHK, v_BTHV), inputs)
    return o_BTHV.to(q_BTHK.dtype), S_BHKV


def step(
    S_BHKV: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One token, as generation asks for it: the recurrence itself, at a fourteenth of what a chunk of one costs."""
    dtype = S_BHKV.dtype
    key = k[:, 0, :, None].to(dtype)
    if g is not None:
        S_BHKV = S_BHKV * step_decays(g, None, q)[:, 0, :, :, None]
    new = beta[:, 0, :, None, None].to(dtype) * (v[:, 0, :, None].to(dtype) - key @ S_BHKV)
    S_BHKV = S_BHKV.addcmul(key.mT, new)
    o_BH1V = (q[:, 0, :, None].to(dtype) * scale) @ S_BHKV
    return o_BH1V.transpose(1, 2).to(q.dtype), S_BHKV


class Worked(NamedTuple):
    """What chunks come to before a state is known."""

    tokens: int
    transition: Tensor
    write: Tensor
    products: Tensor  # of queries and keys
    from_start: Tensor  # queries
    written: Tensor
    erased: Tensor


def work(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, goes_on_BT: Tensor | None, *, scale: float
) -> Worked:
    """The rule is decayed linear attention S_t = diag(a_t) S_{t-1} + k_t u_t^T with values u_t = beta_t (v_t - held_t) that
    depend on the state: held_i = (k_i a_1..a_i)^T S_in + sum_{j<i} P_ij u_j, P the products of keys with keys. So
    (I + diag(beta) P below the diagonal) u = diag(beta) (v - from_start_k S_in): one triangular inverse per chunk gives
    u = written - erased S_in, and S_out = (diag(whole) - to_end^T erased) S_in + to_end^T written.
    """
    tokens, dtype = q.shape[1], working_dtype(q)
    size = chunk_size(tokens)
    decay = chunked(step_decays(g, goes_on_BT, q), size, fill=1.0)
    q, k, v = chunked(q.to(dtype) * scale, size), chunked(k.to(dtype), size), chunked(v.to(dtype), size)
    parts = decayed([q, k], [k], decay)
    written, erased = solved(parts, k, v, chunked(beta.to(dtype), size))
    return Worked(tokens, *maps(parts, k, written, erased), parts.products[0][0], parts.from_start[0], written, erased)


def read(worked: Worked, states: Tensor) -> Tensor:
    """Outputs, given the state before each chunk."""
    o = worked.products @ (worked.written - worked.erased @ states) + worked.from_start @ states
    return unchunked(o, worked.tokens)


def solved(parts: Decayed, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """written and erased: u = written - erased S_in in every chunk. The last queries of the parts are the keys."""
    return UnitLowerSolve.apply(beta * parts.products[-1][0], beta * v, beta * parts.from_start[-1])


def maps(parts: Decayed, k: Tensor, written: Tensor, erased: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk does to the state: S_out = transition S_in + write."""
    whole, (to_end,) = parts.whole.squeeze(-1).expand(*k.shape[:-2], k.shape[-1]), parts.to_end
    return torch.diag_embed(whole) - to_end.mT @ erased, to_end.mT @ written


def chunk_maps(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """The same of chunks whose outputs nobody asks for; k, v, beta, decay (B, N, H, C, ...)."""
    parts = decayed([k], [k], decay)
    return maps(parts, k, *solved(parts, k, v, beta))


class UnitLowerSolve(torch.autograd.Function):
    """(I + the part of x below its diagonal)^-1 times a, and times b. The backward makes use of what was solved: with Y the
    solutions, d_a = solve^T d_Y and d_x = -d_a Y^T, where that of an inverse would be two products more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        inverse = unit_lower_inverse(x)
        of_a, of_b = inverse @ a, inverse @ b
        ctx.save_for_backward(inverse, of_a, of_b)
        return of_a, of_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_of_a: Tensor, d_of_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse, of_a, of_b = ctx.saved_tensors
        d_a, d_b = inverse.mT @ d_of_a, inverse.mT @ d_of_b
        d_x = (d_a @ of_a.mT).add_(d_b @ of_b.mT).tril_(-1).neg_()
        return d_x, d_a, d_b


# Rows of the blocks that are solved; larger ones are merged from them: at 64 rows in half the time on a CPU.
SOLVED = 16


def unit_lower_inverse(x: Tensor) -> Tensor:
    """The blocks on the diagonal are solved, and neighbours merged as (I + [[A, 0], [B, C]])^-1 = [[A', 0], [-C' B A', C']],
    with A' and C' their inverses. x (..., C, C), C a power of two."""
    size = min(x.shape[-1], SOLVED)
    inverse, blocks = torch.zeros_like(x), on_diagonal(x, size)
    eye = torch.eye(size, dtype=x.dtype, device=x.device).expand_as(blocks)
    solved = torch.linalg.solve_triangular(blocks, eye, upper=False, unitriangular=True)
    on_diagonal(inverse, size).copy_(solved)
    while size < x.shape[-1]:
        early, late = on_diagonal(inverse, size).unflatten(-3, (-1, 2)).unbind(-3)
        below_diagonal(inverse, size).copy_(late @ below_diagonal(x, size) @ early).neg_()
        size *= 2
    return inverse


def delta_rule_fla(*args: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """fla's kernels; same arguments and result."""
    from longfire.ops import kernels  # imports fla, which is not everywhere

    return kernels.delta_rule(*args, **kwargs)


FORMS = {"slow": delta_rule_slow, "torch": delta_rule_chunkwise, "fla": delta_rule_fla}
