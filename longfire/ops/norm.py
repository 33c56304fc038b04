"""Normalisations: statistics in fp32 (float64 for float64), result in the dtype of the input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.forms import LazyFunction, TensorFunction
from longfire.ops.linear import in_fp32

ON_CPU = LazyFunction[TensorFunction]("longfire.ops.fast.norm:rms_norm_on_cpu")

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
    return ON_CPU.get()(x, weight, eps)


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
