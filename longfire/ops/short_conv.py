"""Short causal convolution along the sequence, one filter a channel: what lets a recurrent mixer see its last few inputs exactly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.documents import Documents


def short_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = True,
    state_BDW: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(sum_w weight[:, w] x_{t-W+1+w} + bias), inputs of other documents left out; the last W-1 inputs as new state.

    state_BDW: (B, D, W-1), the inputs before the row (they belong to its first document); zeros if None. W shifted sums in
    fp32: for filters of 3 or 4 taps cheaper on a CPU than a grouped convolution, and exact for documents.
    """
    width, T = weight_DW.shape[1], x_BTD.shape[1]
    before_BTD = x_BTD.new_zeros(len(x_BTD), width - 1, x_BTD.shape[2]) if state_BDW is None else state_BDW.transpose(1, 2)
    padded_BTD = torch.cat([before_BTD.to(x_BTD.dtype), x_BTD], 1)
    y_BTD = x_BTD.float() * weight_DW[:, -1]
    for back in range(1, width):
        shifted_BTD = padded_BTD[:, width - 1 - back : width - 1 - back + T].float()
        if documents is not None:
            ids_BT = documents.ids_BT
            earlier_BT = torch.cat([ids_BT[:, :1].expand(-1, min(back, T)), ids_BT[:, : T - back]], 1)
            shifted_BTD = torch.where((earlier_BT == ids_BT)[..., None], shifted_BTD, 0.0)
        y_BTD = y_BTD + shifted_BTD * weight_DW[:, width - 1 - back]
    if bias_D is not None:
        y_BTD = y_BTD + bias_D
    y_BTD = F.silu(y_BTD) if silu else y_BTD
    return y_BTD.to(x_BTD.dtype), padded_BTD[:, T:].transpose(1, 2)


def short_conv_slow(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = True,
    state_BDW: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, token by token as the sum is written."""
    width = weight_DW.shape[1]
    state = x_BTD.new_zeros(len(x_BTD), x_BTD.shape[2], width - 1) if state_BDW is None else state_BDW
    window_BDW = state.to(x_BTD.dtype)
    outputs = []
    for t in range(x_BTD.shape[1]):
        if documents is not None and t > 0:
            same_B = documents.ids_BT[:, t] == documents.ids_BT[:, t - 1]
            window_BDW = window_BDW * same_B[:, None, None]
        window_BDW = torch.cat([window_BDW, x_BTD[:, t, :, None]], -1)
        y_BD = (window_BDW.float() * weight_DW.float()).sum(-1)
        y_BD = y_BD if bias_D is None else y_BD + bias_D
        outputs.append(F.silu(y_BD) if silu else y_BD)
        window_BDW = window_BDW[..., 1:]
    return torch.stack(outputs, 1).to(x_BTD.dtype), window_BDW


class ShortConv(nn.Module):
    """The filters of a short convolution; weight (D, 1, W) as Conv1d and fla store it."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size, 1, width)), None
