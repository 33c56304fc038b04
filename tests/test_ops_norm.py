"""Norms against torch's, transformers' and fla's formulas in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from longfire.ops.norm import (
    GatedRMSNorm,
    LayerNorm,
    RMSNorm,
    gated_rms_norm,
    l2_norm,
    layer_norm,
    rms_norm,
)

pytestmark = pytest.mark.dtype

EPS = 1e-5


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def assert_same(got: Tensor, true: Tensor, inputs: list[Tensor]) -> None:
    seed = torch.arange(got.numel()).reshape(got.shape).cos().to(got.dtype)
    for a, b in zip(
        (got, *torch.autograd.grad(got, inputs, seed)),
        (true, *torch.autograd.grad(true, inputs, seed)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 33])
def test_rms_norm(size):
    x, weight = leaves((2, 3, size), (size,))
    root = lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_same(rms_norm(x, weight, EPS), root(x) * weight, [x, weight])
    assert_same(rms_norm(x, None, EPS), root(x), [x])
    assert_same(
        rms_norm(x.transpose(0, 1), weight, EPS), (root(x) * weight).transpose(0, 1), [x, weight]
    )


def test_rms_norm_gradcheck_and_compiled():
    x, weight = leaves((3, 5), (5,))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    compiled = torch.compile(lambda x, w: rms_norm(x, w, EPS), backend="aot_eager")
    assert_same(rms_norm(x, weight, EPS), compiled(x, weight), [x, weight])


def test_rms_norm_is_llamas():
    """fp32, 2^-22: four roundings."""
    theirs, ours = LlamaRMSNorm(16, EPS), RMSNorm(16, EPS)
    x = torch.randn(4, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2**-22, atol=0)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = leaves((3, 5), (5,))
    rms_norm(x, weight.requires_grad_(False), EPS).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_narrow_weight_of_wide_inputs():
    """What parallelism.param_gather_dtype = bfloat16 gathers: forward and backward are those of its numbers in fp32."""
    chance = torch.Generator().manual_seed(0)
    x, narrow = torch.randn(2, 3, 8, generator=chance), torch.randn(8, generator=chance).bfloat16()
    found = []
    for weight in (narrow.clone(), narrow.float()):
        y = rms_norm(x, weight.requires_grad_(), 1e-6)
        (d_weight,) = torch.autograd.grad(y.square().sum(), weight)
        assert d_weight.dtype == weight.dtype
        found.append((y, d_weight.bfloat16()))
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found))


def test_layer_norm():
    x, weight, bias = leaves((2, 3, 7), (7,), (7,))

    def normed() -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()

    assert_same(layer_norm(x, weight, bias, EPS), normed() * weight + bias, [x, weight, bias])
    assert_same(layer_norm(x, None, None, EPS), normed(), [x])
    torch.testing.assert_close(LayerNorm(7, EPS).double()(x), normed())


def test_l2_norm():
    (x,) = leaves((2, 3, 7))
    assert_same(l2_norm(x, 1e-2), x / (x.square().sum(-1, keepdim=True) + 1e-2).sqrt(), [x])
    assert l2_norm(torch.zeros(2, 3)).eq(0).all()


@pytest.mark.parametrize(("activation", "gating"), [("swish", F.silu), ("sigmoid", torch.sigmoid)])
def test_gated_rms_norm(activation, gating):
    x, gate, weight = leaves((2, 3, 7), (2, 3, 7), (7,))
    true = F.rms_norm(x, (7,), weight, EPS) * gating(gate)
    assert_same(gated_rms_norm(x, gate, weight, EPS, activation), true, [x, gate, weight])
    torch.testing.assert_close(GatedRMSNorm(7, EPS, activation).double()(x, gate) * weight, true)


@pytest.mark.parametrize(
    "norm", [lambda x: rms_norm(x, None, EPS), l2_norm, lambda x: layer_norm(x, None, None, EPS)]
)
def test_bf16_is_rounded_once(norm):
    """Statistics in fp32: the result is the float64 one's nearest bf16, save where fp32's last bits tip a tie."""
    x = torch.randn(50, 64).bfloat16()
    assert (norm(x) == norm(x.double()).bfloat16()).float().mean() > 0.999
