"""Linear attention with decay: S_t = diag(exp g_t) S_{t-1} diag(exp gv_t) + k_t v_t^T, o_t = scale
* S_t^T q_t.

No decay is linear attention (Katharopoulos 2020), a constant one per head RetNet's retention (Sun
2023), a scalar Mamba-2 (Dao 2024), a vector over the key channels GLA (Yang 2023, eq. 3) and HGRN2,
a vector over the value channels the first pass of gated slot attention (Zhang 2024, where the
values are the slots).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longfire.ops import chosen
from longfire.ops.chunkwise import (
    Decayed,
    by_segments,
    chunk_size,
    chunked,
    decayed,
    decays_alone,
    in_chunks,
    scaled,
    scan,
    start,
    step_decays,
    through_chunks,
    unchunked,
)
from longfire.ops.documents import Documents, continues
from longfire.ops.linear import working_dtype
from longfire.ops.value_tree import value_tree


def linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, H, K, V), fp32 (float64 for float64
    inputs).

    g: log decay (<= 0) of each step: None, (H,) constant per head, (B, T, H), or (B, T, H, K) per
    key channel.
    gv: log decay (<= 0) of each step per value channel, (B, T, H, V), or None.
    scale: K**-0.5 if None. With documents the state starts from zero at each of them; the initial
    state belongs to the first document of each row, and the final state is that of its last.
    Differentiable in every tensor.

    k, v, g, gv and the state may have fewer heads than q: each serves as many neighbouring heads of
    q as divide them. Or q and k have fewer heads than v, g, gv and the state (Mamba-2's C and B).
    What is shared is worked on once, but with gv, and with a vector g in the second case: no mixer
    asks for these, and they are computed as if all had heads of their own.
    """
    form = partial(FORMS[chosen("linear_attention")], scale=scale, documents=documents)
    if gv is not None or (g is not None and g.dim() == 4):
        q_BTHK, k_BTHK = for_heads_of(v_BTHV, q_BTHK, k_BTHK)
    if gv is None or q_BTHK.shape[2] == k_BTHK.shape[2]:
        return form(q_BTHK, k_BTHK, v_BTHV, g, gv=gv, initial_state_BHKV=initial_state_BHKV)
    sets_of_queries = q_BTHK.unflatten(2, (k_BTHK.shape[2], -1)).unbind(3)
    results = []
    for q in sets_of_queries:
        results.append(form(q, k_BTHK, v_BTHV, g, gv=gv, initial_state_BHKV=initial_state_BHKV))
    return torch.stack([o_BTHV for o_BTHV, _ in results], 3).flatten(2, 3), results[0][1]


def linear_attention_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: the recurrence, a token at a time. Same arguments and result."""
    q_BTHK, k_BTHK = for_heads_of(v_BTHV, q_BTHK, k_BTHK)
    (B, T, H, K), dtype = k_BTHK.shape, working_dtype(q_BTHK)
    scale = K**-0.5 if scale is None else scale
    S_BHKV = start(initial_state_BHKV, k_BTHK, v_BTHV)
    g = q_BTHK.new_zeros(H) if g is None else g
    g_BTHK = (g if g.dim() == 4 else g[..., None]).expand(B, T, H, K)
    gv_BTHV = q_BTHK.new_zeros(1).expand_as(v_BTHV) if gv is None else gv
    tokens = zip(*(x.to(dtype).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, gv_BTHV)))
    outputs = []
    for t, (q_BHK, k_BHK, v_BHV, g_BHK, gv_BHV) in enumerate(tokens):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            S_BHKV = torch.where(same_B[:, None, None, None], S_BHKV, 0.0)
        S_BHKV = g_BHK.exp()[..., None] * S_BHKV * gv_BHV.exp()[..., None, :]
        S_BHKV = S_BHKV + k_BHK[..., None] * v_BHV[..., None, :]
        outputs.append(scale * (q_BHK.unflatten(1, (H, -1)) @ S_BHKV).flatten(1, 2))
    return torch.stack(outputs, 1).to(q_BTHK.dtype), S_BHKV


def linear_attention_chunkwise(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks of tokens by matrix products, the state from chunk to chunk: work linear in T (Yang
    2023, section 4)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.shape[1] == 1:
        return step(
            start(initial_state_BHKV, k_BTHK, v_BTHV), q_BTHK, k_BTHK, v_BTHV, g, gv, scale=scale
        )
    run = partial(segment, scale=scale)
    inputs = (q_BTHK, k_BTHK, v_BTHV, g, gv, continues(documents))
    o_BTHV, S_BHKV = by_segments(run, start(initial_state_BHKV, k_BTHK, v_BTHV), inputs)
    return o_BTHV.to(q_BTHK.dtype), S_BHKV


def step(
    S_BHKV: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token, as generation asks for it: the recurrence itself, at a quarter of what a chunk of
    one costs."""
    (q, k), dtype = for_heads_of(v, q, k), S_BHKV.dtype
    key = k[:, 0, :, :, None].to(dtype)
    value = v[:, 0, :, None].to(dtype)
    if g is not None:
        S_BHKV = S_BHKV * step_decays(g, None, q)[:, 0, :, :, None]
    if gv is not None:
        S_BHKV = S_BHKV * step_decays(gv, None, v)[:, 0, :, None]
    S_BHKV = S_BHKV.addcmul(key, value)
    o_BHGV = (q[:, 0].unflatten(1, (k.shape[2], -1)).to(dtype) * scale) @ S_BHKV
    return o_BHGV.flatten(1, 2)[:, None].to(q.dtype), S_BHKV


