"""The short convolution against F.conv1d in float64, document by document, and against its own reference implementation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.short_conv import short_conv, short_conv_reference

pytestmark = pytest.mark.dtype

B, D = 2, 5
both_forms = pytest.mark.parametrize("form", [short_conv, short_conv_reference])


def inputs(T: int, W: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T * 10 + W)
    x, state = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((B, T, D), (B, D, W - 1))
    )
    masters = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.randn(shape, generator=generator).to(masters) for shape in ((D, W), (D,)))
    return [t.requires_grad_() for t in (x, weight, bias, state)]


def results(
    form, leaves: list[Tensor], documents: Documents | None = None, silu: bool = True
) -> list[Tensor]:
    x, weight, bias, state = leaves
    y, last = form(x, weight, bias, silu=silu, state_BDW=state, documents=documents)
    seeds = [torch.arange(t.numel()).reshape(t.shape).sin().to(t.dtype) for t in (y, last)]
    return [y, last, *torch.autograd.grad((y, last), leaves, seeds, materialize_grads=True)]


def by_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, silu: bool, state_BDW: Tensor, documents=None
) -> tuple[Tensor, Tensor]:
    """Each document cut out and convolved alone; the first of a row after the state, the others after zeros."""
    W, rows, states = weight.shape[1], [], []
    for b in range(B):
        ids_T = torch.zeros(x.shape[1]) if documents is None else documents.ids_BT[b]
        lengths, before, outputs = (
            ids_T.unique_consecutive(return_counts=True)[1].tolist(),
            state_BDW[b],
            [],
        )
        for document in x[b].T.split(lengths, 1):
            padded = torch.cat([before, document], 1)
            y = F.conv1d(padded[None], weight[:, None], bias, groups=D)[0]
            outputs.append(F.silu(y) if silu else y)
            last, before = padded[:, padded.shape[1] - (W - 1) :], torch.zeros_like(before)
        rows.append(torch.cat(outputs, 1).T)
        states.append(last)
    return torch.stack(rows), torch.stack(states)


@both_forms
@settings(deadline=None, max_examples=25)
@given(
    T=some.integers(1, 12),
    W=some.integers(1, 5),
    silu=some.booleans(),
    share=some.sampled_from([None, 0.2, 0.8]),
)
def test_against_conv1d(form, T, W, silu, share):
    """Lengths shorter than the filter, several documents inside one filter, gradients into the state and out of the new one."""
    documents = None
    if share is not None:
        starts_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < share
        documents = Documents.from_ids(starts_BT.long().cumsum(1))
    leaves = inputs(T, W)
    for got, true in zip(
        results(form, leaves, documents, silu), results(by_conv1d, leaves, documents, silu)
    ):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_lower_precision(dtype, unit):
    """Sums of 4 terms (a weight's gradient: of B * T, with fp32 sums) of rounded inputs, rounded once more."""
    leaves = inputs(40, 4, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for got, true in zip(results(short_conv, leaves), results(short_conv_reference, exact)):
        assert (got.double() - true).abs().max() <= 8 * unit * true.abs().max()


@both_forms
def test_in_pieces_equals_whole(form):
    x, weight, bias, state = (t.detach() for t in inputs(20, 4))
    whole, last = form(x, weight, bias, state_BDW=state)
    parts = []
    for piece in x.split([1, 1, 7, 2, 9], 1):
        y, state = form(piece, weight, bias, state_BDW=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


@both_forms
def test_a_nan_stays_in_its_document(form):
    x, weight, bias, _ = (t.detach() for t in inputs(8, 4))
    x[:, 3] = torch.nan
    ids_BT = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]).expand(B, -1)
    y, last = form(x, weight, bias, documents=Documents.from_ids(ids_BT))
    assert y[:, 4:].isfinite().all() and last.isfinite().all() and y[:, 3].isnan().all()


def test_gradient_of_what_is_kept_only():
    """Rows and filters: what is kept for the backward is one copy of the rows in their own dtype."""
    kept = []
    x, weight, _, _ = inputs(16, 4, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        short_conv(x, weight)
    assert sum(kept) <= B * (16 + 3) * D * 2 + weight.nbytes
