"""Rotary positions (RoFormer, Su 2021): pairs of channels turned by an angle that grows with the position."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.linear import working_dtype


def rope(x_BTHK: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Turn channel pair (i, i + K/2) by position * theta^(-2i/K): the half-split layout of Hugging Face. Angles in fp32.

    The turned values are rounded to x's dtype once; float64 inputs are turned in float64 by the fp32 angles.
    """
    half, device, dtype = x_BTHK.shape[-1] // 2, x_BTHK.device, working_dtype(x_BTHK)
    if torch.is_grad_enabled():
        return _Turn.apply(x_BTHK, *angles(positions_BT, frequencies(half, theta, device), dtype))
    return turned(x_BTHK, *angles(positions_BT, kept_frequencies(half, theta, device), dtype))


def frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-i/half): the angle by which pair i turns from one position to the next; fp32."""
    return theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


kept_frequencies = lru_cache(32)(
    frequencies
)  # for generation, which asks for each token (torch.compile looks through caches)


def angles(positions_BT: Tensor, frequencies_K: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the fp32 angles, (B, T, 1, K/2)."""
    angles_BT1K = (positions_BT[..., None].float() * frequencies_K)[:, :, None]
    return angles_BT1K.cos().to(dtype), angles_BT1K.sin().to(dtype)


class _Turn(torch.autograd.Function):
    """A rotation, whose gradient is the rotation back; x itself is not kept."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x_BTHK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turned(d_y_BTHK, cos, -sin), None, None


def turned(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), written into place."""
    a, b = x_BTHK.to(cos.dtype).chunk(2, -1)
    y_BTHK = torch.empty(x_BTHK.shape, dtype=cos.dtype, device=x_BTHK.device)
    y_a, y_b = y_BTHK.chunk(2, -1)
    torch.mul(a, cos, out=y_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y_b).addcmul_(a, sin)
    return y_BTHK.to(x_BTHK.dtype)
