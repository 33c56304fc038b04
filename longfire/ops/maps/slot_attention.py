"""What a segment does to the slots of gated slot attention: what it does to the state of linear
attention with keys s and values (k, v). Queries and softmax change nothing there."""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.maps.contract import Affine, Recurrence
from longfire.ops.maps.linear_attention import linear_attention_map
from longfire.ops.slot_attention import slot_attention


def slot_attention_map(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    s_BTGM: Tensor,
    g_BTGM: Tensor,
    *,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/slot_attention.py."""
    kv_BTGX = torch.cat([k_BTGK, v_BTGV], -1)
    return linear_attention_map(s_BTGM, s_BTGM, kv_BTGX, g_BTGM, documents=documents)


RECURRENCE = Recurrence(slot_attention, slot_attention_map, "initial_state_BGMX")
