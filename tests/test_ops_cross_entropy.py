"""The fused loss head against F.cross_entropy of all logits in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longfire.ops import bf16
from longfire.ops import cross_entropy as module
from longfire.ops.cross_entropy import (
    VocabularyShard,
    cached_rows,
    likeliest,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    softcap_in_place,
    token_losses,
)

pytestmark = pytest.mark.dtype

W, D = 53, 7


def as_it_is(x: Tensor) -> Tensor:
    """What one process alone makes of a sum or a maximum over all."""
    return x


# The form of many processes (tests/test_parallel_tensor.py), in one
ALL_WORDS = VocabularyShard(0, W, as_it_is, as_it_is, as_it_is, as_it_is)


def inputs(
    N: int, dtype: torch.dtype = torch.float64, ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    hidden, weight = (
        torch.randn(n, D, generator=generator).to(dtype).requires_grad_() for n in (N, W)
    )
    labels = torch.randint(W, (N,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(N, generator=generator) < ignored, -100)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, **_) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")


def shared(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, vocabulary=ALL_WORDS, **options)


def results(form, hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> list[Tensor]:
    loss = form(hidden, weight, labels, **options)
    return [loss, *torch.autograd.grad(loss / 7, (hidden, weight))]


@pytest.mark.parametrize("form", [linear_cross_entropy, linear_cross_entropy_reference, shared])
@settings(deadline=None, max_examples=20)
@given(
    N=some.integers(1, 70), chunk=some.integers(1, 80), ignored=some.sampled_from([0.0, 0.2, 1.0])
)
def test_against_the_plain_form(form, N, chunk, ignored):
    made = inputs(N, ignored=ignored)
    for got, true in zip(results(form, *made, chunk_tokens=chunk), results(plain, *made)):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


def test_losses_of_tokens():
    hidden, weight, labels = inputs(70)
    labels[::3] = (hidden @ weight.T).argmax(1)[::3]
    losses, greedy = token_losses(hidden, weight, labels, chunk_tokens=16)
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
    again = token_losses(hidden, weight, labels, chunk_tokens=16, vocabulary=ALL_WORDS)
    torch.testing.assert_close(again[0], losses)
    assert torch.equal(again[1], greedy) and greedy[::3].all() and not greedy.all()


def test_the_likeliest_of_equal_words_is_the_first():
    """Seen by a process with words 10 to 15, of which another process has an equal one, or a better one."""
    logits_NW = torch.tensor([[0.0, 3, 3, 1, 0], [0, 3, 0, 0, 0], [0, 0, 2, 0, 0]])
    others = iter([torch.tensor([2.0, 3, 4]), torch.tensor([-W, -7, -40])])
    vocabulary = ALL_WORDS._replace(
        first=10, total=W, take_highest=lambda x: torch.maximum(x, next(others))
    )
    assert likeliest(logits_NW, vocabulary).tolist() == [11, 7, 40]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_lower_precision(dtype, unit, native):
    """Against the float64 truth of the same rounded values. With bf16 units logits and their gradient are rounded to bf16 (on
    a CPU): half a unit of the largest logit moves a probability by as much, and the sums of 40 rows halve again."""
    hidden, weight, labels = inputs(40, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    with bf16.assumed(native):
        got = results(linear_cross_entropy, hidden, weight, labels, chunk_tokens=16)
    true = results(plain, *exact, labels)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    for a, b in zip(got, true):
        assert (a.double() - b).abs().max() <= 16 * unit * b.abs().max()


@pytest.mark.parametrize("native", [True, False])
def test_fp32_master_weight_of_bf16_states_gets_an_fp32_gradient(native):
    hidden, weight, labels = inputs(20, torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    with bf16.assumed(native):
        (gradient,) = torch.autograd.grad(
            linear_cross_entropy(hidden, master, labels, chunk_tokens=8), master
        )
    assert gradient.dtype == torch.float32 and not torch.equal(
        gradient, gradient.bfloat16().float()
    )


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted):
    made = inputs(30)
    made[1 - wanted].requires_grad_(False)
    got, true = (
        torch.autograd.grad(f(*made), made[wanted])[0] for f in (linear_cross_entropy, plain)
    )
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize("form", [linear_cross_entropy, shared])
def test_large_logits_neither_overflow_nor_vanish(form):
    hidden, weight, labels = inputs(10, torch.float32, ignored=0.0)
    got = results(form, hidden * 1e4, weight, labels)
    true = results(plain, hidden * 1e4, weight, labels)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0].double(), true[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("graph", [True, False])
def test_buffers(graph, monkeypatch):
    """The logits have one buffer of chunk_tokens x W; gradients have theirs only if someone can ask for them."""
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and function.overloadpacket.__name__.startswith(
                ("empty", "new_empty", "zeros", "mm", "mul")
            ):
                sizes.append(out.numel())
            return out

    monkeypatch.setattr(module, "CACHED_BYTES", 2 * 8 * W)  # two rows of float64
    hidden, weight, labels = inputs(48)
    with torch.set_grad_enabled(graph), Recorder():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    assert max(sizes) == 8 * 64  # W rounded up, so that rows are aligned
    assert (W * D in sizes) == graph


def test_rows_in_the_cache_follow_from_bytes():
    """Of a small vocabulary many rows go through softmax together, of a large one few, and never none."""
    words_and_rows = [(2_048, 384), (50_257, 15), (2**21, 1)]
    for vocabulary, rows in words_and_rows:
        assert cached_rows(torch.empty(1, 1).expand(1024, vocabulary)) == rows


def test_a_second_backward_is_refused():
    hidden, weight, labels = inputs(5)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_no_gradient_of_the_gradient():
    hidden, weight, labels = inputs(5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


@pytest.mark.parametrize("label", [W, -1])
def test_a_label_that_is_no_word_is_named(label):
    hidden, weight, labels = inputs(5)
    labels[3] = label
    with pytest.raises(IndexError, match=f"label {label} "):
        linear_cross_entropy(hidden, weight, labels)


def test_inside_a_compiled_function():
    made = inputs(20)
    compiled = torch.compile(
        lambda h, w, t: linear_cross_entropy(h.sin(), w, t) / 3, backend="aot_eager"
    )
    got, true = (
        torch.autograd.grad(f, made[:2])
        for f in (compiled(*made), plain(made[0].sin(), *made[1:]) / 3)
    )
    torch.testing.assert_close(got, true)


def capped(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float, **_) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(softcap * torch.tanh(logits / softcap), labels, reduction="sum")


@pytest.mark.parametrize("softcap", [0.3, 2.0, 15.0, 1e6])
@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("form", [linear_cross_entropy, linear_cross_entropy_reference, shared])
def test_soft_cap_against_autograd(form, chunk, softcap, monkeypatch):
    """Logits have a standard deviation of sqrt(7): caps that saturate, that bend, and that do nothing."""
    monkeypatch.setattr(module, "CAPPED_ROWS", 20)
    made = inputs(50)
    got = results(form, *made, chunk_tokens=chunk, softcap=softcap)
    for a, b in zip(got, results(capped, *made, softcap=softcap)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("vocabulary", [None, ALL_WORDS])
def test_losses_of_tokens_with_a_soft_cap(vocabulary):
    hidden, weight, labels = inputs(70)
    logits = 2 * torch.tanh(hidden @ weight.T / 2)
    losses, greedy = token_losses(
        hidden, weight, labels, chunk_tokens=16, vocabulary=vocabulary, softcap=2.0
    )
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(greedy, (labels != -100) & (logits.argmax(1) == labels))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_soft_cap_in_lower_precision(dtype, unit, native, monkeypatch):
    """As in test_lower_precision: a cap moves no logit further than its rounding did."""
    monkeypatch.setattr(module, "native_bf16", lambda device: native)
    hidden, weight, labels = inputs(40, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    got = results(linear_cross_entropy, hidden, weight, labels, chunk_tokens=16, softcap=5.0)
    for a, b in zip(got, results(capped, *exact, labels, softcap=5.0)):
        assert (a.double() - b).abs().max() <= 16 * unit * b.abs().max()


@pytest.mark.parametrize("form", [linear_cross_entropy, shared])
def test_a_saturated_soft_cap_is_finite_and_has_no_gradient(form):
    hidden, weight, labels = inputs(10, torch.float32, ignored=0.0)
    hidden = hidden.abs() * 1e4  # beyond any logit whose tanh is not +-1
    loss, d_hidden, d_weight = results(form, hidden, weight.abs(), labels, softcap=15.0)
    assert loss.isclose(torch.tensor(10 * math.log(W)), rtol=1e-4)
    assert not d_hidden.any() and not d_weight.any()


def test_a_soft_cap_without_gradients_takes_no_further_buffer():
    hidden, weight, labels = inputs(20)
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, labels, softcap=2.0)
    torch.testing.assert_close(got, capped(hidden, weight, labels, 2.0).detach())
    assert softcap_in_place(hidden.detach().clone(), 2.0, gradient=False) is None


def warped(hidden: Tensor, weight: Tensor, labels: Tensor, **_) -> Tensor:
    """The loss whose gradient fla's L2Wrap gives, with every real token in the mean that it takes."""
    logits = hidden @ weight.T
    highest = logits[labels != -100].max(1).values
    return plain(hidden, weight, labels) + 1e-4 / 2 * highest.square().sum()


