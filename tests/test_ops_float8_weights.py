"""ops/float8_weights.py: a weight in fewer bytes gives the same 8-bit numbers and scales, to the bit."""

import pytest
import torch
from torch import Tensor

from longfire.ops.float8 import EXPONENT_BITS, RECIPES, Float8, scaled
from longfire.ops.float8_weights import as_8_bits, of_8_bits, rounded_to_odd


def weights(kind: str) -> Tensor:
    """(32, 48) float32."""
    chance = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 48, generator=chance)
    if kind == "normal":
        return 0.02 * normal
    if kind == "of all sizes":
        return normal * torch.exp2(torch.randint(-40, 12, normal.shape, generator=chance))
    if kind == "rows of all sizes":
        return normal * torch.exp2(torch.randint(-60, 20, (32, 1), generator=chance))
    if kind == "beside the middle of two 8-bit numbers":
        eighths = torch.randint(1, 4000, normal.shape, generator=chance) / 16
        return eighths * torch.where(normal > 0, 1 + 2.0**-23, 1 - 2.0**-24) * normal.sign()
    if kind == "beside a power of two of the scale":
        highest = 448 / torch.exp2(torch.randint(-3, 30, (32, 1), generator=chance))
        beside = torch.where(normal > 0, 1 + 2.0**-23, 1 - 2.0**-24) * highest
        return torch.where(normal.abs() > 1, beside, 1e-3 * highest * normal)
    if kind == "tiny":
        return 1e-14 * normal
    if kind == "subnormal":
        return 1e-41 * normal
    assert kind == "zeros"
    return torch.zeros(32, 48)


KINDS = (
    "normal",
    "of all sizes",
    "rows of all sizes",
    "beside the middle of two 8-bit numbers",
    "beside a power of two of the scale",
    "tiny",
    "subnormal",
    "zeros",
)


def travelled(weight: Tensor, recipe: str) -> Tensor:
    """What a process has of a weight that came in the form of its recipe."""
    if RECIPES[recipe].has_powers_of_two:
        return rounded_to_odd(weight).float()
    highest = weight.abs().amax()
    return of_8_bits(as_8_bits(weight, highest), highest)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_see_the_same_8_bit_numbers(kind, recipe):
    weight = weights(kind)
    there = travelled(weight, recipe)
    float8 = Float8(RECIPES[recipe], is_emulated=True)
    ways = (
        (("outputs", "inputs"), weight, there, float8.recipe.has_row_scales),
        (("inputs", "outputs"), weight.T, there.T, float8.recipe.has_row_scales_backward),
    )
    for dims, before, after, has_row_scales in ways:
        wanted = scaled(before, dims, float8, has_row_scales=has_row_scales)
        got = scaled(after, dims, float8, has_row_scales=has_row_scales)
        assert torch.equal(got.inverse_scale, wanted.inverse_scale)
        assert torch.equal(got.values_RK.float(), wanted.values_RK.float())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_bfloat16_number_becomes_its_odd_neighbour(kind):
    weight = weights(kind)
    odd = rounded_to_odd(weight)
    exact = weight.bfloat16().float() == weight
    assert torch.equal(odd.float()[exact], weight[exact])
    apart = (odd.float() - weight).abs()[~exact]
    exponent = (weight[~exact].view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    assert bool((apart <= exponent.clamp(min=2.0**-126) * 2.0**-7).all())
    assert bool((odd.view(torch.int16)[~exact] & 1 == 1).all())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("broken", [float("inf"), float("-inf"), float("nan")])
def test_a_broken_number_stays_noticed(broken, recipe):
    weight = weights("normal")
    weight[3, 5] = broken
    assert not travelled(weight, recipe).isfinite().all()
