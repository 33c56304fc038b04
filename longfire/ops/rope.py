"""Rotary positions (RoFormer, Su 2021): pairs of channels turned by an angle that grows with the position."""

import torch
from torch import Tensor


def rope(x_BTHK: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Turn channel pair (i, i + K/2) by position * theta^(-2i/K): the half-split layout of Hugging Face. Angles in fp32."""
    half = x_BTHK.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x_BTHK.device, dtype=torch.float32) / half)
    angles_BT1K = (positions_BT[..., None].float() * frequencies)[:, :, None]
    cos, sin = angles_BT1K.cos(), angles_BT1K.sin()
    a, b = x_BTHK.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHK.dtype)