def segment(
    S_BHKV: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor | None,
    continues_BT: Tensor | None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs and state after some tokens, given the state before them."""
    tokens = q.shape[1]
    dtype = S_BHKV.dtype
    size = chunk_size(tokens)
    if k.shape[2] < v.shape[2]:
        decay_BTH1 = step_decays(g, continues_BT, v).expand(len(v), -1, v.shape[2], -1)
        o, S_BHKV = in_groups(
            S_BHKV,
            chunked(scaled(q, scale), size),
            chunked(k.to(dtype), size),
            chunked(v.to(dtype).unflatten(2, (q.shape[2], -1)).flatten(-2), size),
            chunked(decay_BTH1, size, fill=1.0),
        )
        return unchunked(o, tokens).unflatten(-1, (-1, v.shape[-1])).flatten(2, 3), S_BHKV
    if gv is None:
        return through_chunks(partial(work, scale=scale), read, S_BHKV, q, k, v, g, continues_BT)
    worked = work(q, k, v, g, continues_BT, scale=scale)
    o, S_BHKV = with_value_decay(
        S_BHKV, worked.parts, worked.v, chunked(gv.to(dtype).exp(), size, fill=1.0)
    )
    return unchunked(o, tokens), S_BHKV


class Worked(NamedTuple):
    """What chunks come to before a state is known."""

    tokens: int
    parts: Decayed
    v: Tensor

    @property
    def transition(self) -> Tensor:
        return self.parts.whole

    @property
    def write(self) -> Tensor:
        return self.parts.to_end[0].mT @ self.v


def work(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, continues_BT: Tensor | None, *, scale: float
) -> Worked:
    """Chunks of as many heads of k as of v; q may have more of them, each set of which is read by
    itself."""
    tokens = q.shape[1]
    dtype = working_dtype(q)
    size = chunk_size(tokens)
    decay = chunked(step_decays(g, continues_BT, k), size, fill=1.0)
    queries = []
    for x in scaled(q, scale).unflatten(2, (k.shape[2], -1)).unbind(3):
        queries.append(in_chunks(x, size))
    k = in_chunks(k.to(dtype), size)
    v = chunked(v.to(dtype), size)
    return Worked(tokens, decayed(queries, [k], decay), v)


def read(worked: Worked, states: Tensor) -> Tensor:
    """Outputs, given the state before each chunk."""
    tokens, parts, v = worked
    o = []
    for (pair,), query in zip(parts.products, parts.from_start):
        o.append(unchunked(pair @ v + query @ states, tokens))
    if len(o) == 1:
        return o[0]
    return torch.stack(o, 3).flatten(2, 3)


def with_value_decay(
    S_BHKV: Tensor, parts: Decayed, v: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where the values' channels decay too (v and decay: (B, N, H, C, V)). The state is
    scanned as one long vector, values outside: each of its V x K numbers has a decay of its own."""
    inside, v_to_end, from_start = value_tree(parts.products[0][0], v, decay)
    write = v_to_end.mT @ parts.to_end[0]
    whole = from_start[..., -1, :, None] * parts.whole.mT
    vectors = [x.flatten(-2)[..., None] for x in (whole.expand_as(write), write, S_BHKV.mT)]
    states, last = (x.squeeze(-1).unflatten(-1, write.shape[-2:]).mT for x in scan(*vectors))
    return inside + (parts.from_start[0] @ states) * from_start, last


def in_groups(
    S_BHKV: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where G heads of q and k (B, N, G, C, K) serve R of v's each, side by side: v and
    outputs (B, N, G, C, R * V), decay (B, N, G * R, C, 1). Scores are made once a group, and the
    decays of writing and reading go to the values, not to copies of the keys; the state is scanned
    with the group's values outside, each with the decay of its head."""
    G, (H, V) = q.shape[2], (S_BHKV.shape[1], S_BHKV.shape[-1])
    R = H // G
    whole, to_end, from_start, pairs = decays_alone(decay)
    to_end, from_start = (
        x.unflatten(2, (G, R)).transpose(3, 4) for x in (to_end, from_start)
    )  # (B, N, G, C, R, 1)
    v_BNGCRV = v.unflatten(-1, (R, V))
    scores = (q @ k.mT)[:, :, :, None] * pairs.unflatten(2, (G, R))
    inside = (scores @ v_BNGCRV.transpose(3, 4)).transpose(3, 4)
    write = (v_BNGCRV * to_end).flatten(-2).mT @ k
    whole = whole.unflatten(2, (G, R)).expand(-1, -1, -1, -1, V, -1).flatten(3, 4)
    states, last = scan(whole, write, S_BHKV.mT.unflatten(1, (G, R)).flatten(2, 3))
    read = (q @ states.mT).unflatten(-1, (R, V))
    return torch.addcmul(inside, read, from_start).flatten(-2), last.unflatten(2, (R, V)).flatten(
        1, 2
    ).mT


def for_heads_of(v_BTHV: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, where they have fewer heads than v, for every head of v."""
    times = v_BTHV.shape[2] // k.shape[2]
    if times <= 1:
        return (q, k)
    return (q.repeat_interleave(times, 2), k.repeat_interleave(times, 2))


def linear_attention_fla(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """fla's kernels; same arguments and result."""
    from longfire.ops import kernels  # imports fla, which is not everywhere

    return kernels.linear_attention(*for_heads_of(v_BTHV, q_BTHK, k_BTHK), v_BTHV, g, **kwargs)


FORMS = {
    "reference": linear_attention_reference,
    "torch": linear_attention_chunkwise,
    "fla": linear_attention_fla,
}
