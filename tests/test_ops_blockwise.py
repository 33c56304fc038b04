"""Blockwise attention against the truth with all scores in memory: chunks, lengths, windows, heads, documents, dropout, pieces."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longfire import ops
from longfire.ops import blockwise as module
from longfire.ops.attention import attention, attention_slow
from longfire.ops.blockwise import How, Place, attend_piece, attend_piece_backward, blockwise, chunks_of
from longfire.ops.documents import Documents
from longfire.ops.dropout import row_noise

B, K, V = 2, 8, 6


def inputs(T: int, S: int, H: int, G: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def documents_of(T: int, seed: int) -> Documents:
    starts_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.15
    return Documents.from_ids(starts_BT.long().cumsum(1))


def with_gradients(o_BTHV: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.sin(torch.arange(o_BTHV.numel(), dtype=torch.float64)).view_as(o_BTHV).to(o_BTHV.dtype)
    return [o_BTHV, *torch.autograd.grad((o_BTHV * weights).sum(), leaves)]


def assert_equal(leaves: list[Tensor], chunks: tuple[int, int], relative: float, **how: object) -> None:
    true = with_gradients(attention_slow(*leaves, **how), leaves)
    for got, wanted in zip(with_gradients(blockwise(*leaves, chunks=chunks, **how), leaves), true):
        assert (got - wanted).abs().max() <= relative * wanted.abs().max().clamp_min(1.0)


@settings(max_examples=80, deadline=None)
@given(
    T=st.integers(1, 45),
    chunks=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    window=st.none() | st.integers(1, 50),
    of_documents=st.none() | st.integers(0, 99),
    dropout=st.sampled_from([0.0, 0.3]),
    first_head=st.integers(0, 5),
)
@example(T=45, chunks=(8, 4), heads=(4, 2), window=None, of_documents=None, dropout=0.0, first_head=0)
@example(T=45, chunks=(4, 8), heads=(4, 2), window=9, of_documents=3, dropout=0.3, first_head=2)
def test_equals_the_truth(T, chunks, heads, window, of_documents, dropout, first_head):
    """float64: sums of at most 45 terms, in another order."""
    how = {"window": window, "dropout": dropout, "noise_BT": row_noise(1, 0, B, T, "cpu"), "first_head": first_head}
    documents = None if of_documents is None else documents_of(T, of_documents)
    assert_equal(inputs(T, T, *heads), chunks, 1e-12, documents=documents, **how)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
@pytest.mark.parametrize("chunks", [(16, 16), (7, 33), (64, 5)])
def test_lower_precision(dtype, unit, chunks):
    """The truth in float64 of the same rounded inputs; bounds as tests/test_ops_attention.py derives them."""
    leaves = inputs(45, 45, 4, 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    how = {"window": 20, "documents": documents_of(45, 1)}
    true = with_gradients(attention_slow(*exact, **how), exact)
    for got, wanted in zip(with_gradients(blockwise(*leaves, chunks=chunks, **how), leaves), true):
        assert got.dtype == dtype
        assert (got.double() - wanted).abs().max() <= 20 * unit * wanted.abs().max()


def test_large_scores_do_not_overflow():
    q, k, v = inputs(30, 30, 4, 4, torch.float32)
    assert_equal([(x * 200).detach().requires_grad_() for x in (q, k)] + [v], (7, 4), 1e-3)


@pytest.mark.parametrize("T", [1, 9, 21])
@pytest.mark.parametrize("window", [None, 5])
def test_queries_that_are_the_last_of_the_keys(T, window):
    """What a generation and an evaluation with kept keys ask for; with keys to skip it is `attention` itself."""
    leaves = inputs(T, 37, 4, 2)
    assert_equal(leaves, (4, 6), 1e-12, window=window, scale=0.3)
    skip_B = torch.tensor([0, 3])
    got = blockwise(*leaves, chunks=(4, 6), window=window, skip_B=skip_B)
    assert torch.equal(got, attention(*leaves, window=window, skip_B=skip_B))


def test_the_slow_form_is_taken_when_chosen(monkeypatch):
    monkeypatch.setattr(module, "attend_blocks", None)
    ops.choose(torch.device("cpu"), "slow")
    leaves = inputs(9, 9, 2, 2)
    assert torch.equal(blockwise(*leaves), attention_slow(*leaves))


def test_as_an_operator_of_torch():
    """Schema, shapes without numbers, autograd: what a compiled block relies on."""
    leaves = inputs(13, 13, 4, 2)
    ids_BT, noise_BT = documents_of(13, 0).ids_BT, row_noise(1, 0, B, 13, "cpu")
    for given_ids, noise in ((None, None), (ids_BT, noise_BT)):
        how = How(0.3, 5, 0.2 if noise is not None else 0.0, 0, 4, 3)
        torch.library.opcheck(module.attend_blocks, (*leaves, given_ids, noise, list(how)))


# Which blocks are computed: decided on positions, whatever the chunks (SEEDS 2.1: comparing chunk numbers dropped 528 of 1056 needed
# blocks at 4096 x 2048 and ran 1.47x of them at 2048 x 4096).


@pytest.mark.parametrize("chunks", [(4, 2), (2, 4), (3, 5), (7, 1), (100, 100)])
@pytest.mark.parametrize("window", [0, 1, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_every_needed_pair_is_met_and_no_block_is_empty(chunks, window, packed):
    T = 29
    ids_BT = documents_of(T, 5).ids_BT if packed else torch.zeros(B, T, dtype=torch.int64)
    x = torch.zeros(B, T, 1, 1)
    place, how = Place(0, ids_BT if packed else None), How(1.0, window, 0.0, 0, *chunks)
    query, key = torch.arange(T)[:, None], torch.arange(T)
    seen_TS = (key <= query) & ((key > query - window) if window else True)
    seen_TS = (seen_TS & (ids_BT[:, :, None] == ids_BT[:, None, :])).any(0)
    met_TS = torch.zeros(T, T, dtype=torch.int64)
    for of_queries, blocks in chunks_of(x, x, place, place, how):
        for of_keys in blocks:
            assert seen_TS[of_queries, of_keys].any() or packed, "an empty block is not computed"
            assert 0 < of_keys.stop - of_keys.start <= chunks[1]
            met_TS[of_queries, of_keys] += 1
    assert met_TS.max() == 1, "no pair is met twice"
    assert met_TS[seen_TS].all(), "no needed pair is left out"


def test_the_work_of_documents_is_their_own():
    """Ten documents of 100 tokens: chunks of 50 meet about a tenth of what one document would ask for."""
    x, how = torch.zeros(1, 1000, 1, 1), How(1.0, 0, 0.0, 0, 50, 50)
    ids_BT = torch.arange(1000)[None] // 100
    whole, packed = (
        sum(len(blocks) for _, blocks in chunks_of(x, x, Place(0, ids), Place(0, ids), how)) for ids in (None, ids_BT)
    )
    assert (whole, packed) == (210, 30)


# Pieces: what a ring joins.


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_join_to_the_whole_forward_and_backward(window, packed):
    """Queries of the last piece with keys in three; one of them may be seen by no query at all."""
    T, bounds = 36, [(0, 10), (10, 24), (24, 36)]
    q, k, v = inputs(T, T, 4, 2)
    documents = documents_of(T, 7) if packed else None
    how, mine = How(K**-0.5, window, 0.0, 0, 5, 4), slice(*bounds[-1])

    def place(span: slice) -> Place:
        return Place(span.start, documents.ids_BT[:, span].contiguous() if packed else None)

    parts = []
    for span in (slice(*bound) for bound in bounds):
        o = torch.empty(B, 12, 4, V, dtype=torch.float64)
        lse = attend_piece(q[:, mine], k[:, span], v[:, span], place(mine), place(span), how, None, o)
        parts.append((o, lse))
    lse_BHT = torch.stack([lse for _, lse in parts]).logsumexp(0)
    o_BTHV = sum(o * (lse - lse_BHT).exp().transpose(1, 2)[..., None] for o, lse in parts)
    true = attention_slow(q, k, v, window=window or None, documents=documents)
    torch.testing.assert_close(o_BTHV, true[:, mine], rtol=1e-12, atol=1e-12)
    d_o = torch.sin(torch.arange(o_BTHV.numel(), dtype=torch.float64)).view_as(o_BTHV)
    d_q, d_k, d_v = torch.autograd.grad((true[:, mine] * d_o).sum(), (q, k, v))
    total = torch.zeros_like(d_q[:, mine])
    for span in (slice(*bound) for bound in bounds):
        got = attend_piece_backward(
            d_o, q[:, mine], k[:, span], v[:, span], o_BTHV, lse_BHT, place(mine), place(span), how, None
        )
        total += got[0]
        torch.testing.assert_close(got[1], d_k[:, span], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[2], d_v[:, span], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, d_q[:, mine], rtol=1e-12, atol=1e-12)
