"""Linear layers whose products are of 8-bit numbers, with their backward (ops/float8.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.fast.linear import fp32_product
from longfire.ops.float8 import (
    MULTIPLE,
    Float8,
    Scaled,
    forward_product,
    input_gradient,
    weight_gradient,
)


def float8_linear(x: Tensor, weight_WD: Tensor, float8: Float8) -> Tensor:
    """x (..., D) -> (..., W), without a bias."""
    return _Float8Linear.apply(x, weight_WD, float8)


class _Float8Linear(torch.autograd.Function):
    """Keeps x and the master weight, which are rounded again in the backward: their 8-bit forms of
    the forward are scaled by other rows, and would be copies that no sharding gives back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_WD: Tensor, float8: Float8) -> Tensor:
        ctx.save_for_backward(x, weight_WD)
        ctx.float8 = float8
        y_NW = forward_product(x.flatten(0, -2), weight_WD, float8)
        return y_NW.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_WD = ctx.saved_tensors
        d_y_NW = d_y.flatten(0, -2)
        d_x = d_weight_WD = None
        if ctx.needs_input_grad[0]:
            d_x = input_gradient(d_y_NW, weight_WD, x.dtype, ctx.float8).view_as(x)
        if ctx.needs_input_grad[1]:
            x_ND = x.flatten(0, -2)
            if ctx.float8.recipe.rounds_weight_gradient:
                d_weight_WD = weight_gradient(d_y_NW, x_ND, ctx.float8)
            else:
                d_weight_WD = fp32_product(d_y_NW.T, x_ND)
            d_weight_WD = d_weight_WD.to(weight_WD.dtype)
        return d_x, d_weight_WD, None


def scaled_product(a_RK: Scaled, b_CK: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T (R, C) by float8 units (torch._scaled_mm: compute capability 8.9 or higher), summed
    without the faster sums of fewer bits.

    K is padded with zeros to a multiple of 16 (tokens may be any number). Scales of whole matrices
    are applied by the kernel. Those of rows are powers of two, which are multiplied afterwards
    without an error: the kernel that takes them is slow with full sums (as torchao says). (A
    private name of torch: it has no public one for this kernel.)
    """
    a_values_RK = padded(a_RK.values_RK)
    b_values_CK = padded(b_CK.values_RK)
    has_row_scales = a_RK.inverse_scale.ndim > 0 or b_CK.inverse_scale.ndim > 0
    one = torch.ones((), device=a_values_RK.device)
    sums_RC = torch._scaled_mm(
        a_values_RK,
        b_values_CK.t(),
        scale_a=one if has_row_scales else a_RK.inverse_scale,
        scale_b=one if has_row_scales else b_CK.inverse_scale,
        out_dtype=dtype,
        use_fast_accum=False,
    )
    if not has_row_scales:
        return sums_RC
    return (sums_RC * a_RK.inverse_scale * b_CK.inverse_scale.reshape(1, -1)).to(dtype)


def padded(values_RK: Tensor) -> Tensor:
    """The values, row after row in memory, with zeros until K is a multiple of 16."""
    missing = -values_RK.shape[1] % MULTIPLE
    if missing:
        values_RK = F.pad(values_RK.view(torch.uint8), (0, missing)).view(values_RK.dtype)
    return values_RK.contiguous()
