"""Gated slot attention (Zhang 2024, eq. 6): a memory of M slots, each a key and a value, S_t =
diag(exp g_t) S_{t-1} + s_t (k_t, v_t)^T; o_t = values^T softmax(keys q_t), over the slots.

So the memory is the state of linear attention whose keys are s and whose values are k and v side by
side. s_t says how much of a token each slot takes.
"""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import RecurrenceOp

FORMS: Forms[RecurrenceOp] = Forms(
    "slot_attention",
    reference="longfire.ops.slot_attention:slot_attention_reference",
    torch="longfire.ops.fast.slot_attention:slot_attention_in_two_passes",
    fla="longfire.ops.fast.kernels:slot_attention",
    memory="longfire.ops.fast.slot_memory:slot_attention",
)


def slot_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    s_BTGM: Tensor,
    g_BTGM: Tensor,
    *,
    initial_state_BGMX: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) in q's dtype and the final state (B, G, M, X) with X = K + V, fp32
    (float64 for float64 inputs): the keys and the values of the slots.

    g: log decay (<= 0) of each step and slot. Each of the G heads of k, v, s and g serves H / G
    neighbouring heads of q. Nothing is scaled. With documents the slots are empty at the start of
    each; the initial state belongs to the first document of each row, and the final state is that
    of its last. Differentiable in every tensor.
    """
    return FORMS.chosen()(
        q_BTHK,
        k_BTGK,
        v_BTGV,
        s_BTGM,
        g_BTGM,
        initial_state_BGMX=initial_state_BGMX,
        documents=documents,
    )


def slot_attention_reference(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    s_BTGM: Tensor,
    g_BTGM: Tensor,
    *,
    initial_state_BGMX: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: the recurrence, a token at a time. Same arguments and result."""
    (B, T, G, M), K, dtype = s_BTGM.shape, k_BTGK.shape[-1], working_dtype(q_BTHK)
    kv_BTGX = torch.cat([k_BTGK, v_BTGV], -1)
    S_BGMX = initial_state_BGMX
    if S_BGMX is None:
        S_BGMX = q_BTHK.new_zeros(B, G, M, kv_BTGX.shape[-1], dtype=dtype)
    q_BTGRK = q_BTHK.unflatten(2, (G, -1))
    outputs = []
    for t in range(T):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            S_BGMX = torch.where(same_B[:, None, None, None], S_BGMX, 0.0)
        written = s_BTGM[:, t, :, :, None].to(dtype) * kv_BTGX[:, t, :, None].to(dtype)
        S_BGMX = g_BTGM[:, t, :, :, None].to(dtype).exp() * S_BGMX + written
        weights_BGRM = (q_BTGRK[:, t].to(dtype) @ S_BGMX[..., :K].mT).softmax(-1)
        outputs.append((weights_BGRM @ S_BGMX[..., K:]).flatten(1, 2))
    return torch.stack(outputs, 1).to(q_BTHK.dtype), S_BGMX
