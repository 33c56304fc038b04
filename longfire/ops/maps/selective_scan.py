"""What a segment does to the state of Mamba's scan."""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.maps.contract import Affine, Recurrence
from longfire.ops.selective_scan import selective_scan


def selective_scan_map(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    documents: Documents | None = None,
) -> Affine:
    """Of ops/selective_scan.py: B is the state of a scan from zero, M = exp(A sum of dt)."""
    _, write = selective_scan(x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, documents=documents)
    transition = (dt_BTD.to(write.dtype).sum(1)[..., None] * A_DN.to(write.dtype)).exp()
    if documents is not None:
        same_B = documents.ids_BT[:, 0] == documents.ids_BT[:, -1]
        transition = torch.where(same_B[:, None, None], transition, 0.0)
    return Affine(transition, write, is_matrix=False)


RECURRENCE = Recurrence(selective_scan, selective_scan_map, "initial_state_BDN")
