"""Softmax attention; causal, with grouped heads, sliding windows and documents."""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.dropout import kept, with_index
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.sequence_ops import AttentionOp

FORMS: Forms[AttentionOp] = Forms(
    "attention",
    reference="longfire.ops.attention:attention_reference",
    torch="longfire.ops.fast.attention:attention_fused",
)


def attention(
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
    """Causal softmax(q k^T * scale) v -> (B, T, H, V). Queries are the last T of S positions; G
    key/value heads serve H heads.

    window: keys a query sees, itself included. documents: tokens see their own document; of S - T
    keys before a sequence, those from skip_B on belong to its first document. scale: K^-0.5 if
    None.
    skip_B: so many keys at the left end of each sequence are seen by no query but their own.
    dropout: share of the weights that become 0, by the queries' noise (T = S only) and the head's
    number, which counts from first_head; none without noise.
    """
    assert k_BSGK.shape[1] >= q_BTHK.shape[1], "queries are the last T of S positions"
    return FORMS.chosen()(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        window=window,
        documents=documents,
        scale=scale,
        dropout=dropout,
        noise_BT=noise_BT,
        skip_B=skip_B,
        first_head=first_head,
    )


def chosen_attention() -> AttentionOp:
    """The form of `attention` that runs, itself: documents break a compiled graph, and each call
    around the break is one more frame that is compiled for itself."""
    return FORMS.chosen()


def attention_reference(
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
    """The reference: all scores written out, in fp32 (float64 for float64 inputs). Same arguments
    and result."""
    T = q_BTHK.shape[1]
    S = k_BSGK.shape[1]
    seen = visible(T, S, window, documents, q_BTHK.device, skip_B)
    mask = None
    if dropout > 0 and noise_BT is not None:
        assert T == S, "dropout is for training, on whole rows"
        mask = weight_mask(noise_BT, q_BTHK.shape[2], 0, S, dropout, first_head)
    return softmax_reference(q_BTHK, k_BSGK, v_BSGV, seen, scale, mask, dropout)[0].to(q_BTHK.dtype)


def visible(
    T: int,
    S: int,
    window: int | None,
    documents: Documents | None,
    device: torch.device,
    skip_B: Tensor | None = None,
) -> Tensor:
    """(B or 1, 1, T, S) bool: which of S keys each of the last T positions sees."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    seen = seen[None]
    if skip_B is not None:
        seen = seen & ((key >= skip_B[:, None, None]) | (key == query))
    if documents is not None:  # keys before the sequence are of its first document
        ids_BT = documents.ids_BT
        ids_BS = torch.cat([ids_BT[:, :1].expand(-1, S - T), ids_BT], 1)
        seen = seen & (ids_BT[:, :, None] == ids_BS[:, None, :])
    return seen[:, None]


def softmax_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float | None,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of the scores with all of them in memory; seen: (B or 1, 1, T, S), None
    for all. mask: weights that stay of a dropout with p."""
    groups = q.shape[2] // k.shape[2]
    dtype = working_dtype(q)
    q = q.to(dtype)
    k = k.repeat_interleave(groups, 2).to(dtype)
    v = v.repeat_interleave(groups, 2).to(dtype)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if seen is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen, -torch.inf)
    weights_BHTS = scores_BHTS.softmax(-1)
    if mask is not None:
        weights_BHTS = torch.where(mask, weights_BHTS / (1 - p), 0.0)
    return torch.einsum("bhts,bshv->bthv", weights_BHTS, v), scores_BHTS.logsumexp(-1)


def weight_mask(
    noise_BT: Tensor, heads: int, first: int, stop: int, p: float, first_head: int
) -> Tensor:
    """(B, H, T, S) bool: which weights of the keys first to stop stay."""
    head_H = torch.arange(first_head, first_head + heads, dtype=torch.int32, device=noise_BT.device)
    key_S = torch.arange(first, stop, dtype=torch.int32, device=noise_BT.device)
    noise_BHT = with_index(noise_BT, head_H).movedim(-1, 1)
    return kept(with_index(noise_BHT, key_S), p)
