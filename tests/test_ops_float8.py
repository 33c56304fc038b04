"""Products of 8-bit numbers against the formats written out in numpy, and bounds of their rounding."""

import numpy as np
import pytest
import torch
from sets import slow_unless
from torch import Tensor

from longfire.ops import bf16
from longfire.ops.fast.float8 import padded
from longfire.ops.float8 import (
    E4M3,
    E5M2,
    RECIPES,
    Float8,
    float8_linear_reference,
    power_of_two_below,
    scaled,
)
from longfire.ops.linear import Linear

# Of each format: bits of the mantissa, the lowest exponent of a normal number, the highest number (Micikevicius 2022, table 1)
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
N, D, W = 40, 64, 48


def in_8_bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest number of the format, ties to even mantissas, at most the highest."""
    mantissa_bits, lowest, limit = FORMATS[dtype]
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, lowest)
    step = 2.0 ** (exponent - mantissa_bits)
    return np.clip(np.round(x / step) * step, -limit, limit)


def rounded(x: np.ndarray, dtype: torch.dtype, recipe: str, by_row: bool) -> np.ndarray:
    """x as a product sees it: scaled, with 8 bits, divided by the scale."""
    limit = FORMATS[dtype][2]
    highest = np.abs(x).max(1, keepdims=True) if by_row else np.abs(x).max()
    scale = (limit / np.maximum(highest.astype(np.float64), 1e-12)).astype(np.float32)
    if recipe != "tensorwise":
        scale = np.exp2(np.floor(np.log2(scale.astype(np.float64))))
    return in_8_bits(x * np.asarray(scale, x.dtype), dtype).astype(np.float64) / scale


def expected(x: np.ndarray, weight: np.ndarray, d_y: np.ndarray, recipe: str):
    """y, d_x and d_w in float64, as torchao documents the recipes."""
    by_row = recipe != "tensorwise"
    of_gradient = E5M2 if recipe == "tensorwise" else E4M3

    def times(a, b, a_dtype=E4M3, a_by_row=by_row, b_by_row=by_row):
        return rounded(a, a_dtype, recipe, a_by_row) @ rounded(b, E4M3, recipe, b_by_row).T

    y = times(x, weight)
    d_x = times(d_y, weight.T, of_gradient, b_by_row=recipe == "rowwise")
    d_w = d_y.T.astype(np.float64) @ x.astype(np.float64)
    if recipe != "rowwise_with_gw_hp":
        d_w = times(d_y.T, x.T, of_gradient)
    return y, d_x, d_w


def factors(tokens: int = N, outliers: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), weight (W, D) and d_y (N, W) in fp32; with rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, D, generator=generator)
    weight = torch.randn(W, D, generator=generator) * 0.05
    d_y = torch.randn(tokens, W, generator=generator) * 1e-4
    if outliers:
        x[3] *= 30
        weight[:, 5] *= 10
        d_y[7, 2] = 0.3
    return x, weight, d_y


def layer_of(weight: Tensor, recipe: str, is_emulated: bool = True, bias: bool = False) -> Linear:
    layer = Linear(D, W, bias=bias)
    layer.weight.data = weight.clone()
    layer.float8 = Float8(RECIPES[recipe], is_emulated)
    return layer


def results(layer: Linear, x: Tensor, d_y: Tensor) -> list[Tensor]:
    """y, d_x and d_w."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.weight), d_y)]


