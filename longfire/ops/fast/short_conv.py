"""Short causal convolution as a sum of shifted rows (ops/short_conv.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.documents import Documents
from longfire.ops.linear import in_fp32
from longfire.ops.short_conv import short_conv_reference


def short_conv_shifted(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = True,
    state_BDW: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """A sum of W shifted rows: on a CPU faster than a grouped convolution, which wants time last,
    and exact for documents."""
    (B, T, D), before = x_BTD.shape, weight_DW.shape[1] - 1
    if T == 1:  # nothing is shifted: the sum as it is written takes a quarter of the time
        return short_conv_reference(x_BTD, weight_DW, bias_D, silu=silu, state_BDW=state_BDW)
    state = x_BTD.new_zeros(B, D, before) if state_BDW is None else state_BDW.to(x_BTD.dtype)
    rows_BPD = torch.cat([state.mT, x_BTD], 1)  # P = W - 1 + T
    last_BDW = rows_BPD[
        :, T:
    ].mT.clone()  # of a view the whole row would stay in memory while text is generated
    if documents is None:
        return _ShiftedSum.apply(rows_BPD, weight_DW, bias_D, None, silu), last_BDW
    ids_BT = documents.ids_BT
    ids_BP = torch.cat([ids_BT[:, :1].expand(-1, before), ids_BT], 1)
    last_BDW = torch.where((ids_BP[:, T:] == ids_BT[:, -1:])[:, None], last_BDW, 0.0)
    return _ShiftedSum.apply(rows_BPD, weight_DW, bias_D, ids_BP, silu), last_BDW


class _ShiftedSum(torch.autograd.Function):
    """Rows with W-1 inputs before them -> y. Only the rows are kept; the sum is made again for
    silu's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_BPD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None,
        ids_BP: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows_BPD, weight_DW, bias_D, ids_BP)
        ctx.silu = silu
        y_BTD = shifted_sum(in_fp32(rows_BPD), weight_DW, bias_D, ids_BP)
        return (F.silu(y_BTD, inplace=True) if silu else y_BTD).to(rows_BPD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BTD: Tensor) -> tuple[Tensor | None, ...]:
        rows_BPD, weight_DW, bias_D, ids_BP = ctx.saved_tensors
        rows32_BPD = in_fp32(rows_BPD)
        d_BTD = in_fp32(d_y_BTD)
        if ctx.silu:
            d_BTD = torch.ops.aten.silu_backward(
                d_BTD, shifted_sum(rows32_BPD, weight_DW, bias_D, ids_BP)
            )
        T = d_BTD.shape[1]
        taps_WD = taps_of(weight_DW)
        d_rows_BPD = torch.zeros_like(rows32_BPD)
        d_taps_WD = torch.empty_like(taps_WD)
        for tap, weight_D in enumerate(taps_WD):
            seen_BTD = seen_by(tap, ids_BP, d_BTD)
            d_rows_BPD[:, tap : tap + T].addcmul_(seen_BTD, weight_D)
            d_taps_WD[tap] = (seen_BTD * rows32_BPD[:, tap : tap + T]).sum((0, 1))
        d_bias_D = None if bias_D is None else d_BTD.sum((0, 1))
        return d_rows_BPD.to(rows_BPD.dtype), d_taps_WD.T.contiguous(), d_bias_D, None, None


def shifted_sum(
    rows_BPD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, ids_BP: Tensor | None
) -> Tensor:
    """sum_w weight[:, w] rows[t + w] + bias for the T = P - W + 1 tokens that are not before the
    row."""
    *earlier_WD, last_D = taps_of(weight_DW)
    T = rows_BPD.shape[1] - len(earlier_WD)
    y_BTD = rows_BPD[:, len(earlier_WD) :] * last_D
    for tap, weight_D in enumerate(earlier_WD):
        y_BTD.addcmul_(seen_by(tap, ids_BP, rows_BPD[:, tap : tap + T]), weight_D)
    if bias_D is None:
        return y_BTD
    return y_BTD.add_(bias_D)


def taps_of(weight_DW: Tensor) -> Tensor:
    """(W, D), contiguous: on a CPU a factor of every channel takes a fifth of the time where the
    channels lie side by side."""
    return weight_DW.T.contiguous()


def seen_by(tap: int, ids_BP: Tensor | None, x_BTD: Tensor) -> Tensor:
    """x, with zeros where the tokens and what this tap of their filter reads are of two
    documents."""
    if ids_BP is None:
        return x_BTD
    T = x_BTD.shape[1]
    return torch.where((ids_BP[:, tap : tap + T] == ids_BP[:, -T:])[..., None], x_BTD, 0.0)
