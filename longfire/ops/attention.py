"""Softmax attention, whole and in parts; causal, with grouped heads, sliding windows and documents."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents


def visible(T: int, S: int, window: int | None, documents: Documents | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S) bool: which of S keys each of the last T positions sees."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if documents is None:
        return seen[None, None]
    assert T == S, "documents are for whole rows"
    ids_BT = documents.ids_BT
    return (seen & (ids_BT[:, :, None] == ids_BT[:, None, :]))[:, None]


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax(q k^T * scale) v -> (B, T, H, V). Queries are the last T of S positions; G key/value heads serve H heads.

    window: keys a query sees, itself included. scale: K^-0.5 if None.
    """
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    plain = window is None and documents is None and T == S
    mask = None if plain or T == 1 and window is None else visible(T, S, window, documents, q.device)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain and T > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2)


def attention_slow(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same with all scores written out, in fp32 or the inputs' float64."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q_BTHK, k_BSGK.repeat_interleave(groups, 2), v_BSGV.repeat_interleave(groups, 2)))
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = visible(q.shape[1], k.shape[1], window, documents, q.device)
    weights_BHTS = scores_BHTS.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights_BHTS, v).to(q_BTHK.dtype)
