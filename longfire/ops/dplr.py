"""Diagonal plus low rank: S_t = diag(exp g_t) S_{t-1} + b_t (c_t^T S_{t-1}) + k_t v_t^T, o_t =
scale * S_t^T q_t.

RWKV-7 (Peng 2025): c_t is the negative of the key that is removed, b_t that key times its learning
rate. What c reads is the state before this step's decay. The delta rules are the case c = exp(g) *
k, b = -beta * k and beta * k written; ops/delta_rule.py computes them with half the work.
"""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import RecurrenceOp, start

FORMS: Forms[RecurrenceOp] = Forms(
    "dplr",
    reference="longfire.ops.dplr:dplr_reference",
    torch="longfire.ops.fast.dplr:dplr_chunkwise",
    fla="longfire.ops.fast.kernels:dplr",
    memory="longfire.ops.fast.kernel_memory:dplr",
)


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
    return FORMS.chosen()(
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
    """The reference: the recurrence, a token at a time. Same arguments and result."""
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
