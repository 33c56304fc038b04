"""Blockwise attention against the reference with all scores in memory: chunks, lengths, windows, heads, documents, dropout."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longfire.ops import attention_blocks
from longfire.ops import blockwise as module
from longfire.ops.attention import attention, attention_reference, visible
from longfire.ops.attention_blocks import Manner
from longfire.ops.blockwise import How, blockwise, chunks_of
from longfire.ops.choice import choose
from longfire.ops.documents import Documents
from longfire.ops.pretending import only_shapes, pretending_cuda
from longfire.ops.sequence_noise import row_noise

pytestmark = pytest.mark.dtype

B, K, V = 2, 8, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that edges of windows, and what is written out, are cut at these lengths, too."""
    monkeypatch.setattr(attention_blocks, "BLOCK", 8)


def inputs(T: int, S: int, H: int, G: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def documents_of(T: int, seed: int) -> Documents:
    starts_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.15
    return Documents.from_ids(starts_BT.long().cumsum(1))


def with_gradients(o_BTHV: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = (
        torch.sin(torch.arange(o_BTHV.numel(), dtype=torch.float64))
        .view_as(o_BTHV)
        .to(o_BTHV.dtype)
    )
    return [o_BTHV, *torch.autograd.grad((o_BTHV * weights).sum(), leaves)]


def assert_equal(
    leaves: list[Tensor], chunks: tuple[int, int], relative: float, **how: object
) -> None:
    true = with_gradients(attention_reference(*leaves, **how), leaves)
    for got, wanted in zip(with_gradients(blockwise(*leaves, chunks=chunks, **how), leaves), true):
        assert (got - wanted).abs().max() <= relative * wanted.abs().max().clamp_min(1.0)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 45),
    chunks=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    window=st.none() | st.integers(1, 50),
    of_documents=st.none() | st.integers(0, 99),
    dropout=st.sampled_from([0.0, 0.3]),
    first_head=st.integers(0, 5),
)
@example(
    T=45, chunks=(8, 4), heads=(4, 2), window=None, of_documents=None, dropout=0.0, first_head=0
)
@example(T=45, chunks=(4, 8), heads=(4, 2), window=9, of_documents=3, dropout=0.3, first_head=2)
def test_equals_the_truth(T, chunks, heads, window, of_documents, dropout, first_head):
    """float64: sums of at most 45 terms, in another order."""
    how = {
        "window": window,
        "dropout": dropout,
        "noise_BT": row_noise(1, 0, B, T, "cpu"),
        "first_head": first_head,
    }
    documents = None if of_documents is None else documents_of(T, of_documents)
    assert_equal(inputs(T, T, *heads), chunks, 1e-12, documents=documents, **how)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
