"""Attention in blocks: the pieces are what is seen, kernels equal what is written out, and joined blocks equal the whole."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.ops import attention_blocks as blocks
from longfire.ops.attention import attention, attention_reference, weight_mask
from longfire.ops.attention_blocks import (
    Gradients,
    Manner,
    Outputs,
    Span,
    fused,
    join,
    meetings,
    written,
    written_gradients,
)

pytestmark = pytest.mark.dtype

B, H, G = 2, 4, 2
ALL = slice(None)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)


def manner(window=None, p=0.0, fused=True) -> Manner:
    return Manner(window, 0.3, p, 0, fused)


def inputs(
    T: int, S: int, K: int, V: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(T + S)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, V))
    return [torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(max_examples=300, deadline=None)
@given(
    some.integers(0, 40),
    some.integers(1, 24),
    some.integers(0, 40),
    some.integers(1, 24),
    some.one_of(some.none(), some.integers(1, 50)),
    some.booleans(),
)
def test_pieces_hold_each_pair_that_is_seen_once(first, T, first_key, S, window, fused):
    """Positions of queries and keys anywhere; blocks of 4. Outside of bands nothing is computed that is not seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 4)
        queries, keys, how = (
            Span(first, first + T, 3),
            Span(first_key, first_key + S, 5),
            manner(window, fused=fused),
        )
        times, counted, touched = torch.zeros(64, 64), 0, 0
        for piece in meetings(ALL, queries, keys, how):
            assert piece.queries.at - piece.queries.start == 3 - first, (
                "local places follow positions"
            )
            assert piece.keys.at - piece.keys.start == 5 - first_key
            seen = blocks.seen_of(piece, how, torch.device("cpu"))
            seen = (
                torch.ones(piece.queries.length, piece.keys.length)
                if seen is None
                else seen.float()
            )
            assert seen.any(1).all(), "each query of a piece sees a key"
            times[piece.queries.start : piece.queries.stop, piece.keys.start : piece.keys.stop] += (
                seen
            )
            counted += piece.pairs(1)
            touched += piece.seen == "band" and seen.numel() - int(seen.sum())
            # what a mask hides is at most the two corners of a block of 4 queries
            assert piece.seen != "band" or seen.numel() - seen.sum() <= 4 * 4
    query, key = torch.arange(64)[:, None], torch.arange(64)
    visible = (key <= query) & (key > query - (window or 64))
    visible &= (query >= first) & (query < first + T) & (key >= first_key) & (key < first_key + S)
    assert torch.equal(times, visible.float())
    assert counted == visible.sum() + touched


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("K", "V"), [(8, 8), (8, 5), (5, 8)])
def test_kernels_equal_what_is_written_out(K, V, causal):
    """With the logsumexp of more keys than these, as in a ring: then the kernel's own output would not do."""
    q, k, v = inputs(9, 9, K, V)
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if causal else None
    for mine, true in zip(fused(q, k, v, 0.3, causal), written(q, k, v, 0.3, seen)):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    o, d_o = torch.randn(2, B, 9, H, V, dtype=torch.float64)
    lse = written(q, k, v, 0.3, seen)[1] + torch.rand(B, H, 9, dtype=torch.float64)
    delta = (o * d_o).sum(-1).transpose(1, 2)
    found = blocks.fused_gradients(q, k, v, o, lse, d_o, 0.3, causal)
    for mine, true in zip(found, written_gradients(q, k, v, lse, d_o, delta, 0.3, seen)):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "p", "kernels"), list(product([None, 3, 6, 17], [0.0, 0.3], [True, False]))
)
def test_blocks_of_keys_joined_equal_the_whole(window, p, kernels):
    """Keys come in three parts, the last one first; forward, and gradients by autograd through the reference."""
    T, leaves = 23, [x.requires_grad_() for x in inputs(23, 23, 8, 6)]
    noise_BT = torch.randint(
        -(2**31), 2**31, (B, T), generator=torch.Generator().manual_seed(1)
    ).int()
    how = manner(window, p, kernels and p == 0)
    true = attention_reference(*leaves, window=window, scale=0.3, dropout=p, noise_BT=noise_BT)
    d_o = torch.randn_like(true)
    q, k, v = (x.detach() for x in leaves)
    outputs, parts = Outputs(q, 6, how, noise_BT), [(16, 23), (5, 16), (0, 5)]
    pieces = {part: list(meetings(ALL, Span(0, T, 0), Span(*part, 0), how)) for part in parts}
    for start, stop in parts:
        outputs.meet(k[:, start:stop], v[:, start:stop], pieces[start, stop])
    torch.testing.assert_close(outputs.o, true, rtol=1e-12, atol=1e-12)
    gradients = Gradients(q, outputs.o, outputs.lse, d_o, how, noise_BT)
    d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
    for start, stop in parts:
        here = slice(start, stop)
        gradients.meet(k[:, here], v[:, here], d_k[:, here], d_v[:, here], pieces[start, stop])
    for mine, one in zip((gradients.d_q, d_k, d_v), torch.autograd.grad(true, leaves, d_o)):
        torch.testing.assert_close(mine, one, rtol=1e-11, atol=1e-11)


