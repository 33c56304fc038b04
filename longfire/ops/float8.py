"""Matrix products of numbers with 8 bits, for forward and backward of a linear layer.

A number with 8 bits is e4m3 (a sign, 4 bits of exponent, 3 of mantissa; at most 448) or e5m2 (5 and
2 bits; at most 57,344) (Micikevicius 2022, FP8 formats for deep learning). Before a product each
factor is multiplied by a scale, so that its largest number becomes the largest of the type, and
rounded to 8 bits. The products of these are summed in fp32, and divided by both scales. A scale is
made of the numbers at hand ("dynamic"), so nothing is kept between steps.

    y   (N, W) = x   (N, D) weight (W, D)^T      forward
    d_x (N, D) = d_y (N, W) weight (W, D)
    d_w (W, D) = d_y (N, W)^T x (N, D)

The recipes are those of torchao's Float8LinearConfig, by its names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longfire.ops.forms import LazyFunction, TensorFunction
from longfire.ops.linear import in_fp32, linear_reference, working_dtype

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
# Kernels take matrices whose rows and columns are multiples of this
MULTIPLE = 16
# A matrix of zeros has the scale of one whose largest number is this
SMALLEST = 1e-12
# The bits of a float32 that are its exponent; with no others set, it is a power of two
EXPONENT_BITS = 0x7F800000

Dim = Literal["tokens", "inputs", "outputs"]
# The highest of what several processes have, element by element
Highest = Callable[[Tensor], Tensor]

FLOAT8_LINEAR = LazyFunction[TensorFunction]("longfire.ops.fast.float8:float8_linear")
SCALED_PRODUCT = LazyFunction[TensorFunction]("longfire.ops.fast.float8:scaled_product")


@dataclass(frozen=True)
class Recipe:
    """What is rounded to which type, and what shares a scale.

    gradient_dtype: of d_y; x and weight are e4m3. has_row_scales: each row of a factor has its own
    scale, else the whole matrix has one. has_row_scales_backward: the same of the weight where d_x
    is made. rounds_weight_gradient: whether d_w is a product of 8-bit numbers, else of the compute
    type. has_powers_of_two: scales are rounded down to powers of two, which change no mantissa.
    """

    gradient_dtype: torch.dtype
    has_row_scales: bool
    has_row_scales_backward: bool
    rounds_weight_gradient: bool
    has_powers_of_two: bool


RECIPES = {
    "tensorwise": Recipe(E5M2, False, False, True, False),
    "rowwise": Recipe(E4M3, True, True, True, True),
    "rowwise_with_gw_hp": Recipe(E4M3, True, False, False, True),
}


@dataclass(frozen=True)
class Float8:
    """How a linear layer multiplies.

    is_emulated: the 8-bit values are multiplied in fp32, on any device, else by float8 units.
    highest: for each dim of which this process has a part only, the highest of all its parts.
    """

    recipe: Recipe
    is_emulated: bool
    highest: Mapping[Dim, Highest] = field(default_factory=dict)

    def linear(self, x: Tensor, weight_WD: Tensor, bias_W: Tensor | None) -> Tensor:
        """x (..., D) -> (..., W) in x's dtype. The weight is rounded from its own type to 8 bits;
        the bias is added in x's type."""
        y = FLOAT8_LINEAR.get()(x, weight_WD, self)
        if bias_W is None:
            return y
        return y + bias_W.to(y.dtype)


class Scaled(NamedTuple):
    """A factor of a product: values (R, K) with 8 bits, and what they are multiplied by to give the
    factor again, () or (R, 1)."""

    values_RK: Tensor
    inverse_scale: Tensor


def scaled(
    factor_RK: Tensor,
    dims: tuple[Dim, Dim],
    float8: Float8,
    dtype: torch.dtype = E4M3,
    has_row_scales: bool = False,
) -> Scaled:
    """A factor (R, K) as 8-bit numbers; K is summed over in the product.

    dims: what R and K are. A scale is that of all processes that have a part of what shares it: so
    it does not depend on how many they are. Infinities and NaN make their row NaN.
    """
    size_RK = factor_RK.detach().abs()
    if has_row_scales:
        highest = size_RK.amax(-1, keepdim=True)
        reduced_dims: tuple[Dim, ...] = dims[1:]
    else:
        highest = size_RK.amax()
        reduced_dims = dims
    for dim in reduced_dims:
        if dim in float8.highest:
            highest = float8.highest[dim](highest)
    scale = scale_of(highest, dtype)
    if float8.recipe.has_powers_of_two:
        scale = power_of_two_below(scale)
    return Scaled(rounded(factor_RK, scale, dtype), scale.reciprocal())


