"""Short causal convolution along the sequence, one filter a channel: what lets a recurrent mixer
see its last few inputs exactly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.documents import Documents
from longfire.ops.forms import Forms
from longfire.ops.linear import working_dtype
from longfire.ops.recurrence import RecurrenceOp

FORMS: Forms[RecurrenceOp] = Forms(
    "short_conv",
    reference="longfire.ops.short_conv:short_conv_reference",
    torch="longfire.ops.fast.short_conv:short_conv_shifted",
    fla="longfire.ops.fast.kernels:short_conv",
    memory="longfire.ops.fast.kernel_memory:short_conv",
)


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = True,
    state_BDW: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(sum_w weight[:, w] x_{t-W+1+w} + bias), inputs of other documents left out; and
    the last W-1 inputs as state.

    state_BDW: (B, D, W-1), the inputs before the sequence (they belong to its first document);
    zeros if None. The new state has zeros where its document had no input. y (B, T, D) and the
    state are in x's dtype, the sum in fp32 (float64 for float64).
    """
    return FORMS.chosen()(
        x_BTD, weight_DW, bias_D, silu=silu, state_BDW=state_BDW, documents=documents
    )


def short_conv_reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = True,
    state_BDW: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference, token by token as the sum is written. Same arguments and result."""
    width = weight_DW.shape[1]
    dtype = working_dtype(x_BTD)
    if state_BDW is None:
        state = x_BTD.new_zeros(len(x_BTD), x_BTD.shape[2], width - 1)
    else:
        state = state_BDW
    window_BDW = state.to(x_BTD.dtype)
    outputs = []
    for t in range(x_BTD.shape[1]):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            window_BDW = torch.where(same_B[:, None, None], window_BDW, 0.0)
        window_BDW = torch.cat([window_BDW, x_BTD[:, t, :, None]], -1)
        y_BD = (window_BDW.to(dtype) * weight_DW.to(dtype)).sum(-1)
        y_BD = y_BD if bias_D is None else y_BD + bias_D
        outputs.append(F.silu(y_BD) if silu else y_BD)
        window_BDW = window_BDW[..., 1:]
    return torch.stack(outputs, 1).to(x_BTD.dtype), window_BDW.clone()


class ShortConv(nn.Module):
    """The filters of a short convolution; weight (D, 1, W) as Conv1d and fla store it."""

    def __init__(self, size: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, width))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