@pytest.mark.parametrize("form", [linear_cross_entropy, linear_cross_entropy_reference, shared])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_the_l2_warp_changes_the_gradient_and_not_the_loss(form, ignored):
    hidden, weight, labels = inputs(40, ignored=ignored)
    with torch.no_grad():
        hidden *= 30  # so that the penalty counts
    loss, *gradients = results(form, hidden, weight, labels, chunk_tokens=16, l2_warp=True)
    torch.testing.assert_close(loss, plain(hidden, weight, labels))
    _, *true = results(warped, hidden, weight, labels)
    _, *without = results(plain, hidden, weight, labels)
    for got, wanted, other in zip(gradients, true, without):
        torch.testing.assert_close(got, wanted)
        assert (wanted - other).abs().max() > 1e-6 * wanted.abs().max()


def test_the_l2_warp_of_capped_logits():
    hidden, weight, labels = inputs(40)
    got = results(
        linear_cross_entropy, hidden, weight, labels, chunk_tokens=16, l2_warp=True, softcap=5.0
    )
    true = results(
        linear_cross_entropy_reference, hidden, weight, labels, l2_warp=True, softcap=5.0
    )
    for a, b in zip(got, true):
        torch.testing.assert_close(a, b)


def test_the_l2_warp_without_any_label():
    hidden, weight, labels = inputs(5, ignored=1.0)
    for form in (linear_cross_entropy, linear_cross_entropy_reference):
        loss, *gradients = results(form, hidden, weight, labels, l2_warp=True)
        assert loss == 0 and not any(g.any() for g in gradients)
