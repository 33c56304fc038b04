"""What a segment of a row does to the state: S_out = M S_in + B, without the outputs of its tokens.

All recurrences here are linear in the state, so that a segment, whatever its length, is such a map;
maps of neighbours compose to that of both. Processes that share a row exchange these maps, not
states (parallel/context.py; for decayed linear attention this is LASP-2, Sun 2025). M is a number
for each channel where channels decay by themselves, a matrix K x K where keys are erased.

Each map takes the arguments of its op and follows the same rules: the state starts from zero at
each document, the state before the segment belongs to its first document, the one after it to its
last.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops import chosen, low_rank
from longfire.ops import delta_rule as delta
from longfire.ops import dplr as general
from longfire.ops import linear_attention as plain
from longfire.ops.chunkwise import chunk_size, chunked, goes_on, scan, segments_of, step_decays
from longfire.ops.documents import Documents
from longfire.ops.linear import working_dtype
from longfire.ops.selective_scan import selective_scan


class Affine(NamedTuple):
    """state -> transition state + write: what some tokens do to the state. transition: a matrix (B,
    H, K, K), or numbers that fit the state's shape."""

    transition: Tensor
    write: Tensor
    is_matrix: bool

    def __call__(self, state: Tensor) -> Tensor:
        moved = self.transition @ state if self.is_matrix else self.transition * state
        return moved + self.write


