"""Gated slot attention as two passes of linear attention (ops/slot_attention.py): in the first the
slots are what the channels of values are, in the second what those of keys are."""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.fast.linear_attention import linear_attention_chunkwise
from longfire.ops.linear import in_fp32, working_dtype
from longfire.ops.slot_attention import slot_attention_reference


def slot_attention_in_two_passes(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    s_BTGM: Tensor,
    g_BTGM: Tensor,
    *,
    initial_state_BGMX: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.slot_attention.slot_attention. One token, as generation asks for it, is a
    step of the recurrence itself."""
    if q_BTHK.shape[1] == 1:
        return slot_attention_reference(
            q_BTHK, k_BTGK, v_BTGV, s_BTGM, g_BTGM, initial_state_BGMX=initial_state_BGMX
        )
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    keys, values = parts_of_state(initial_state_BGMX, k_BTGK.shape[-1])
    scores_BTHM, last_keys = linear_attention_chunkwise(
        q_BTHK,
        for_queries(k_BTGK, groups, 2),
        for_queries(s_BTGM, groups, 2),
        gv=for_queries(g_BTGM, groups, 2),
        scale=1.0,
        initial_state_BHKV=None if keys is None else for_queries(keys, groups, 1),
        documents=documents,
    )
    weights_BTHM = in_fp32(scores_BTHM).softmax(-1).to(v_BTGV.dtype)
    o_BTHV, last_values = linear_attention_chunkwise(
        weights_BTHM,
        s_BTGM,
        v_BTGV,
        g_BTGM,
        scale=1.0,
        initial_state_BHKV=values,
        documents=documents,
    )
    return o_BTHV.to(q_BTHK.dtype), torch.cat([last_keys[:, ::groups].mT, last_values], -1)


def for_queries(x: Tensor, groups: int, dim: int) -> Tensor:
    """Each head along `dim`, for all heads of q that it serves."""
    if groups == 1:
        return x
    return x.repeat_interleave(groups, dim)


def parts_of_state(state_BGMX: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """The keys of the slots (B, G, K, M) and their values (B, G, M, V), as linear attention has
    them."""
    if state_BGMX is None:
        return None, None
    state_BGMX = state_BGMX.to(working_dtype(state_BGMX))
    return state_BGMX[..., :keys].mT, state_BGMX[..., keys:]
