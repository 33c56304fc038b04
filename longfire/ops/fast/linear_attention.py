"""Linear attention with decay by chunks of tokens (ops/linear_attention.py)."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.fast.chunkwise import (
    Decayed,
    by_segments,
    chunk_size,
    chunked,
    decayed,
    decays_alone,
    in_chunks,
    scaled,
    scan,
    step_decays,
    through_chunks,
    unchunked,
)
from longfire.ops.fast.value_tree import value_tree
from longfire.ops.linear import working_dtype
from longfire.ops.linear_attention import for_heads_of
from longfire.ops.recurrence import start


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
