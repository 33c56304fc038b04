"""The linear product: torch's own in fp32, the meaning of bf16 whatever the units of the device."""

import pytest
import torch
import torch.nn.functional as F

from longfire.ops import bf16
from longfire.ops.linear import Linear, linear, linear_reference

pytestmark = pytest.mark.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_is_torchs(dtype, bias):
    layer = Linear(5, 3, bias=bias).to(dtype)
    x = torch.randn(2, 7, 5, dtype=dtype, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("native", [True, False])
def test_bf16_rounds_values_and_result_whatever_the_units(native):
    """Either way: bf16 values, exact products, sums in fp32, one rounding. The gradients of the fp32 master stay fp32."""
    weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    x = torch.randn(2, 7, 5).bfloat16().requires_grad_()
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    seed = torch.randn(2, 7, 3).bfloat16()
    with bf16.assumed(native):
        got, true = linear(x, weight, bias), F.linear(*exact)
        gradients = torch.autograd.grad(got, (x, weight, bias), seed)
    for a, b in zip((got, *gradients), (true, *torch.autograd.grad(true, exact, seed.double()))):
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_its_reference_forward_and_backward(dtype, native):
    """One rounding to the type at the end of each, of sums of at most 14 products."""
    masters = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 5, generator=generator).to(masters).requires_grad_()
    bias = torch.randn(3, generator=generator).to(masters).requires_grad_()
    seed = torch.randn(2, 7, 3, generator=generator).to(dtype)
    found = []
    with bf16.assumed(native):
        for form in (linear, linear_reference):
            y = form(x, weight, bias)
            found.append([y, *torch.autograd.grad(y, (x, weight, bias), seed)])
    unit = torch.finfo(dtype).eps
    for fast, true in zip(*found):
        assert fast.dtype == true.dtype
        assert (fast - true).abs().max() <= 14 * unit * true.abs().max()


@pytest.mark.parametrize("native", [True, False])
def test_the_gradient_of_a_master_weight_is_never_rounded_to_bf16(native):
    """Of bf16 factors the products are exact: only fp32 sums of 64 tokens round, each by half a unit at most."""
    weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    x, d_y = torch.randn(64, 5).bfloat16(), torch.randn(64, 3).bfloat16()
    with bf16.assumed(native):
        linear(x, weight, bias).backward(d_y)
    exact = (d_y.double().T @ x.double(), d_y.double().sum(0))
    for gradient, true in zip((weight.grad, bias.grad), exact):
        assert gradient.dtype == torch.float32
        assert (gradient - true).abs().max() <= 64 * 2**-24 * 64 * d_y.abs().max() * x.abs().max()
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_without_units_only_x_and_the_master_are_kept():
    weight, x, kept = (
        torch.randn(3, 5, requires_grad=True),
        torch.randn(7, 5).bfloat16().requires_grad_(),
        [],
    )
    packed = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    )
    with bf16.assumed(False), packed:
        linear(x, weight)
    assert set(kept) == {x.data_ptr(), weight.data_ptr()}


def test_a_frozen_master_or_input_gets_no_gradient():
    weight, x = torch.randn(3, 5), torch.randn(7, 5).bfloat16().requires_grad_()
    with bf16.assumed(False):
        linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_compiled_block_keeps_no_rounded_copy_of_its_weights():
    """Two products in a row, since the first alone need not give its input a gradient: of a weight, only the master
    itself is kept, which a sharded model gives back between forward and backward."""
    first = Linear(48, 80)
    second = Linear(80, 48)
    masters = {x.weight.data_ptr() for x in (first, second)}
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def block(x):
        return second(F.silu(first(x)))

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager_decomp_partition", dynamic=False)
    x = torch.randn(16, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compiled(x)
    y.sum().backward()
    copies = [x for x in kept if x.numel() == 48 * 80 and x.data_ptr() not in masters]
    assert not copies
    assert {x.data_ptr() for x in kept} >= {second.weight.data_ptr()}