@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_gradients_are_those_of_the_written_formats(recipe, is_emulated):
    """fp32: 64 sums of exact products, each rounded by 2^-24 of what is summed, and two scales. The same numbers come from the
    kernel of float8 units, which torch has for CPUs too."""
    x, weight, d_y = factors()
    got = results(layer_of(weight, recipe, is_emulated), x, d_y)
    true = expected(x.numpy(), weight.numpy(), d_y.numpy(), recipe)
    summed = (
        x.abs() @ weight.abs().T,
        d_y.abs() @ weight.abs(),
        d_y.abs().T @ x.abs(),
    )
    for ours, theirs, size in zip(got, true, summed):
        # a factor with 8 bits is at most 17 / 16 (e5m2: 9 / 8) of the factor, or the half of its smallest number
        bound = 70 * 2.0**-24 * 1.5 * (size.double().numpy() + np.abs(theirs).max())
        assert (np.abs(ours.double().numpy() - theirs) <= bound).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_number_of_8_bits_is_kept(dtype):
    """With a scale of 1, and those between are rounded to the nearest."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()]
    limit = FORMATS[dtype][2]
    assert values.max() == limit
    float8 = Float8(RECIPES["tensorwise"], True)
    kept = scaled(values[:, None], ("tokens", "inputs"), float8, dtype)
    assert kept.inverse_scale == 1
    assert torch.equal(kept.values_RK.float()[:, 0], values)
    generator = torch.Generator().manual_seed(0)
    between = (
        torch.rand(5000, generator=generator)
        * limit
        * 2.0 ** -torch.randint(30, (5000,), generator=generator)
    )
    between[0] = limit
    here = scaled(between[:, None], ("tokens", "inputs"), float8, dtype).values_RK[:, 0]
    assert np.array_equal(here.float().numpy(), in_8_bits(between.numpy(), dtype))


def rounding_bound(factor: Tensor, dtype: torch.dtype, recipe: str, by_row: bool) -> Tensor:
    """The most by which a number of a factor is changed: half a unit of its mantissa, or half of the smallest number; scales
    that are powers of two leave up to half of the range unused."""
    mantissa_bits, lowest, limit = FORMATS[dtype]
    sizes = factor.abs().double()
    highest = sizes.amax(1, keepdim=True) if by_row else sizes.max()
    if recipe != "tensorwise":
        highest = 2 * highest
    smallest = highest / limit * 2.0 ** (lowest - mantissa_bits - 1)
    return torch.maximum(sizes * 2.0 ** -(mantissa_bits + 1), smallest)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_those_of_an_exact_product_within_the_rounding_of_both_factors(recipe):
    """|a b - a' b'| <= |a| e_b + e_a |b| + e_a e_b, element by element; fp32 sums change a 1000th of that at most."""
    x, weight, d_y = factors(outliers=False)
    by_row = recipe != "tensorwise"
    of_gradient = E5M2 if recipe == "tensorwise" else E4M3
    got = results(layer_of(weight, recipe), x, d_y)
    # what is multiplied, as (R, K) and (C, K); the type of the first; whether rows of the second have scales
    products = [
        (x, weight, E4M3, by_row),
        (d_y, weight.T, of_gradient, recipe == "rowwise"),
        (d_y.T, x.T, of_gradient, by_row),
    ]
    for number, (a, b, dtype, b_by_row) in enumerate(products):
        exact = a.double() @ b.double().T
        error = (got[number].double() - exact).abs()
        if number == 2 and recipe == "rowwise_with_gw_hp":
            assert (error <= 2.0**-24 * N * (a.abs() @ b.abs().T)).all(), "no factor is rounded"
            continue
        of_a = rounding_bound(a, dtype, recipe, by_row)
        of_b = rounding_bound(b, E4M3, recipe, b_by_row)
        a, b = a.abs().double(), b.abs().double()
        bound = a @ of_b.T + of_a @ b.T + of_a @ of_b.T
        assert (error <= 1.001 * bound).all()
        assert error.max() > 0.01 * bound.max(), "factors are rounded"


@pytest.mark.dtype
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("is_emulated", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_gives_its_type_and_fp32_gradients_of_masters(recipe, is_emulated, native):
    """y and d_x are rounded to bf16 once; d_w never is."""
    x, weight, d_y = factors()
    x, d_y = x.bfloat16(), d_y.bfloat16()
    with bf16.assumed(native):
        got = results(layer_of(weight, recipe, is_emulated), x, d_y)
    true = expected(x.float().numpy(), weight.numpy(), d_y.float().numpy(), recipe)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, theirs, unit in zip(got, true, (2.0**-8, 2.0**-8, 2.0**-18)):
        assert np.abs(ours.double().numpy() - theirs).max() <= unit * np.abs(theirs).max()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_forward_equals_its_reference(recipe, dtype):
    x, weight, _ = factors()
    bias = torch.arange(W) * 0.01
    layer = layer_of(weight, recipe, bias=True)
    layer.bias.data = bias
    x = x.to(dtype).unflatten(0, (2, N // 2))
    true = float8_linear_reference(x, layer.weight, layer.bias, layer.float8)
    got = layer(x)
    assert got.dtype == true.dtype == dtype and got.shape == true.shape == (2, N // 2, W)
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (got - true).abs().max() <= 4 * unit * true.abs().max()


def test_the_bias_has_the_gradient_of_a_sum():
    x, weight, d_y = factors()
    layer = layer_of(weight, "tensorwise", bias=True)
    layer(x).backward(d_y)
    assert torch.allclose(layer.bias.grad, d_y.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
def test_tokens_may_be_any_number(tokens):
    """The kernel takes multiples of 16 where tokens are summed over: zeros are added."""
    x, weight, d_y = factors(tokens, outliers=False)
    emulated = results(layer_of(weight, "tensorwise"), x, d_y)
    by_units = results(layer_of(weight, "tensorwise", is_emulated=False), x, d_y)
    for ours, theirs in zip(by_units, emulated):
        assert (ours - theirs).abs().max() <= 64 * 2.0**-24 * theirs.abs().max()
    values = padded(torch.ones(3, tokens).to(E4M3))
    assert values.shape == (3, -(-tokens // 16) * 16)
    assert values.float().sum() == 3 * tokens


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(recipe, value):
    x, weight, d_y = factors()
    x[4, 9] = value
    y, _, d_w = results(layer_of(weight, recipe), x, d_y)
    assert y[4].isnan().all()
    assert not d_w[:, 9].isfinite().any()
    if recipe != "tensorwise":
        others = torch.arange(N) != 4
        assert y[others].isfinite().all()


def test_zeros_give_zeros():
    _, weight, d_y = factors()
    y, d_x, d_w = results(layer_of(weight, "tensorwise"), torch.zeros(N, D), d_y)
    assert not y.any() and not d_w.any()
    assert d_x.any()


def test_powers_of_two_are_rounded_down_exactly():
    exact = torch.tensor([2.0**-100, 0.5, 1.0, 2.0**40])
    assert torch.equal(power_of_two_below(exact), exact)
    above = torch.nextafter(exact, torch.tensor(torch.inf))
    assert torch.equal(power_of_two_below(above), exact)
    below = torch.nextafter(exact, torch.tensor(0.0))
    assert torch.equal(power_of_two_below(below), exact / 2)


def test_only_x_and_the_master_are_kept_for_the_backward():
    x, weight, _ = factors()
    layer, kept = layer_of(weight, "rowwise"), []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        layer(x)
    assert set(kept) == {x.data_ptr(), layer.weight.data_ptr()}


def test_a_frozen_master_or_input_gets_no_gradient():
    x, weight, d_y = factors()
    layer = layer_of(weight, "tensorwise")
    layer.weight.requires_grad_(False)
    x.requires_grad_()
    layer(x).backward(d_y)
    assert x.grad is not None and layer.weight.grad is None


@pytest.mark.parametrize("recipe", slow_unless(lambda recipe: recipe == "tensorwise", RECIPES))
def test_compiled_it_is_one_graph_with_the_same_numbers(recipe):
    """Scales are divided in float64, so that eager and compiled code round alike."""
    x, weight, d_y = factors()
    layer = layer_of(weight, recipe)
    eager = results(layer, x, d_y)
    compiled = torch.compile(layer, fullgraph=True)
    x.requires_grad_()
    y = compiled(x)
    got = [y.detach(), *torch.autograd.grad(y, (x, layer.weight), d_y)]
    for ours, theirs in zip(got, eager):
        assert (ours - theirs).abs().max() <= 64 * 2.0**-24 * theirs.abs().max()
