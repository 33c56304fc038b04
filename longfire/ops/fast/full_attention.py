"""Attention to all tokens by torch's fused kernels (ops/full_attention.py)."""

from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.fast.attention import kernel, multipliable
from longfire.ops.full_attention import full_attention_reference, visible_in_full


def full_attention_fused(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    noise_BT: Tensor | None = None,
    skip_B: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Dropout leaves the fused kernels, whose masks depend on the order in which they draw: the
    reference computes it, with all scores in memory."""
    if dropout > 0 and noise_BT is not None:
        return full_attention_reference(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            window=window,
            documents=documents,
            scale=scale,
            dropout=dropout,
            noise_BT=noise_BT,
            first_head=first_head,
        )
    assert skip_B is None and q_BTHK.shape[1] == k_BSGK.shape[1], "for whole sequences only"
    seen = visible_in_full(q_BTHK.shape[1], window, documents, q_BTHK.device)
    q = multipliable(q_BTHK)
    k = multipliable(k_BSGK)
    v = multipliable(v_BSGV)
    return kernel(q, k, v, scale, mask=seen).to(q_BTHK.dtype)
