"""Rotary positions (RoFormer, Su 2021): pairs of channels turned by an angle that grows with the
position; and their scalings, which let a model go beyond the length that it was trained at."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.linear import working_dtype

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
BY_LENGTH = ("dynamic", "longrope")  # whose angles depend on the length of the text


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

    def frequencies(self, device: torch.device) -> Tensor:
        """(size / 2,) radians a position; of scalings in BY_LENGTH up to the original length."""
        wavelengths = self.wavelengths(device)
        if self.scaling == "longrope":
            return 1.0 / (torch.tensor(self.short_factor, device=device) * wavelengths)
        if self.scaling == "yarn":
            return self.yarn(wavelengths)
        f = 1.0 / wavelengths
        if self.scaling == "linear":  # position interpolation (Chen 2023)
            return f / self.factor
        if self.scaling == "llama3":
            return self.llama3(f)
        return f

    def llama3(self, f: Tensor) -> Tensor:
        """Slow pairs, which did not turn once in original_length / low_freq_factor, are
        interpolated; fast ones are not; a ramp between (Llama 3.1)."""
        wavelength = 2 * math.pi / f
        longest = self.original_length / self.low_freq_factor
        shortest = self.original_length / self.high_freq_factor
        ramp = (self.original_length / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        between = (1 - ramp) * f / self.factor + ramp * f
        slow = torch.where(wavelength > longest, f / self.factor, f)
        return torch.where((wavelength >= shortest) & (wavelength <= longest), between, slow)

    def yarn(self, wavelengths: Tensor) -> Tensor:
        """The same idea with a ramp over the pairs' numbers (Peng 2023, eq. 23)."""

        def pair_that_turns(times: float) -> float:
            return (
                self.size
                * math.log(self.original_length / (times * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low = pair_that_turns(self.beta_fast)
        high = pair_that_turns(self.beta_slow)
        if self.truncate:
            low = math.floor(low)
            high = math.ceil(high)
        low = max(low, 0)
        high = min(high, self.size - 1)
        if low == high:
            high += 0.001
        places = torch.arange(len(wavelengths), dtype=torch.float32, device=wavelengths.device)
        kept = 1 - ((places - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

    @property
    def magnitude(self) -> float:
        """What turned queries and keys are multiplied by."""
        if self.scaling == "longrope":
            if self.factor > 1:
                growth = math.log(self.factor) / math.log(self.original_length)
            else:
                growth = 0.0
            return self.attention_factor or math.sqrt(1 + growth)
        if self.scaling != "yarn":
            return 1.0
        growth = 0.1 * math.log(self.factor) if self.factor > 1 else 0.0
        above, below = (
            (self.mscale, self.mscale_all_dim)
            if self.mscale and self.mscale_all_dim
            else (1.0, 0.0)
        )
        return self.attention_factor or (above * growth + 1) / (below * growth + 1)

    def turns(
        self, positions_BT: Tensor, lengths_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, 1, size / 2) of each position, fp32; lengths_BT: tokens of each
        token's document (BY_LENGTH only)."""
        f = self.frequencies(positions_BT.device)
        if self.scaling in BY_LENGTH:
            assert lengths_BT is not None, f"{self.scaling} scaling depends on the length"
            f = self.beyond(f, lengths_BT)
        angles_BT1K = (positions_BT[..., None].float() * f)[:, :, None]
        return angles_BT1K.cos() * self.magnitude, angles_BT1K.sin() * self.magnitude

    def beyond(self, f: Tensor, lengths_BT: Tensor) -> Tensor:
        """(B, T, size / 2) the frequencies of texts of these lengths, given those up to the
        original length."""
        is_longer_BT1 = (lengths_BT > self.original_length)[..., None]
        if self.scaling == "longrope":  # LongRoPE (Ding 2024)
            long_factor = torch.tensor(self.long_factor, device=f.device)
            return torch.where(is_longer_BT1, 1.0 / (long_factor * self.wavelengths(f.device)), f)
        # NTK-aware: beyond the original length theta grows with the length
        pairs = torch.arange(0, self.size, 2, dtype=torch.float32, device=f.device) / self.size
        grown_BT = (self.factor * lengths_BT / self.original_length) - (self.factor - 1)
        theta_BT1 = self.theta * grown_BT[..., None] ** (self.size / (self.size - 2))
        return torch.where(is_longer_BT1, 1.0 / theta_BT1**pairs, f)


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Turn channel pair (i, i + size/2) by the angles of `Rotary.turns`: the half-split layout of
    Hugging Face. Channels beyond the first `size` stay as they are (partial rotary). Rounded to x's
    dtype once; float64 inputs are turned in float64."""
    size = 2 * cos_BT1K.shape[-1]
    dtype = working_dtype(x_BTHK)
    cos = cos_BT1K.to(dtype)
    sin = sin_BT1K.to(dtype)
    turn_all = _Rotate.apply if torch.is_grad_enabled() else rotated
    if size == x_BTHK.shape[-1]:
        return turn_all(x_BTHK, cos, sin)
    return torch.cat([turn_all(x_BTHK[..., :size], cos, sin), x_BTHK[..., size:]], -1)


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
