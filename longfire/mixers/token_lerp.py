"""Tokens moved towards the one before, which RWKV-7's mixer and its MLP share, and how such parts
begin."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Initialiser = Callable[[Tensor, torch.Generator], object]


def towards(x_BTD: Tensor, change_BTD: Tensor, share: Tensor) -> Tensor:
    """x and a share of the change, for each channel."""
    return torch.addcmul(x_BTD, change_BTD, share.to(x_BTD.dtype))


def share_of_previous(size: int, power: float) -> Tensor:
    """1 - (i / size)^power for each channel i."""
    return 1 - (torch.arange(size, device="cpu") / size) ** power


def orthogonal(gain: float) -> Initialiser:
    """The initialiser of a matrix with orthogonal rows or columns of length `gain`."""
    return lambda weight, generator: nn.init.orthogonal_(weight, gain, generator)