def test_joining_neither_overflows_nor_gives_nan():
    """Scores of 10,000 either way: exp of them is not a number of fp32. What has seen nothing (-inf) joins with anything."""
    o, lse = torch.zeros(1, 4, 1, 2), torch.full((1, 1, 4), -torch.inf)
    other, other_lse = torch.full((1, 4, 1, 2), 7.0), torch.tensor([[[1e4, -1e4, -torch.inf, 0.0]]])
    join(o, lse, other, other_lse)
    assert o[0, :, 0, 0].tolist() == [7, 7, 0, 7]
    assert torch.equal(lse, other_lse)
    join(o, lse, torch.ones_like(o), torch.tensor([[[-1e4, 1e4, -torch.inf, 0.0]]]))
    assert o[0, :, 0, 0].tolist() == [7, 1, 0, 4]
    torch.testing.assert_close(lse, torch.tensor([[[1e4, 1e4, -torch.inf, 0.6931472]]]))


def test_large_scores_pass_through_blocks():
    """Keys a thousand times as long as usual, in fp32: weights are 0 and 1, and nothing else is not a number."""
    q, k, v = inputs(12, 12, 8, 8, torch.float32)
    outputs = Outputs(q, 8, manner(), None)
    for start in (8, 4, 0):
        pieces = meetings(ALL, Span(0, 12, 0), Span(start, start + 4, 0), manner())
        outputs.meet(1000 * k[:, start : start + 4], v[:, start : start + 4], pieces)
    torch.testing.assert_close(outputs.o, attention(q, 1000 * k, v, scale=0.3))


def test_half_precision_is_not_rounded_before_blocks_are_joined():
    q, k, v = inputs(8, 8, 8, 8, torch.bfloat16)
    outputs = Outputs(q, 8, manner(), None)
    outputs.meet(k, v, meetings(ALL, Span(0, 8, 0), Span(0, 8, 0), manner()))
    assert outputs.o.dtype == outputs.lse.dtype == torch.float32
    torch.testing.assert_close(
        outputs.o.double(),
        attention_reference(*(x.double() for x in (q, k, v)), scale=0.3),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dropout_of_a_piece_is_that_of_the_row():
    how = manner(window=6, p=0.4)._replace(first_head=2)
    noise_BT = torch.randint(-(2**31), 2**31, (B, 20)).int()
    whole = weight_mask(noise_BT, H, 0, 20, 0.4, 2)
    q = torch.zeros(B, 20, H, 8)
    for piece in meetings(slice(1, 2), Span(8, 16, 8), Span(0, 16, 0), how):
        mine = blocks.weights_kept(piece, how, q, noise_BT)
        assert torch.equal(
            mine, whole[1:2, :, piece.queries.here, piece.keys.start : piece.keys.stop]
        )


@pytest.mark.parametrize("T", [23, 11, 1])
@pytest.mark.parametrize("keys", [9, 23])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 11, "scale": 0.3}])
def test_keys_block_by_block_of_the_last_queries(options, keys, T):
    leaves = [x.requires_grad_() for x in inputs(T, 23, 8, 6)]
    mine, true = (
        op(*leaves, keys=keys, **options)
        for op in (blocks.attention_in_blocks, blocks.attention_in_blocks_reference)
    )
    d_o = torch.randn_like(true)
    for a, b in zip(
        (mine, *torch.autograd.grad(mine, leaves, d_o)),
        (true, *torch.autograd.grad(true, leaves, d_o)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
