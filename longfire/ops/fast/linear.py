"""Products with fp32 master weights rounded to the type of the input (ops/linear.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.bf16 import native_bf16
from longfire.ops.linear import working_dtype
from longfire.ops.pretending import as_on_cuda


def rounded_linear(
    x: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    rounded_WD: Tensor | None = None,
) -> Tensor:
    """Weights that have x's type already, which the device multiplies, need nothing more.

    rounded_WD: the weight as it is rounded already, to be read where it has x's type; the gradient
    is that of the master weight all the same. None: rounded here, and again in the backward.
    """
    if rounded_WD is not None and rounded_WD.dtype != x.dtype:
        rounded_WD = None
    if rounded_WD is not None and not torch.is_grad_enabled():
        weight_WD = rounded_WD
    if x.dtype == weight_WD.dtype and native_bf16(x.device):
        return F.linear(x, weight_WD, None if bias_W is None else bias_W.to(x.dtype))
    return _RoundedLinear.apply(x, weight_WD, bias_W, rounded_WD)


class _RoundedLinear(torch.autograd.Function):
    """Master weights rounded to x's type, and multiplied in it where the device has units for it,
    else in fp32. Keeps x and the master weight itself, which is rounded again in the backward:
    autograd would keep the rounded one, a copy of the model that no sharding gives back. Where such
    a copy is there anyway (`rounded_WD`), it is read instead in both. The weight's gradient has the
    master's type and was never rounded to a narrower one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        rounded_WD: Tensor | None,
    ) -> Tensor:
        ctx.weight_dtype = weight_WD.dtype
        if rounded_WD is not None:
            weight_WD = rounded_WD
        ctx.save_for_backward(x, weight_WD)
        wide = multiplied(x)
        bias_W = None if bias_W is None else bias_W.to(x.dtype).to(wide)
        return F.linear(x.to(wide), weight_WD.to(x.dtype).to(wide), bias_W).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_WD = ctx.saved_tensors
        wide = multiplied(x)
        d_x = d_weight_WD = d_bias_W = None
        d_y_NW = d_y.flatten(0, -2).to(wide)
        if ctx.needs_input_grad[0]:
            # Rounded the other way round: a compiled block would take the same rounding twice for
            # one, and keep its result until here.
            rounded_DW = weight_WD.mT.to(x.dtype).to(wide)
            d_x = (d_y_NW @ rounded_DW.mT).view_as(x).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight_WD = fp32_product(d_y_NW.T, x.flatten(0, -2).to(wide)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            d_bias_W = d_y_NW.sum(0, dtype=working_dtype(d_y_NW)).to(ctx.weight_dtype)
        return d_x, d_weight_WD, d_bias_W, None


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, multiplied in their type and never rounded to it: the gradient of a master weight.

    CUDA gives fp32 sums of bf16 products. A CPU gives them rounded, so there fp32 factors are
    multiplied: with bf16 units at half the speed.
    """
    dtype = working_dtype(a)
    if a.dtype != dtype and gives_fp32_sums(a):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def gives_fp32_sums(x: Tensor) -> bool:
    """Whether the device of x can give a product of bf16 matrices in fp32."""
    return x.device.type == "cuda" or as_on_cuda()


def multiplied(x: Tensor) -> torch.dtype:
    """The type in which products of x are made."""
    if x.dtype == torch.bfloat16 and not native_bf16(x.device):
        return torch.float32
    return x.dtype
