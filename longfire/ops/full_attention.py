"""Softmax attention in which each token sees all tokens of its document, before and after it."""

import torch
from torch import Tensor

from longfire.ops.attention import softmax_reference, weight_mask
from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.sequence_ops import AttentionOp

FORMS: Forms[AttentionOp] = Forms(
    "attention",
    reference="longfire.ops.full_attention:full_attention_reference",
    torch="longfire.ops.fast.full_attention:full_attention_fused",
)


def chosen_full_attention() -> AttentionOp:
    """The form that runs: the choice is that of causal attention."""
    return FORMS.chosen()


def full_attention_reference(
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
    """softmax(q k^T * scale) v -> (B, T, H, V), with all scores in memory, in fp32 (float64 for
    float64 inputs). Arguments as those of ops.attention.attention; keys are those of the queries.

    window: keys at a distance below it are seen, on either side.
    """
    assert skip_B is None and q_BTHK.shape[1] == k_BSGK.shape[1], "for whole sequences only"
    T = q_BTHK.shape[1]
    seen = visible_in_full(T, window, documents, q_BTHK.device)
    mask = None
    if dropout > 0 and noise_BT is not None:
        mask = weight_mask(noise_BT, q_BTHK.shape[2], 0, T, dropout, first_head)
    return softmax_reference(q_BTHK, k_BSGK, v_BSGV, seen, scale, mask, dropout)[0].to(q_BTHK.dtype)


def visible_in_full(
    T: int, window: int | None, documents: Documents | None, device: torch.device
) -> Tensor | None:
    """(B or 1, 1, T, T) bool: which keys each query sees; None: all."""
    seen = None
    if window is not None and window < T:
        token = torch.arange(T, device=device)
        seen = ((token[:, None] - token).abs() < window)[None, None]
    if documents is not None:
        ids_BT = documents.ids_BT
        same = (ids_BT[:, :, None] == ids_BT[:, None, :])[:, None]
        seen = same if seen is None else seen & same
    return seen
