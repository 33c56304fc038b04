"""What is computed in which type, and matrix products with fp32 master weights."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.forms import LazyFunction, TensorFunction

ROUNDED = LazyFunction[TensorFunction]("longfire.ops.fast.linear:rounded_linear")


def working_dtype(x: Tensor) -> torch.dtype:
    """Statistics, states and sums are fp32; float64 inputs stay what they are (the reference in
    tests)."""
    return torch.promote_types(x.dtype, torch.float32)


def in_fp32(x: Tensor) -> Tensor:
    """x in its working dtype."""
    return x.to(working_dtype(x))


def linear(
    x: Tensor, weight_WD: Tensor, bias_W: Tensor | None = None, rounded_WD: Tensor | None = None
) -> Tensor:
    """x (..., D) -> (..., W) in x's dtype, from fp32 master weights rounded to it.

    rounded_WD: so rounded before. bf16 on a CPU without bf16 units: the same rounded values are
    multiplied in fp32 and the result is rounded, which a bf16 product with fp32 accumulation means.
    """
    if x.dtype == weight_WD.dtype and x.dtype != torch.bfloat16:
        return F.linear(x, weight_WD, None if bias_W is None else bias_W.to(x.dtype))
    return ROUNDED.get()(x, weight_WD, bias_W, rounded_WD)


def linear_reference(x: Tensor, weight_WD: Tensor, bias_W: Tensor | None = None) -> Tensor:
    """The reference: rounded values, multiplied in fp32 (float64 for float64 inputs)."""
    weight_WD = in_fp32(weight_WD.to(x.dtype))
    if bias_W is not None:
        bias_W = in_fp32(bias_W.to(x.dtype))
    return F.linear(in_fp32(x), weight_WD, bias_W).to(x.dtype)


class Products(Protocol):
    """Another way to multiply, which the settings of a run choose (ops/float8.py)."""

    def linear(self, x: Tensor, weight_WD: Tensor, bias_W: Tensor | None) -> Tensor: ...


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input; its parameters stay fp32."""

    rounded_WD: Tensor | None = None  # a copy of the weight that ops/rounded_weights.py keeps
    float8: Products | None = None  # products of 8-bit numbers, where they are chosen

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias_W: Tensor | None = None) -> Tensor:
        """x times the weight, plus this bias."""
        if self.float8 is not None:
            return self.float8.linear(x, self.weight, bias_W)
        return linear(x, self.weight, bias_W, self.rounded_WD)
