"""The token before each token, against rows cut into their documents by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.token_shift import previous_token, previous_token_reference

pytestmark = pytest.mark.dtype

B, D = 2, 3
both_forms = pytest.mark.parametrize("form", [previous_token, previous_token_reference])


def by_hand(x_BTD: Tensor, before_BD: Tensor | None, documents: Documents | None) -> Tensor:
    rows = []
    for b, row_TD in enumerate(x_BTD):
        ids_T = torch.zeros(len(row_TD)) if documents is None else documents.ids_BT[b]
        lengths = ids_T.unique_consecutive(return_counts=True)[1].tolist()
        before_D = torch.zeros_like(row_TD[0]) if before_BD is None else before_BD[b]
        for document_TD in row_TD.split(lengths):
            rows += [before_D, *document_TD[:-1]]
            before_D = torch.zeros_like(before_D)
    return torch.stack(rows).view_as(x_BTD)


@both_forms
@settings(deadline=None, max_examples=30)
@given(
    T=some.integers(1, 9), share=some.sampled_from([None, 0.3, 1.0]), given_before=some.booleans()
)
def test_is_the_row_a_place_later(form, T, share, given_before):
    generator = torch.Generator().manual_seed(T)
    leaves = [
        torch.randn(shape, generator=generator).double().requires_grad_()
        for shape in ((B, T, D), (B, D))
    ]
    x, before = leaves if given_before else (leaves[0], None)
    documents = None
    if share is not None:
        documents = Documents.from_ids(
            (torch.rand(B, T, generator=generator) < share).long().cumsum(1)
        )
    previous, last = form(x, before_BD=before, documents=documents)
    true = by_hand(x, before, documents)
    assert torch.equal(previous, true) and torch.equal(last, x[:, -1])
    seed = torch.randn(B, T, D, generator=generator).double()
    # one token after nothing depends on nothing: x * 0 gives it a graph
    gradients = (
        torch.autograd.grad(o + x * 0, leaves, seed, materialize_grads=True)
        for o in (previous, true)
    )
    for got, right in zip(*gradients):
        assert torch.equal(got, right)


@both_forms
def test_in_pieces_equals_whole_and_keeps_the_type(form):
    x = torch.randn(B, 9, D).bfloat16()
    whole, before, parts = form(x)[0], None, []
    for piece in x.split([1, 1, 4, 3], 1):
        part, before = form(piece, before_BD=before)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole) and whole.dtype == before.dtype == torch.bfloat16