def linear_attention_map(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/linear_attention.py: B = sum_t (k_t a_{t+1}..a_T) (v_t b_{t+1}..b_T)^T, M the decays
    of all tokens; fp32 (or float64)."""
    k_BTHK, v_BTHV = k_BTHK.to(working_dtype(k_BTHK)), v_BTHV.to(working_dtype(v_BTHV))
    key_whole, key_to_end = decays_to_end(g, k_BTHK)
    value_whole, value_to_end = decays_to_end(gv, v_BTHV)
    alive_BT = None if documents is None else documents.ids_BT == documents.ids_BT[:, -1:]
    if alive_BT is not None:  # what was written in an earlier document is gone
        value_to_end = torch.where(alive_BT[..., None, None], value_to_end, 0.0)
        value_whole = torch.where(alive_BT[:, :1, None, None], value_whole, 0.0)
    if (
        key_to_end.shape[-1] == 1
    ):  # a number for each head may go with the values, whose heads are as many or more
        key_to_end, value_to_end = (
            torch.ones_like(key_to_end[..., :1, :]),
            value_to_end * key_to_end,
        )
    groups = (k_BTHK.shape[2], -1)
    v_BTGRV = (v_BTHV * value_to_end).unflatten(2, groups)
    write = torch.einsum("btgk,btgrv->bgrkv", k_BTHK * key_to_end, v_BTGRV).flatten(1, 2)
    transition = key_whole.transpose(1, 2).mT * value_whole.transpose(1, 2)
    return Affine(transition.expand(len(write), write.shape[1], -1, -1), write, is_matrix=False)


def decays_to_end(g: Tensor | None, like_BTHX: Tensor) -> tuple[Tensor, Tensor]:
    """The decay of all tokens (1 or B, 1, H or 1, X or 1), and that of the tokens after each one (1
    or B, T, ...).

    Sums of what comes after, not differences of sums: exact to rounding where decays are strong.
    """
    T, dtype = like_BTHX.shape[1], like_BTHX.dtype
    if g is None:
        return like_BTHX.new_ones(1, 1, 1, 1), like_BTHX.new_ones(1, 1, 1, 1)
    if g.dim() == 1:
        after_T = torch.arange(T - 1, -1, -1, dtype=dtype, device=g.device)
        return (T * g.to(dtype)).exp()[None, None, :, None], torch.outer(
            after_T, g.to(dtype)
        ).exp()[None, :, :, None]
    g = (g if g.dim() == 4 else g[..., None]).to(dtype)
    after = F.pad(g[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
    return g.sum(1, keepdim=True).exp(), after.exp()


def delta_rule_map(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/delta_rule.py: the maps of chunks, folded up from the left."""

    dtype = working_dtype(k_BTHK)

    def maps() -> Iterator[tuple[Tensor, Tensor]]:
        for k, v, beta, g_, goes_on_BT in segments_of(
            (k_BTHK, v_BTHV, beta_BTH[..., None], g, goes_on(documents))
        ):
            size = chunk_size(k.shape[1])
            decay = chunked(step_decays(g_, goes_on_BT, k), size, fill=1.0)
            yield delta.chunk_maps(*(chunked(x.to(dtype), size) for x in (k, v, beta)), decay)

    return folded(maps())


def dplr_map(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    c_BTHK: Tensor,
    b_BTHK: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/dplr.py: the maps of chunks, folded up from the left."""

    dtype = working_dtype(k_BTHK)

    def maps() -> Iterator[tuple[Tensor, Tensor]]:
        for k, v, c, b, g, goes_on_BT in segments_of(
            (k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK, goes_on(documents))
        ):
            size = chunk_size(k.shape[1])
            decay = chunked(step_decays(g, goes_on_BT, k), size, fill=1.0)
            c = general.of_own_document(c, goes_on_BT)
            yield general.chunk_maps(*(chunked(x.to(dtype), size) for x in (k, v, c, b)), decay)

    return folded(maps())


def selective_scan_map(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/selective_scan.py: B is the state of a scan from zero, M = exp(A sum of dt)."""
    _, write = selective_scan(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, documents=documents)
    transition = (dt_BTD.to(write.dtype).sum(1)[..., None] * A_DN.to(write.dtype)).exp()
    if documents is not None:
        same_B = documents.ids_BT[:, 0] == documents.ids_BT[:, -1]
        transition = torch.where(same_B[:, None, None], transition, 0.0)
    return Affine(transition, write, is_matrix=False)


def folded(chunks: Iterable[tuple[Tensor, Tensor]]) -> Affine:
    """The map of all chunks, given (transition, write) of each, (B, N, H, K, ...) of some chunks at
    a time, in order.

    Matrices are folded up from the left: the state that began as zero is carried beside the one
    that began as the identity.
    """
    whole = state = None
    for transition, write in chunks:
        is_matrix, (B, _, H, K, V) = transition.shape[-1] != 1, write.shape
        if state is None:
            state = write.new_zeros(B, H, K, V)
            if is_matrix:
                state = torch.cat(
                    [
                        state,
                        torch.eye(K, dtype=write.dtype, device=write.device).expand(B, H, K, K),
                    ],
                    -1,
                )
        state = scan(transition, F.pad(write, (0, K)) if is_matrix else write, state)[1]
        if not is_matrix:
            some = transition.prod(1)
            whole = some if whole is None else whole * some
    if not is_matrix:
        return Affine(whole.expand(B, H, -1, -1), state, is_matrix)
    write, transition = state.split((V, K), -1)
    return Affine(transition, write, is_matrix)


def around(
    work: Callable[..., Any],
    read: Callable[[Any, Tensor], Tensor],
    inputs: tuple[Tensor | None, ...],
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs of tokens whose state before them follows from their own map (and those of others):
    the chunks are worked on once, for the map and for the outputs. work(*inputs) gives what has a
    `transition` and a `write`; read(that, states) the outputs."""
    worked = [work(*segment) for segment in segments_of(inputs)]
    maps = [(one.transition, one.write) for one in worked]
    state, outputs = state_before(folded(maps)), []
    for one, (transition, write) in zip(worked, maps):
        states, state = scan(transition, write, state)
        outputs.append(read(one, states))
    return torch.cat(outputs, 1)


def linear_attention_around(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs alone, of tokens whose state before them follows from their own map (`around`):
    without gv, and as many heads of k as of v."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q_BTHK, k_BTHK, v_BTHV, g, goes_on(documents))
    return around(partial(plain.work, scale=scale), plain.read, inputs, state_before).to(
        q_BTHK.dtype
    )


def delta_rule_around(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs alone, of tokens whose state before them follows from their own map (`around`)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None], g, goes_on(documents))
    return around(partial(delta.work, scale=scale), low_rank.read, inputs, state_before).to(
        q_BTHK.dtype
    )


def dplr_around(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    c_BTHK: Tensor,
    b_BTHK: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    documents: Documents | None = None,
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs alone, of tokens whose state before them follows from their own map (`around`)."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q_BTHK, k_BTHK, v_BTHV, c_BTHK, b_BTHK, g_BTHK, goes_on(documents))
    return around(partial(general.work, scale=scale), low_rank.read, inputs, state_before).to(
        q_BTHK.dtype
    )


class Recurrence(NamedTuple):
    """An op, its map, the name under which it takes the state before the row; and, where our own
    form of it runs, what works on the chunks once for its map and for its outputs."""

    op: Callable[..., tuple[Tensor, Tensor]]
    map: Callable[..., Affine]
    state: str
    around: Callable[..., Tensor] | None = None

    def on_segments(
        self, state_before: Callable[[Affine], Tensor], *inputs: Tensor | None, **options: Any
    ) -> Tensor:
        """The outputs of segments as rows (B * each, length, ...), given what makes the state
        before each of the map of each."""
        if self.around and chosen(self.op.__name__) == "torch" and shares_chunks(inputs, options):
            return self.around(
                *inputs,
                **{k: x for k, x in options.items() if k != "gv"},
                state_before=state_before,
            )
        before = state_before(self.map(*inputs, **options))
        return self.op(*inputs, **{self.state: before}, **options)[0]


def shares_chunks(inputs: tuple[Tensor | None, ...], options: dict[str, Any]) -> bool:
    """Whether the state's chunks lie as its channels do: not where values decay too, nor where
    heads of v share keys."""
    return options.get("gv") is None and inputs[1].shape[2] == inputs[2].shape[2]


STATE = "initial_state_BHKV"
RECURRENCES = (
    Recurrence(plain.linear_attention, linear_attention_map, STATE, linear_attention_around),
    Recurrence(delta.delta_rule, delta_rule_map, STATE, delta_rule_around),
    Recurrence(general.dplr, dplr_map, STATE, dplr_around),
    Recurrence(selective_scan, selective_scan_map, "initial_state_BDN"),
)