def scale_of(highest: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes the highest magnitude the largest number of the 8-bit type, float32."""
    # in float64, where eager and compiled code divide alike
    scale = torch.finfo(dtype).max / highest.double().clamp(min=SMALLEST)
    return scale.float()


def rounded(factor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor times the scale in the 8-bit type."""
    limit = torch.finfo(dtype).max
    return (in_fp32(factor) * scale).clamp(-limit, limit).to(dtype)


def power_of_two_below(scale: Tensor) -> Tensor:
    """The highest power of two that is at most this positive float32 number."""
    return (scale.view(torch.int32) & EXPONENT_BITS).view(torch.float32)


def emulated_product(a_RK: Scaled, b_CK: Scaled, dtype: torch.dtype) -> Tensor:
    """a b^T (R, C): 8-bit values multiplied, exactly, and summed in fp32 (float64 for float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    sums_RC = a_RK.values_RK.to(wide) @ b_CK.values_RK.to(wide).T
    return (sums_RC * a_RK.inverse_scale * b_CK.inverse_scale.reshape(1, -1)).to(dtype)


def product(a_RK: Scaled, b_CK: Scaled, dtype: torch.dtype, float8: Float8) -> Tensor:
    """a b^T (R, C) in this type."""
    if float8.is_emulated:
        return emulated_product(a_RK, b_CK, dtype)
    return SCALED_PRODUCT.get()(a_RK, b_CK, dtype)


def forward_product(x_ND: Tensor, weight_WD: Tensor, float8: Float8) -> Tensor:
    """x weight^T (N, W), in x's type."""
    has_row_scales = float8.recipe.has_row_scales
    x = scaled(x_ND, ("tokens", "inputs"), float8, has_row_scales=has_row_scales)
    weight = scaled(weight_WD, ("outputs", "inputs"), float8, has_row_scales=has_row_scales)
    return product(x, weight, x_ND.dtype, float8)


def input_gradient(
    d_y_NW: Tensor,
    weight_WD: Tensor,
    dtype: torch.dtype,
    float8: Float8,
) -> Tensor:
    """d_x (N, D) in x's type."""
    recipe = float8.recipe
    d_y = scaled(
        d_y_NW,
        ("tokens", "outputs"),
        float8,
        recipe.gradient_dtype,
        recipe.has_row_scales,
    )
    weight = scaled(
        weight_WD.T,
        ("inputs", "outputs"),
        float8,
        has_row_scales=recipe.has_row_scales_backward,
    )
    return product(d_y, weight, dtype, float8)


def weight_gradient(d_y_NW: Tensor, x_ND: Tensor, float8: Float8) -> Tensor:
    """d_w (W, D) in fp32 (float64 for float64), where both factors are rounded to 8 bits."""
    recipe = float8.recipe
    assert recipe.rounds_weight_gradient, "this recipe keeps the factors' type"
    d_y = scaled(
        d_y_NW.T,
        ("outputs", "tokens"),
        float8,
        recipe.gradient_dtype,
        recipe.has_row_scales,
    )
    x = scaled(x_ND.T, ("inputs", "tokens"), float8, has_row_scales=recipe.has_row_scales)
    return product(d_y, x, working_dtype(x_ND), float8)


def float8_linear_reference(
    x: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    float8: Float8,
) -> Tensor:
    """The reference of the forward: both factors with 8 bits, divided by their scales, then
    multiplied as matrices of x's working type. (Of one process.)"""
    has_row_scales = float8.recipe.has_row_scales
    x_ND = x.flatten(0, -2)
    rounded = []
    for factor_RK in (x_ND, weight_WD):
        values_RK, inverse_scale = scaled(
            factor_RK, ("tokens", "inputs"), float8, has_row_scales=has_row_scales
        )
        rounded.append(values_RK.to(working_dtype(x)) * inverse_scale)
    y_NW = linear_reference(rounded[0], rounded[1], bias_W)
    return y_NW.to(x.dtype).unflatten(0, x.shape[:-1])
