"""The delta rule with decay: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,
o_t = scale * S_t^T q_t.

What the key k_t held is erased before v_t is written. No decay is DeltaNet (Schlag 2021; Yang
2024a), a scalar Gated DeltaNet (Yang 2024b, eq. 10), a vector over the key channels KDA (Kimi
Linear, 2025). The state decays first, and the decayed state is what is erased: fla's order.
"""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import RecurrenceOp, start

FORMS: Forms[RecurrenceOp] = Forms(
    "delta_rule",
    reference="longfire.ops.delta_rule:delta_rule_reference",
    torch="longfire.ops.fast.delta_rule:delta_rule_chunkwise",
    fla="longfire.ops.fast.kernels:delta_rule",
    memory="longfire.ops.fast.kernel_memory:delta_rule",
)


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
    return FORMS.chosen()(
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
    """The reference: the recurrence, a token at a time. Same arguments and result."""
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
