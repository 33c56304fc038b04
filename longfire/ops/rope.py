"""Rotary positions (RoFormer, Su 2021): pairs of channels turned by an angle times the position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longfire.ops.forms import LazyFunction, TensorFunction
from longfire.ops.linear import working_dtype

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
BY_LENGTH = ("dynamic", "longrope")  # whose angles depend on the length of the text

Angles = tuple[Tensor, float]  # radians a position, and the factor of turned queries and keys
SCALED = LazyFunction[Callable[..., Angles]]("longfire.ops.rope_scalings:scaled")
ROTATED = LazyFunction[TensorFunction]("longfire.ops.fast.rope:rotated_once")


@dataclass(frozen=True)
class Rotary:
    """How much each pair of channels turns a position. Names and formulas are those of
    transformers' `rope_parameters`, and the order of operations too: at position 100,000 one bit of
    a frequency is 0.006 radians.

    size: channels that turn, an even number.  scaling: one of SCALINGS.  original_length: tokens
    that the model was trained at.
    attention_factor: factor of q and k in yarn and longrope; 0: yarn's 0.1 ln(factor) + 1, or with
    mscale and mscale_all_dim both set the ratio (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim
    ln(factor) + 1); longrope's sqrt(1 + ln(factor) / ln(original_length)).
    short_factor, long_factor: longrope's divisors of each pair's frequency, up to the original
    length and beyond it.
    """

    size: int
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()

    def wavelengths(self, device: torch.device) -> Tensor:
        """(size / 2,) tokens a radian, before any scaling."""
        pairs = torch.arange(0, self.size, 2, dtype=torch.float32, device=device) / self.size
        return self.theta**pairs

    def turns(
        self, positions_BT: Tensor, lengths_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, 1, size / 2) of each position, fp32; lengths_BT: tokens of each
        token's document (BY_LENGTH only)."""
        device = positions_BT.device
        if self.scaling == "default":
            f = 1.0 / self.wavelengths(device)
            magnitude = 1.0
        else:
            f, magnitude = SCALED.get()(self, device, lengths_BT)
        angles_BT1K = (positions_BT[..., None].float() * f)[:, :, None]
        return angles_BT1K.cos() * magnitude, angles_BT1K.sin() * magnitude


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Turn channel pair (i, i + size/2) by the angles of `Rotary.turns`: the half-split layout of
    Hugging Face. Channels beyond the first `size` stay as they are (partial rotary). Rounded to x's
    dtype once; float64 inputs are turned in float64."""
    size = 2 * cos_BT1K.shape[-1]
    dtype = working_dtype(x_BTHK)
    cos = cos_BT1K.to(dtype)
    sin = sin_BT1K.to(dtype)
    turn_all = ROTATED.get()
    if size == x_BTHK.shape[-1]:
        return turn_all(x_BTHK, cos, sin)
    return torch.cat([turn_all(x_BTHK[..., :size], cos, sin), x_BTHK[..., size:]], -1)


def rotate_reference(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """The reference: (a, b) -> (a cos - b sin, b cos + a sin). Same arguments and result."""
    pairs = cos_BT1K.shape[-1]
    dtype = working_dtype(x_BTHK)
    cos = cos_BT1K.to(dtype)
    sin = sin_BT1K.to(dtype)
    a = x_BTHK[..., :pairs].to(dtype)
    b = x_BTHK[..., pairs : 2 * pairs].to(dtype)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BTHK.dtype)
    return torch.cat([turned, x_BTHK[..., 2 * pairs :]], -1)
