"""Linear attention with decay: S_t = diag(exp g_t) S_{t-1} diag(exp gv_t) + k_t v_t^T, o_t = scale
* S_t^T q_t.

No decay is linear attention (Katharopoulos 2020), a constant one per head RetNet's retention (Sun
2023), a scalar Mamba-2 (Dao 2024), a vector over the key channels GLA (Yang 2023, eq. 3) and HGRN2,
a vector over the value channels the first pass of gated slot attention (Zhang 2024, where the
values are the slots).
"""

from functools import partial

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import RecurrenceOp, start

FORMS: Forms[RecurrenceOp] = Forms(
    "linear_attention",
    reference="longfire.ops.linear_attention:linear_attention_reference",
    torch="longfire.ops.fast.linear_attention:linear_attention_chunkwise",
    fla="longfire.ops.fast.kernels:linear_attention",
    memory="longfire.ops.fast.kernel_memory:linear_attention",
)


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
    state belongs to the first document of each sequence, and the final state is that of its last.
    Differentiable in every tensor.

    k, v, g, gv and the state may have fewer heads than q: each serves as many neighbouring heads of
    q as divide them. Or q and k have fewer heads than v, g, gv and the state (Mamba-2's C and B).
    What is shared is worked on once, but with gv, and with a vector g in the second case: no mixer
    asks for these, and they are computed as if all had heads of their own.
    """
    form = partial(FORMS.chosen(), scale=scale, documents=documents)
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


def for_heads_of(v_BTHV: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, where they have fewer heads than v, for every head of v."""
    times = v_BTHV.shape[2] // k.shape[2]
    if times <= 1:
        return (q, k)
    return (q.repeat_interleave(times, 2), k.repeat_interleave(times, 2))
