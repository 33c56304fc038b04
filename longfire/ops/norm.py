"""Normalisations: statistics in fp32 (float64 for float64), result in the dtype of the input."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longfire.ops.linear import in_fp32

# Numbers up to which torch's own norm is faster than ours without gradients (equal at some 10^5).
FEW = 2**15


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dim (Zhang 2019)."""
    return in_fp32_rms(in_fp32(x), weight, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dim (Ba 2016); without weight and bias:
    non-parametric."""
    return F.layer_norm(in_fp32(x), x.shape[-1:], weight, bias, eps).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dim: eps inside the root, as fla has it."""
    size = x.shape[-1]
    return (in_fp32_rms(in_fp32(x), None, eps / size) * size**-0.5).to(x.dtype)


GATES: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "sigmoid": torch.sigmoid}


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str = "swish"
) -> Tensor:
    """rms_norm(x) * swish(gate) (or another of GATES), the end of most recurrent mixers; in fp32
    until the last rounding."""
    return (in_fp32_rms(in_fp32(x), weight, eps) * GATES[activation](in_fp32(gate))).to(x.dtype)


def in_fp32_rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """rms_norm of fp32 (or float64) x. Uncompiled on a CPU torch's own takes ten times what its
    passes over memory do; for a token or two, as generation has them, it takes half the time of our
    calls."""
    few = x.numel() < FEW and not torch.is_grad_enabled()
    if x.device.type != "cpu" or torch.compiler.is_compiling() or few:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    if weight is not None:
        weight = weight.to(x.dtype)  # it may come narrow (param_gather_dtype)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """y = r x weight with r = 1 / rms(x). The backward is layer norm's kernel told that the means
    are 0: it gives the right d_weight, and d_x less r mean(d_y weight), which is what a mean that
    depends on x takes off.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        # Unlike a sum of squares, no temporary of x's size.
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y = x * r
        if weight is None:
            return y
        return y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wanted = [True, weight is not None and ctx.needs_input_grad[1], False]
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            d_y.contiguous(),
            x.contiguous(),
            x.shape[-1:],
            torch.zeros_like(r),
            r,
            weight,
            None,
            wanted,
        )
        means = d_y.mean(-1) if weight is None else d_y @ (weight / len(weight))
        return d_x.add_(means[..., None].mul_(r)), d_weight, None


class RMSNorm(nn.Module):
    """rms_norm, with a learned weight unless not affine."""

    def __init__(self, size: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """layer_norm, with learned weight and bias unless not affine."""

    def __init__(self, size: int, eps: float, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.eps = eps
        self.bias = nn.Parameter(torch.zeros(size)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class GatedRMSNorm(nn.Module):
    """gated_rms_norm, with a learned weight unless not affine; rms_norm where there is no gate."""

    def __init__(
        self, size: int, eps: float, activation: str = "swish", affine: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.eps = eps
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """gate: as many numbers as x, heads side by side if need be."""
        if gate is None:
            return rms_norm(x, self.weight, self.eps)
        return gated_rms_norm(x, gate.reshape(x.shape), self.weight, self.eps, self.activation)


class GroupedGatedRMSNorm(RMSNorm):
    """Mamba-2's: rms_norm(x * silu(gate)) with statistics of each group of channels, or the norm
    first and the gate after it."""

    def __init__(self, size: int, eps: float, groups: int, norm_before_gate: bool) -> None:
        super().__init__(size, eps)
        self.groups = groups
        self.norm_before_gate = norm_before_gate

    # with a gate, which no caller of a plain norm has
    def forward(self, x_BTD: Tensor, gate_BTD: Tensor) -> Tensor:  # type: ignore[override]
        y_BTD = in_fp32(x_BTD)
        gate_BTD = F.silu(in_fp32(gate_BTD))
        y_BTD = y_BTD if self.norm_before_gate else y_BTD * gate_BTD
        y_BTD = self.normalised(y_BTD)
        return (y_BTD * gate_BTD if self.norm_before_gate else y_BTD).to(x_BTD.dtype)

    def normalised(self, y_BTD: Tensor) -> Tensor:
        """y with the statistics of each group, times the weight."""
        if self.groups == 1:
            return in_fp32_rms(y_BTD, self.weight, self.eps)
        y_BTGD = y_BTD.unflatten(-1, (self.groups, -1))
        y_BTD = in_fp32_rms(y_BTGD, None, self.eps).flatten(-2)
        if self.weight is None:
            return y_BTD
        return y_BTD * self.weight
