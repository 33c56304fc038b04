"""What a segment does to the state of decayed linear attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.fast.linear_attention import read, work
from longfire.ops.linear import working_dtype
from longfire.ops.linear_attention import linear_attention
from longfire.ops.maps.contract import STATE, Affine, Recurrence, around


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
    k_BTHK = k_BTHK.to(working_dtype(k_BTHK))
    v_BTHV = v_BTHV.to(working_dtype(v_BTHV))
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
    T = like_BTHX.shape[1]
    dtype = like_BTHX.dtype
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
    inputs = (q_BTHK, k_BTHK, v_BTHV, g, continues(documents))
    return around(partial(work, scale=scale), read, inputs, state_before).to(q_BTHK.dtype)


RECURRENCE = Recurrence(linear_attention, linear_attention_map, STATE, linear_attention_around)
