"""Scalings of rotary positions, which let a model go beyond the length that it was trained at
(ops/rope.py)."""

import math

import torch
from torch import Tensor

from longfire.ops.rope import BY_LENGTH, Angles, Rotary


def scaled(rotary: Rotary, device: torch.device, lengths_BT: Tensor | None) -> Angles:
    """The frequencies of texts of these lengths, and the factor of queries and keys."""
    f = frequencies(rotary, device)
    if rotary.scaling in BY_LENGTH:
        assert lengths_BT is not None, f"{rotary.scaling} scaling depends on the length"
        f = beyond(rotary, f, lengths_BT)
    return f, magnitude(rotary)


def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """(size / 2,) radians a position; of scalings in BY_LENGTH up to the original length."""
    wavelengths = rotary.wavelengths(device)
    if rotary.scaling == "longrope":
        return 1.0 / (torch.tensor(rotary.short_factor, device=device) * wavelengths)
    if rotary.scaling == "yarn":
        return yarn(rotary, wavelengths)
    f = 1.0 / wavelengths
    if rotary.scaling == "linear":  # position interpolation (Chen 2023)
        return f / rotary.factor
    if rotary.scaling == "llama3":
        return llama3(rotary, f)
    return f


def llama3(rotary: Rotary, f: Tensor) -> Tensor:
    """Slow pairs, which did not turn once in original_length / low_freq_factor, are
    interpolated; fast ones are not; a ramp between (Llama 3.1)."""
    wavelength = 2 * math.pi / f
    longest = rotary.original_length / rotary.low_freq_factor
    shortest = rotary.original_length / rotary.high_freq_factor
    ramp = (rotary.original_length / wavelength - rotary.low_freq_factor) / (
        rotary.high_freq_factor - rotary.low_freq_factor
    )
    between = (1 - ramp) * f / rotary.factor + ramp * f
    slow = torch.where(wavelength > longest, f / rotary.factor, f)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, slow)


def yarn(rotary: Rotary, wavelengths: Tensor) -> Tensor:
    """The same idea with a ramp over the pairs' numbers (Peng 2023, eq. 23)."""

    def pair_that_turns(times: float) -> float:
        return (
            rotary.size
            * math.log(rotary.original_length / (times * 2 * math.pi))
            / (2 * math.log(rotary.theta))
        )

    low = pair_that_turns(rotary.beta_fast)
    high = pair_that_turns(rotary.beta_slow)
    if rotary.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rotary.size - 1)
    if low == high:
        high += 0.001
    places = torch.arange(len(wavelengths), dtype=torch.float32, device=wavelengths.device)
    kept = 1 - ((places - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rotary.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def magnitude(rotary: Rotary) -> float:
    """What turned queries and keys are multiplied by."""
    if rotary.scaling == "longrope":
        if rotary.factor > 1:
            growth = math.log(rotary.factor) / math.log(rotary.original_length)
        else:
            growth = 0.0
        return rotary.attention_factor or math.sqrt(1 + growth)
    if rotary.scaling != "yarn":
        return 1.0
    growth = 0.1 * math.log(rotary.factor) if rotary.factor > 1 else 0.0
    above, below = (
        (rotary.mscale, rotary.mscale_all_dim)
        if rotary.mscale and rotary.mscale_all_dim
        else (1.0, 0.0)
    )
    return rotary.attention_factor or (above * growth + 1) / (below * growth + 1)


def beyond(rotary: Rotary, f: Tensor, lengths_BT: Tensor) -> Tensor:
    """(B, T, size / 2) the frequencies of texts of these lengths, given those up to the
    original length."""
    is_longer_BT1 = (lengths_BT > rotary.original_length)[..., None]
    if rotary.scaling == "longrope":  # LongRoPE (Ding 2024)
        long_factor = torch.tensor(rotary.long_factor, device=f.device)
        return torch.where(is_longer_BT1, 1.0 / (long_factor * rotary.wavelengths(f.device)), f)
    # NTK-aware: beyond the original length theta grows with the length
    pairs = torch.arange(0, rotary.size, 2, dtype=torch.float32, device=f.device) / rotary.size
    grown_BT = (rotary.factor * lengths_BT / rotary.original_length) - (rotary.factor - 1)
    theta_BT1 = rotary.theta * grown_BT[..., None] ** (rotary.size / (rotary.size - 2))
    return torch.where(is_longer_BT1, 1.0 / theta_BT1**pairs, f)
