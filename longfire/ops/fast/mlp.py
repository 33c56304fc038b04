"""Activations of MLPs that keep less for the backward than autograd would (ops/mlp.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu_again(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of which silu(gate) is made again in the backward."""
    return _SwiGLU.apply(gate, up)


def squared_relu_once(x: Tensor) -> Tensor:
    """relu(x)^2, whose backward is one pass."""
    return _SquaredReLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_y, gate).mul_(up), F.silu(gate).mul_(d_y)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        # 2 d_y positive, in one pass
        return torch.addcmul(d_y.new_zeros(()), d_y, positive, value=2)
