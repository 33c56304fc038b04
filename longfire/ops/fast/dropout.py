"""Dropout that keeps the tokens' noise alone for its backward (ops/dropout.py)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.dropout import channel_mask


def dropped(x_BTD: Tensor, residual_BTD: Tensor | None, p: float, noise_BT: Tensor) -> Tensor:
    """dropout(x), added to the residual if there is one."""
    return _Dropout.apply(x_BTD, residual_BTD, p, noise_BT)


class _Dropout(torch.autograd.Function):
    """The mask is made again in the backward: 4 bytes a token are kept instead of one a number."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, residual_BTD: Tensor | None, p: float, noise_BT: Tensor
    ) -> Tensor:
        ctx.save_for_backward(noise_BT)
        ctx.p = p
        ctx.dtype = x_BTD.dtype
        ctx.has_residual = residual_BTD is not None
        y_BTD = torch.where(channel_mask(noise_BT, x_BTD.shape[-1], p), x_BTD / (1 - p), 0.0)
        if residual_BTD is None:
            return y_BTD
        return residual_BTD + y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BTD: Tensor) -> tuple[Tensor | None, ...]:
        (noise_BT,) = ctx.saved_tensors
        d_x_BTD = torch.where(
            channel_mask(noise_BT, d_y_BTD.shape[-1], ctx.p), d_y_BTD / (1 - ctx.p), 0.0
        )
        return d_x_BTD.to(ctx.dtype), d_y_BTD if ctx.has_residual else None, None, None
