"""Dropout whose mask is a pure function of (seed, sequence, position, place in the model, channel):
no plan and no resume changes it.

The noise of a token is a 32-bit number, made of the seed, the number of its sequence in the run and
its place in the sequence. A layer mixes itself in, a channel too, and what comes out decides:
nothing is drawn in an order, so nothing depends on one.
"""

import torch
from torch import Tensor

from longfire.ops.forms import LazyFunction, TensorFunction

DROPPED = LazyFunction[TensorFunction]("longfire.ops.fast.dropout:dropped")
GOLDEN = -1640531527  # 2^32 / golden ratio, as int32: neighbouring numbers become far apart


def mixed(x: Tensor) -> Tensor:
    """A hash of int32 numbers (lowbias32 of Wellons' hash prospector: bias of each bit on each
    under 0.2 %)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def with_index(noise: Tensor, index_X: Tensor) -> Tensor:
    """(...) and (X,) -> (..., X): new noise for each of X places."""
    return mixed(noise[..., None] ^ (index_X * GOLDEN))


def of_place(noise_BT: Tensor, place: int) -> Tensor:
    """Noise of the same tokens at another place of the model."""
    return mixed(noise_BT + place)


def kept(noise: Tensor, p: float) -> Tensor:
    """bool: a share 1 - p of the noise says keep."""
    return (noise & 0x7FFFFFFF) >= int(p * 2**31)


def dropout(x_BTD: Tensor, p: float, noise_BT: Tensor | None) -> Tensor:
    """x / (1 - p) with a share p of its channels at 0; x itself without noise (evaluation) or with
    p = 0."""
    if noise_BT is None or p == 0:
        return x_BTD
    return DROPPED.get()(x_BTD, None, p, noise_BT)


def dropout_add(x_BTD: Tensor, residual_BTD: Tensor, p: float, noise_BT: Tensor | None) -> Tensor:
    """residual + dropout(x), in the residual's dtype: one step that keeps nothing for the backward
    but the tokens' noise."""
    if noise_BT is None or p == 0:
        return residual_BTD + x_BTD
    return DROPPED.get()(x_BTD, residual_BTD, p, noise_BT)


def dropout_add_reference(
    x_BTD: Tensor, residual_BTD: Tensor, p: float, noise_BT: Tensor | None
) -> Tensor:
    """The reference: a mask that is kept. Same arguments and result."""
    if noise_BT is None or p == 0:
        return residual_BTD + x_BTD
    return residual_BTD + torch.where(
        channel_mask(noise_BT, x_BTD.shape[-1], p), x_BTD / (1 - p), 0.0
    )


def channel_mask(noise_BT: Tensor, channels: int, p: float) -> Tensor:
    """(B, T, D) bool."""
    index_D = torch.arange(channels, dtype=torch.int32, device=noise_BT.device)
    return kept(with_index(noise_BT, index_D), p)