@pytest.mark.parametrize("chunks", [(16, 16), (7, 33), (64, 5)])
def test_lower_precision(dtype, unit, chunks):
    """The truth in float64 of the same rounded inputs; bounds as tests/test_ops_attention.py derives them."""
    leaves = inputs(45, 45, 4, 2, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    how = {"window": 20, "documents": documents_of(45, 1)}
    true = with_gradients(attention_reference(*exact, **how), exact)
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


def test_noise_of_other_dropouts_changes_nothing():
    """A model that drops elsewhere gives noise of its last T tokens to attention that drops nothing."""
    leaves, noise_BT = inputs(9, 37, 4, 2), row_noise(0, 0, 2, 9, torch.device("cpu"))
    assert torch.equal(
        blockwise(*leaves, chunks=(4, 6), noise_BT=noise_BT), blockwise(*leaves, chunks=(4, 6))
    )


def test_the_slow_form_is_taken_when_chosen(monkeypatch):
    monkeypatch.setattr(module, "attend_blocks", None)
    choose(torch.device("cpu"), "reference")
    leaves = inputs(9, 9, 2, 2)
    assert torch.equal(blockwise(*leaves), attention_reference(*leaves))


def test_as_an_operator_of_torch():
    """Schema, shapes without numbers, autograd: what a compiled block relies on."""
    leaves = inputs(13, 13, 4, 2)
    ids_BT, noise_BT = documents_of(13, 0).ids_BT, row_noise(1, 0, B, 13, "cpu")
    everything = (*leaves, ids_BT, noise_BT, list(How(0.3, 5, 0.2, 0, 4, 3)))
    torch.library.opcheck(module.attend_blocks, everything)
    nothing = (*leaves, None, None, list(How(0.3, 5, 0.0, 0, 4, 3)))
    torch.library.opcheck(
        module.attend_blocks, nothing, test_utils=("test_schema", "test_faketensor")
    )


# Which blocks are computed: decided on positions, whatever the chunks (SEEDS 2.1: comparing chunk numbers dropped 528 of 1056 needed
# blocks at 4096 x 2048 and ran 1.47x of them at 2048 x 4096).


def manner(window: int | None, fused: bool = True) -> Manner:
    return Manner(window, 1.0, 0.0, 0, fused)


@pytest.mark.parametrize("chunks", [(4, 2), (2, 4), (3, 5), (7, 1), (16, 16), (100, 100)])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_every_needed_pair_is_met_once_within_its_chunks(chunks, window, packed, fused):
    T, how = 29, manner(window, fused)
    ids_BT = documents_of(T, 5).ids_BT if packed else torch.zeros(B, T, dtype=torch.int64)
    seen_BTS = (ids_BT[:, :, None] == ids_BT[:, None, :]) & visible(
        T, T, window, None, ids_BT.device
    )[0]
    met_BTS = torch.zeros(B, T, T, dtype=torch.int64)
    for of_queries, blocks in chunks_of(
        T, T, ids_BT if packed else None, How(1.0, 0, 0.0, 0, *chunks), how
    ):
        for of_keys, pieces in blocks:
            assert 0 < of_queries.stop - of_queries.start <= chunks[0]
            assert 0 < of_keys.stop - of_keys.start <= chunks[1]
            assert pieces, "an empty block is not computed"
            for piece in pieces:
                seen_TS = attention_blocks.seen_of(piece, how, ids_BT.device)
                pair = met_BTS[piece.rows, of_queries, of_keys]
                pair[:, piece.queries.here, piece.keys.here] += (
                    1 if seen_TS is None else seen_TS.long()
                )
    assert torch.equal(met_BTS, seen_BTS.long())


@pytest.mark.parametrize("chunks", [(64, 64), (64, 128), (128, 32)])
def test_nothing_is_masked_where_no_window_cuts(chunks):
    """Squares on the diagonal and whole blocks, for the fused kernel: none is written out, none is cut into blocks of 8 queries."""
    met = chunks_of(256, 256, None, How(1.0, 0, 0.0, 0, *chunks), manner(None))
    pieces = [piece for _, blocks in met for _, pieces in blocks for piece in pieces]
    assert {piece.seen for piece in pieces} == {"all", "causal"}
    assert sum(piece.pairs(1) for piece in pieces) == 256 * 257 // 2
    assert len(pieces) <= 20


def test_the_work_of_documents_is_their_own():
    """Ten documents of 100 tokens: chunks of 50 meet about a tenth of what one document would ask for."""
    how, ids_BT = How(1.0, 0, 0.0, 0, 50, 50), torch.arange(1000)[None] // 100
    whole, packed = (
        sum(len(list(blocks)) for _, blocks in chunks_of(1000, 1000, ids, how, manner(None)))
        for ids in (None, ids_BT)
    )
    assert (whole, packed) == (210, 30)


def test_without_numbers_the_edges_stand_for_all():
    """A planner asks for two chunks of queries, and of each for the first and the last keys: a window's edge and the diagonal."""
    with pretending_cuda(False):
        assert only_shapes()
        met = [
            (here, [there for there, _ in blocks])
            for here, blocks in chunks_of(80, 80, None, How(1.0, 0, 0.0, 0, 10, 10), manner(35))
        ]
    assert met == [
        (slice(60, 70), [slice(26, 30), slice(60, 70)]),
        (slice(70, 80), [slice(36, 40), slice(70, 80)]),
    ]
