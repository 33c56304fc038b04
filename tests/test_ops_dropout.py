"""Dropout by noise: the share that is dropped, independence of places, and what it must not depend on."""

import pytest
import torch

from longfire.ops.attention import attention, attention_reference
from longfire.ops.documents import Documents
from longfire.ops.dropout import (
    channel_mask,
    dropout,
    dropout_add,
    dropout_add_reference,
    of_place,
)
from longfire.ops.sequence_noise import row_noise

pytestmark = pytest.mark.dtype


def test_the_share_is_right_and_bits_look_drawn():
    """Of 2^20 numbers a share p falls out within 5 standard deviations; so does p^2 of pairs at any two places."""
    noise_BT = row_noise(7, 0, 8, 128, "cpu")
    for p in (0.1, 0.5):
        kept = channel_mask(noise_BT, 1024, p)
        other = channel_mask(of_place(noise_BT, 1), 1024, p)
        pairs = {
            "next channel": kept.roll(1, 2),
            "next token": kept.roll(1, 1),
            "next row": kept.roll(1, 0),
            "place": other,
        }
        sigma = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs((~kept).double().mean() - p) < 5 * sigma
        for name, moved in pairs.items():
            both = (~kept & ~moved).double().mean()
            assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / kept.numel()) ** 0.5, name


def test_a_rows_noise_depends_on_its_number_alone():
    assert row_noise(3, 0, 8, 50, "cpu")[5:].equal(row_noise(3, 5, 3, 50, "cpu"))
    assert row_noise(3, 0, 8, 50, "cpu")[:, :20].equal(row_noise(3, 0, 8, 20, "cpu"))
    far = 2**40  # more rows than 32 bits count
    different = [
        row_noise(3, 0, 1, 9, "cpu"),
        row_noise(4, 0, 1, 9, "cpu"),
        row_noise(3 + 2**32, 0, 1, 9, "cpu"),
    ]
    different += [row_noise(3, 1, 1, 9, "cpu"), row_noise(3, far, 1, 9, "cpu")]
    assert len({tuple(noise.flatten().tolist()) for noise in different}) == len(different)


def test_fused_equals_slow_forward_and_backward():
    noise_BT = row_noise(0, 0, 2, 33, "cpu")
    x, residual = torch.randn(2, 2, 33, 24, dtype=torch.float64).requires_grad_().unbind(0)
    seed = torch.randn(2, 33, 24, dtype=torch.float64)
    results = [op(x, residual, 0.3, noise_BT) for op in (dropout_add, dropout_add_reference)]
    torch.testing.assert_close(*results)
    for got, true in zip(*(torch.autograd.grad(y, (x, residual), seed) for y in results)):
        torch.testing.assert_close(got, true)


def test_without_noise_nothing_is_dropped():
    x = torch.randn(1, 4, 8)
    assert dropout(x, 0.5, None) is x and dropout_add(x, x, 0.5, None).equal(x + x)


def test_the_residuals_type_wins():
    noise_BT = row_noise(0, 0, 1, 4, "cpu")
    x, residual = torch.randn(1, 4, 8, dtype=torch.bfloat16), torch.randn(1, 4, 8)
    assert dropout_add(x, residual, 0.1, noise_BT).dtype == torch.float32


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_dropout_in_blocks_equals_reference(window, packed):
    T = 300  # more than one block of queries
    q, k, v = (
        torch.randn(2, T, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    documents = (
        Documents.from_ids(torch.tensor([[0] * 130 + [1] * 170, [0] * T])) if packed else None
    )
    noise_BT, seed = row_noise(1, 0, 2, T, "cpu"), torch.randn(2, T, 4, 8, dtype=torch.float64)
    options = {"window": window, "documents": documents, "dropout": 0.2, "noise_BT": noise_BT}
    results = [op(q, k, v, **options) for op in (attention, attention_reference)]
    torch.testing.assert_close(*results)
    for got, true in zip(*(torch.autograd.grad(y, (q, k, v), seed) for y in results)):
        torch.testing.assert_close(got, true)
    assert not results[0].allclose(attention(q, k, v, window=window, documents=documents))
