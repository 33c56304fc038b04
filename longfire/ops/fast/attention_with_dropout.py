"""Attention with dropout by torch's operators (ops/attention_with_dropout.py)."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longfire.ops.attention import softmax_reference, visible, weight_mask
from longfire.ops.documents import Documents

# queries whose scores exist at one time
BLOCK = 256


def attention_in_query_blocks(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    noise_BT: Tensor,
    *,
    dropout: float,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    first_head: int = 0,
) -> Tensor:
    """For BLOCK queries at a time, whose scores are made again in the backward: memory grows with
    T, not with T^2. Same arguments and result."""
    T = q_BTHK.shape[1]
    documents_BT = None if documents is None else documents.ids_BT

    def block(start: int, stop: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = 0 if window is None else max(0, start - window + 1)
        seen = visible(stop - start, stop - first, window, None, q.device)
        if documents_BT is not None:
            ids_BQ1 = documents_BT[:, start:stop, None]
            ids_B1S = documents_BT[:, None, first:stop]
            seen = seen & (ids_BQ1 == ids_B1S)[:, None]
        mask = weight_mask(noise_BT[:, start:stop], q.shape[2], first, stop, dropout, first_head)
        return softmax_reference(
            q[:, start:stop], k[:, first:stop], v[:, first:stop], seen, scale, mask, dropout
        )[0]

    outputs = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        output = checkpoint(block, start, stop, q_BTHK, k_BTGK, v_BTGV, use_reentrant=False)
        outputs.append(output)
    return torch.cat(outputs, 1).to(q_BTHK.dtype)
