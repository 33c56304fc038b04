"""Selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t, a state of N numbers
for each channel (Mamba: Gu 2023, algorithm 2).
"""

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import RecurrenceOp

FORMS: Forms[RecurrenceOp] = Forms(
    "selective_scan",
    reference="longfire.ops.selective_scan:selective_scan_reference",
    torch="longfire.ops.fast.selective_scan:selective_scan_chunks",
    triton="longfire.ops.fast.scan_kernels:selective_scan_kernels",
    memory="longfire.ops.fast.triton_memory:selective_scan",
)


def selective_scan(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    initial_state_BDN: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, D) in x's dtype and the final state (B, D, N), fp32 (float64 for float64
    inputs).

    dt: step sizes (>= 0). A: rates (<= 0), so that exp(dt A) decays. B, C: what writes to and reads
    from the N numbers. With documents the state starts from zero at each of them; the initial state
    belongs to the first document of each row, and the final state is that of its last.
    Differentiable in every tensor.
    """
    return FORMS.chosen()(
        x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, initial_state_BDN=initial_state_BDN, documents=documents
    )


def selective_scan_reference(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    initial_state_BDN: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: the recurrence, a token at a time. Same arguments and result."""
    dtype = working_dtype(x_BTD)
    h_BDN = start(initial_state_BDN, x_BTD, A_DN)
    A_DN = A_DN.to(dtype)
    outputs = []
    tokens = zip(*(x.to(dtype).unbind(1) for x in (x_BTD, dt_BTD, B_BTN, C_BTN)))
    for t, (x_BD, dt_BD, B_BN, C_BN) in enumerate(tokens):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            h_BDN = torch.where(same_B[:, None, None], h_BDN, 0.0)
        h_BDN = (dt_BD[..., None] * A_DN).exp() * h_BDN + (dt_BD * x_BD)[..., None] * B_BN[
            :, None, :
        ]
        outputs.append((h_BDN @ C_BN[..., None]).squeeze(-1))
    return torch.stack(outputs, 1).to(x_BTD.dtype), h_BDN


def start(state_BDN: Tensor | None, x_BTD: Tensor, A_DN: Tensor) -> Tensor:
    """The state before the first token, zeros if None, in the working dtype."""
    dtype = working_dtype(x_BTD)
    if state_BDN is None:
        return x_BTD.new_zeros(len(x_BTD), *A_DN.shape, dtype=dtype)
    return state_BDN.to(dtype)
