"""The loss kernels beside the reference of their op and beside torch's own op, in Triton's
interpreter, which computes on the CPU. Started by `make triton`."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.doctor.cases.cross_entropy import cases
from longfire.doctor.op_cases import DTYPES, errors, tolerance
from longfire.ops import forms
from longfire.ops.cross_entropy import (
    CorrectLabels,
    LossRules,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_losses,
)
from longfire.ops.fast import loss_kernels
from longfire.ops.fast.loss_kernels import token_losses_of_logits
from longfire.ops.forms import Choice
from longfire.ops.vocabulary import VocabularyShard

CPU = torch.device("cpu")
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
# Rounding of exp, of sums in another order, and of the products on both sides: some units each.
UNITS = 16


@pytest.fixture(autouse=True)
def kernels_run():
    forms.decided["linear_cross_entropy"] = Choice("triton", "the interpreter")
    yield
    forms.decided.clear()


@pytest.fixture(params=[4096, 16], ids=["words in one block", "words in many blocks"])
def block_words(request, monkeypatch):
    monkeypatch.setattr(loss_kernels, "BLOCK_WORDS", request.param)
    return request.param


def close(got: Tensor, expected: Tensor) -> None:
    unit = UNIT[got.dtype]
    largest = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=UNITS * unit, atol=UNITS * unit * largest)


def inputs(N: int, W: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A fifth of the tokens has no label, and one has the likeliest word for it."""
    generator = torch.Generator().manual_seed(N + W)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight_WD = torch.randn(W, D, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(W, (N,), generator=generator)
    labels_N[::5] = -100
    labels_N[1] = (hidden_ND @ weight_WD.T)[1].argmax()
    return hidden_ND.to(dtype), weight_WD.to(dtype), labels_N


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("l2_warp", [False, True])
def test_forward_and_backward_are_those_of_the_reference(dtype, softcap, l2_warp, block_words):
    hidden_ND, weight_WD, labels_N = inputs(N=21, W=53, D=8, dtype=dtype)
    results = []
    for form in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden = hidden_ND.clone().requires_grad_()
        weight = weight_WD.clone().requires_grad_()
        correct = CorrectLabels()
        options = {"softcap": softcap, "l2_warp": l2_warp, "correct": correct}
        loss = form(hidden, weight, labels_N, chunk_tokens=8, **options)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
        assert correct.count is not None and correct.count >= 1
        results[-1] += (correct.count.to(dtype),)
    for got, expected in zip(*results):
        close(got, expected)


@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_case_of_the_doctor(case, dtype, block_words):
    """As the doctor compares them on a GPU."""
    limit = tolerance(case, CPU, dtype)
    assert all(error <= limit for error in errors(case, CPU, dtype).values())


def test_as_torchs_own_op():
    hidden_ND, weight_WD, labels_N = inputs(N=21, W=53, D=8, dtype=torch.float64)
    expected = F.linear_cross_entropy(hidden_ND, weight_WD, labels_N, reduction="sum")
    close(linear_cross_entropy(hidden_ND, weight_WD, labels_N), expected)


def test_losses_of_tokens_leave_the_logits_as_they_are(block_words):
    hidden_ND, weight_WD, labels_N = inputs(N=21, W=53, D=8, dtype=torch.float64)
    losses_N, is_correct_N = token_losses(hidden_ND, weight_WD, labels_N, chunk_tokens=8)
    logits_NW = hidden_ND @ weight_WD.T
    close(losses_N, F.cross_entropy(logits_NW, labels_N, reduction="none"))
    assert torch.equal(is_correct_N, logits_NW.argmax(1) == labels_N)
    before_NW = logits_NW.clone()
    rules = LossRules(-100, None, softcap=2.0, l2_warp=False, correct=None)
    token_losses_of_logits(logits_NW, labels_N, rules, None)
    assert torch.equal(logits_NW, before_NW)


def test_of_equal_words_the_first_is_the_likeliest(block_words):
    logits_NW = torch.zeros(2, 40)
    logits_NW[:, [7, 30]] = 2.0
    rules = LossRules(-100, None, softcap=0.0, l2_warp=False, correct=None)
    labels_N = torch.tensor([7, 30])
    assert token_losses_of_logits(logits_NW, labels_N, rules, None)[1].tolist() == [True, False]


def test_the_gradient_is_rounded_once_to_its_type(block_words):
    _, _, labels_N = inputs(N=6, W=53, D=8, dtype=torch.float32)
    logits_NW = torch.randn(6, 53, generator=torch.Generator().manual_seed(1))
    rules = LossRules(-100, None, softcap=0.0, l2_warp=False, correct=None)
    wide_NW = torch.empty_like(logits_NW)
    narrow_NW = torch.empty_like(logits_NW, dtype=torch.bfloat16)
    for gradient_NW in (wide_NW, narrow_NW):
        token_losses_of_logits(logits_NW, labels_N, rules, gradient_NW)
    # The interpreter rounds towards zero: one unit in the last of 8 bits, not half a unit.
    torch.testing.assert_close(narrow_NW.float(), wide_NW, rtol=2**-7, atol=0)


def test_a_label_that_is_no_word_is_seen_in_the_loss():
    logits_NW = torch.zeros(3, 10)
    rules = LossRules(-100, None, softcap=0.0, l2_warp=False, correct=None)
    losses_N, _ = token_losses_of_logits(logits_NW, torch.tensor([2, 10, -100]), rules, None)
    assert losses_N.isnan().tolist() == [False, True, False]


def test_large_logits_neither_overflow_nor_vanish(block_words):
    logits_NW = torch.tensor([[3e4, -3e4, 2.9e4] * 13])
    rules = LossRules(-100, None, softcap=0.0, l2_warp=False, correct=None)
    gradient_NW = torch.empty_like(logits_NW)
    losses_N, _ = token_losses_of_logits(logits_NW, torch.tensor([1]), rules, gradient_NW)
    assert losses_N.item() == pytest.approx(6e4 + math.log(13), rel=2**-23)
    torch.testing.assert_close(gradient_NW.sum(), torch.tensor(0.0), rtol=0, atol=39 * 2**-24)


class TwoProcesses:
    """Collectives of two threads that have half of a vocabulary each. One computes at a time, since
    the interpreter is not made for threads."""

    def __init__(self) -> None:
        self.computing = threading.Lock()
        self.barrier = threading.Barrier(2, timeout=60)
        self.given: list[Tensor | None] = [None, None]

    def meet(self) -> None:
        self.computing.release()
        self.barrier.wait()
        self.computing.acquire()

    def exchange(self, rank: int, x: Tensor) -> tuple[Tensor, Tensor]:
        self.given[rank] = x
        self.meet()
        first, second = self.given
        self.meet()
        assert first is not None and second is not None
        return first, second

    def shard(self, rank: int, first: int, total: int) -> VocabularyShard:
        return VocabularyShard(
            first,
            total,
            add_up=lambda x: torch.add(*self.exchange(rank, x)),
            take_highest=lambda x: torch.maximum(*self.exchange(rank, x)),
            sum_for_all=lambda x: torch.add(*self.exchange(rank, x)),
            sum_for_parts=lambda x: torch.add(*self.exchange(rank, x)),
        )


@pytest.mark.parametrize("l2_warp", [False, True])
def test_two_processes_that_share_the_vocabulary(l2_warp, block_words):
    """Losses are equal in both; gradients of the weights are those of the whole, row by row."""
    hidden_ND, weight_WD, labels_N = inputs(N=21, W=53, D=8, dtype=torch.float64)
    processes = TwoProcesses()
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def run(rank: int) -> None:
        first, end = ((0, 27), (27, 53))[rank]
        hidden = hidden_ND.clone().requires_grad_()
        weight = weight_WD[first:end].clone().requires_grad_()
        with processes.computing:
            loss = linear_cross_entropy(
                hidden,
                weight,
                labels_N,
                chunk_tokens=8,
                vocabulary=processes.shard(rank, first, 53),
                softcap=3.0,
                l2_warp=l2_warp,
            )
            loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        found[rank] = loss.detach(), hidden.grad, weight.grad

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hidden = hidden_ND.clone().requires_grad_()
    weight = weight_WD.clone().requires_grad_()
    expected = linear_cross_entropy_reference(
        hidden, weight, labels_N, softcap=3.0, l2_warp=l2_warp
    )
    expected.backward()
    assert hidden.grad is not None and weight.grad is not None
    for rank in range(2):
        close(found[rank][0], expected.detach())
    close(found[0][1] + found[1][1], hidden.grad)
    close(torch.cat([found[0][2], found[1][2]]), weight.grad)
