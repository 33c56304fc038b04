"""Ways to multiply 8-bit numbers (ops/float8.py): by the float8 units of a GPU, elsewhere as a run
with float8.emulate = true does.

The reference multiplies the same 8-bit numbers in float64. Scales are powers of two, so that they
are the same numbers whatever the type of the inputs.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from longfire.device import has_float8_units
from longfire.doctor.op_cases import Case, Draw, Inputs, Sizes
from longfire.ops.fast.float8 import float8_linear as linear_of_8_bits
from longfire.ops.float8 import RECIPES, Float8

ROWWISE = RECIPES["rowwise"]


def float8_linear(x_BTD: Tensor, weight_WD: Tensor) -> Tensor:
    """The product, and its gradients, as this device makes them."""
    has_units = x_BTD.device.type == "cuda" and x_BTD.dtype == torch.bfloat16
    return linear_of_8_bits(x_BTD, weight_WD, Float8(ROWWISE, is_emulated=not has_units))


def float8_linear_reference(x_BTD: Tensor, weight_WD: Tensor) -> Tensor:
    """The same numbers, multiplied in the type of x, float64."""
    return linear_of_8_bits(x_BTD, weight_WD, Float8(ROWWISE, is_emulated=True))


def inputs(draw: Draw, n: Sizes) -> Inputs:
    width = n.H * n.K
    return {
        "x_BTD": draw.normal(n.B, n.T, width),
        "weight_WD": draw.normal(2 * width, width) / width**0.5,
    }


def missing(device: torch.device) -> str:
    """Why a device cannot multiply 8-bit numbers; a CPU emulates it."""
    if device.type != "cuda" or has_float8_units(device):
        return ""
    return "this GPU has no float8 units"


def cases() -> Iterator[Case]:
    yield Case(sys.modules[__name__], "float8_linear", "scales of rows", inputs, missing)
