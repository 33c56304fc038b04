"""Rotary positions written into place, keeping their angles alone (ops/rope.py)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotated_once(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All channels of x turned; its backward is the rotation back."""
    if torch.is_grad_enabled():
        return _Rotate.apply(x_BTHK, cos, sin)
    return rotated(x_BTHK, cos, sin)


class _Rotate(torch.autograd.Function):
    """A rotation (times a constant), whose gradient is the rotation back; x itself is not kept."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x_BTHK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(d_y_BTHK, cos, -sin), None, None


def rotated(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), written into place."""
    a, b = x_BTHK.to(cos.dtype).chunk(2, -1)
    if (
        torch.compiler.is_compiling()
    ):  # which fuses this, and cannot take `out`: a block that is recomputed would stay eager
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHK.dtype)
    y_BTHK = torch.empty(x_BTHK.shape, dtype=cos.dtype, device=x_BTHK.device)
    y_a, y_b = y_BTHK.chunk(2, -1)
    torch.mul(a, cos, out=y_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y_b).addcmul_(a, sin)
    return y_BTHK.to(x_BTHK.dtype)
