"""Weights in fewer bytes from which a product of 8-bit numbers (ops/float8.py) makes the same 8-bit
numbers as from the fp32 ones.

One scale for the whole matrix (tensorwise): the 8-bit numbers themselves. What they stand for is
rounded to them again, if the highest number is what it was, since the scale follows from that: all
numbers that became the largest 8-bit one are given back as the highest.

A scale for each row, which is another one in the backward (rowwise, rowwise_with_gw_hp): no one set
of 8-bit numbers serves both. Their scales are powers of two, so a number with a few bits more than
e4m3, rounded to odd, rounds to the same 8-bit number under each of them (Boldo and Melquiond 2008,
Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd): bf16 has
four more. And whether the highest number is above a limit is the same too, since all limits are
even bf16 numbers.
"""

import torch
from torch import Tensor

from longfire.ops.float8 import E4M3, rounded, scale_of

LOW_BITS = 0xFFFF  # of a float32, what bfloat16 lacks
LARGEST = torch.finfo(E4M3).max


def rounded_to_odd(weight: Tensor) -> Tensor:
    """float32 -> bfloat16 of any shape: what is no bfloat16 number becomes the one of its two
    neighbours whose last bit is 1."""
    bits = weight.contiguous().view(torch.int32)
    is_between = (bits & LOW_BITS) != 0
    return ((bits >> 16) | is_between).to(torch.int16).view(torch.bfloat16)


def as_8_bits(weight: Tensor, highest: Tensor) -> Tensor:
    """float32 -> e4m3 of any shape. highest: of the magnitudes of the whole matrix, which processes
    may share."""
    return rounded(weight, scale_of(highest, E4M3), E4M3)


def of_8_bits(values: Tensor, highest: Tensor) -> Tensor:
    """The float32 numbers that such values stand for."""
    wide = values.float()
    weight = wide * scale_of(highest, E4M3).reciprocal()
    return torch.where(wide.abs() == LARGEST, torch.copysign(highest, wide), weight)
