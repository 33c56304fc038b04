"""Normalisations: statistics in fp32, result in the dtype of the input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim (Zhang 2019)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dim (Ba 2016); without weight and bias: non-parametric."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dim: eps inside the root, as fla has it."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str = "silu") -> Tensor:
    """rms_norm(x) * silu(gate) (or sigmoid), the end of most recurrent mixers; all in fp32 until the last rounding."""
    gate = F.silu(gate.float()) if activation == "silu" else gate.float().sigmoid()
    return (F.rms_norm(x.float(), x.shape[-1:], weight, eps) * gate).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """layer_norm with learned weight and bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class GatedRMSNorm(nn.Module):
    """gated_rms_norm with a learned weight."""

    def __init__(self, size: int, eps: float, activation: str = "silu") -> None:
        super().__init__()
        self.weight, self.eps, self.activation = nn.Parameter(torch.ones(size)), eps, activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps, self.activation)
