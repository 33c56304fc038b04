"""Softmax attention against torch's SDPA in float64 with the mask written out, and against its own reference implementation."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops import attention as contract
from longfire.ops.attention import attention, attention_reference
from longfire.ops.choice import choose
from longfire.ops.documents import Documents
from longfire.ops.fast import attention as module

pytestmark = pytest.mark.dtype

B, H, G, K = 2, 4, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)


def inputs(
    T: int, S: int, V: int = K, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def some_documents(T: int) -> Documents:
    starts_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.1
    return Documents.from_ids(starts_BT.long().cumsum(1))


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, window=None, documents=None) -> Tensor:
    """The mask position by position, heads repeated by hand."""
    (T, S), mask = (
        (q.shape[1], k.shape[1]),
        torch.zeros(B, 1, q.shape[1], k.shape[1], dtype=torch.bool),
    )
    for b, t, s in product(range(B), range(T), range(S)):
        at = S - T + t
        same = documents is None or documents.ids_BT[b, at] == documents.ids_BT[b, s]
        mask[b, 0, t, s] = s <= at and (window is None or at - s < window) and same
    q, k, v = (
        x.double().transpose(1, 2)
        for x in (q, k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2))
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def with_gradients(outputs: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


CASES = {
    "plain": (37, 37, {}),
    "window": (37, 37, {"window": 7}),
    "window longer than a block": (50, 50, {"window": 21}),
    "window of one": (9, 9, {"window": 1}),
    "window wider than the row": (9, 9, {"window": 30}),
    "documents": (37, 37, {"documents": some_documents(37)}),
    "documents with window": (37, 37, {"documents": some_documents(37), "window": 5}),
    "queries last": (21, 37, {}),
    "queries last with window": (21, 37, {"window": 7}),
    "one query": (1, 37, {}),
    "one query with window": (1, 37, {"window": 7}),
    "one token": (1, 1, {}),
}


@pytest.mark.parametrize("form", [attention, attention_reference])
@pytest.mark.parametrize("case", CASES)
def test_against_sdpa(case, form):
    """float64: sums of at most 50 terms, so 1e-12 is a thousand roundings."""
    T, S, options = CASES[case]
    leaves = inputs(T, S)
    for got, true in zip(
        with_gradients(form(*leaves, **options), leaves),
        with_gradients(by_sdpa(*leaves, **options), leaves),
    ):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("V", [5, 12])
def test_value_size_differs_from_key_size(V):
    leaves = inputs(20, 20, V)
    for got, true in zip(
        with_gradients(attention(*leaves), leaves),
        with_gradients(attention_reference(*leaves), leaves),
    ):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
@pytest.mark.parametrize("case", ["plain", "window", "documents with window", "queries last"])
def test_lower_precision(case, dtype, unit):
    """The truth in float64 of the same rounded inputs. In bf16 the output is rounded before its gradient is used: a few units
    of the largest value; in fp32 a dot product of K and a sum of T terms: sqrt(50) units, thrice over in a gradient."""
    T, S, options = CASES[case]
    leaves = inputs(T, S, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for got, true in zip(
        with_gradients(attention(*leaves, **options), leaves),
        with_gradients(attention_reference(*exact, **options), exact),
    ):
        assert got.dtype == dtype
        assert (got.double() - true).abs().max() <= 20 * unit * true.abs().max()


def test_packed_equals_separate_to_the_bit():
    documents = some_documents(37)
    q, k, v = (x.detach() for x in inputs(37, 37, dtype=torch.float32))
    o = attention(q, k, v, documents=documents).flatten(0, 1)
    ends = documents.cu_lengths.tolist()
    for start, end in pairwise(ends):
        alone = (x.flatten(0, 1)[None, start:end] for x in (q, k, v))
        assert torch.equal(attention(*alone)[0], o[start:end])


def test_nothing_comes_from_the_future_or_outside_the_window():
    leaves = inputs(37, 37)
    attention(*leaves, window=7)[:, 20].sum().backward()
    for x in leaves[1:]:
        seen_S = x.grad.abs().sum((0, 2, 3)) > 0
        assert seen_S.nonzero().flatten().tolist() == list(range(14, 21))


def test_scale():
    q, k, v = inputs(9, 9)
    torch.testing.assert_close(attention(q, k, v, scale=0.3), attention(q * 0.3 * K**0.5, k, v))


def test_memory_of_documents_and_windows_does_not_grow_with_the_square(monkeypatch):
    """Nothing that autograd keeps, and no mask, is larger than a block of queries by the keys it sees."""
    monkeypatch.setattr(module, "BLOCK", 64)
    T, largest = 2048, 0

    def pack(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.untyped_storage().nbytes())
        return x

    q, k, v = (torch.randn(1, T, 1, 4, requires_grad=True) for _ in range(3))
    ids_BT = torch.arange(T)[None] // 100
    for options in ({"window": 100}, {"documents": Documents.from_ids(ids_BT)}):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(q, k, v, **options)
    assert 0 < largest < T * T * 4 / 50


def test_the_slow_form_is_taken_when_chosen(monkeypatch):
    called = []
    reference = contract.FORMS.forms["reference"]
    monkeypatch.setattr(reference, "function", lambda *a, **k: called.append(1) or a[0])
    choose(torch.device("cpu"), "reference")
    try:
        attention(*inputs(3, 3))
    finally:
        choose(torch.device("cpu"), "torch")
    assert called


def test_compiled_with_documents_no_graph_is_made_anew():
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward
    compiled = torch.compile(
        lambda q, k, v, d: attention(2 * q, k, v, documents=d).sin(), backend=backend, dynamic=False
    )
    made = []
    for share in (0.05, 0.2, 0.5):
        documents = Documents.from_ids((torch.rand(B, 30) < share).long().cumsum(1))
        q, k, v = inputs(30, 30)
        torch.testing.assert_close(
            compiled(q, k, v, documents), attention(2 * q, k, v, documents=documents).sin()
        )
        made.append(len(graphs))
    assert made[1:] == made[:-1]


@pytest.mark.parametrize("T", [1, 21, 37])
@pytest.mark.parametrize("window", [None, 7, 33])
@pytest.mark.parametrize("form", [attention, attention_reference])
def test_skipped_keys_are_as_if_they_were_not_there(form, T, window):
    """Each row alone without its padding, whatever stands in the padding."""
    q, k, v = inputs(T, 37)
    skip_B = torch.tensor([0, 11])
    o = form(q, k, v, window=window, skip_B=skip_B)
    for row, skip in enumerate(skip_B.tolist()):
        real = max(0, skip - (37 - T))  # a query that is padding itself means nothing
        alone = form(
            q[row : row + 1, real:], k[row : row + 1, skip:], v[row : row + 1, skip:], window=window
        )
        torch.testing.assert_close(o[row : row + 1, real:], alone, rtol=1e-12, atol=1e-12)
    assert o.isfinite().all()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_keys_before_the_row_are_those_of_its_first_document(packed, window):
    """A segment of a row: S - T keys lie before it, of which some belong to other documents; forward and backward."""
    chance = torch.Generator().manual_seed(0)
    B, T, before = 3, 11, 9
    q = torch.randn(B, T, 4, 8, generator=chance, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(B, before + T, 2, 8, generator=chance, dtype=torch.float64, requires_grad=True)
        for _ in "kv"
    )
    starts_BT = torch.zeros(B, T, dtype=torch.long)
    starts_BT[0, [4, 5]] = starts_BT[1, 1] = 1
    documents = Documents.from_ids(starts_BT.cumsum(1)) if packed else None
    skip_B = torch.tensor([3, before, 0]) if packed else None
    found, true = (
        form(q, k, v, window=window, documents=documents, skip_B=skip_B)
        for form in (attention, attention_reference)
    )
    torch.testing.assert_close(found, true)
    weights = torch.randn(found.shape, generator=chance, dtype=torch.float64)
    for got, wanted in zip(
        *(torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (found, true))
    ):
        torch.testing.assert_close(got, wanted)
    if packed:
        ids_BS = torch.cat([torch.zeros(B, before, dtype=torch.long), documents.ids_BT], 1)
        ids_BS[torch.arange(before + T) < skip_B[:, None]] = -1
        one = attention_reference(
            torch.nn.functional.pad(q, (0, 0, 0, 0, before, 0)),
            k,
            v,
            window=window,
            documents=Documents.from_ids(ids_BS),
        )
        torch.testing.assert_close(found, one[:, before:]), "as in the whole row"


@pytest.mark.parametrize("heads, is_grouped", [(4, True), (2, False)])
def test_varlen_attention_is_asked_for_grouped_heads(monkeypatch, heads, is_grouped):
    from torch.nn.attention import varlen

    calls = []

    def watched(q, k, v, *ends, scale, window_size, enable_gqa=False):
        calls.append((k.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    q = torch.zeros(2, 8, heads, 16)
    k_ND = torch.arange(2.0)[None, :, None].expand(16, 2, 16)
    ends = torch.tensor([0, 8, 16], dtype=torch.int32)
    o = module.varlen(q, k_ND, k_ND, (ends, ends), (8, 8), None, None)
    assert o.shape == q.shape
    assert calls == [(2, is_grouped)]
