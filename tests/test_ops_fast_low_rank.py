"""What the delta rule and DPLR share: a triangular system per chunk, and the scan of a state that chunks read."""

import pytest
import torch

from longfire.ops.fast import low_rank
from longfire.ops.fast.chunkwise import scan
from longfire.ops.fast.low_rank import LowRank, UnitLowerSolve, scan_low_rank, unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_unit_lower_inverse(size):
    """Only what lies below the diagonal counts, whether the rows are solved at once or merged."""
    x = (
        torch.randn(
            3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
        )
        / size
    )
    eye = torch.eye(size, dtype=torch.float64).expand_as(x)
    torch.testing.assert_close(unit_lower_inverse(x) @ (eye + x.tril(-1)), eye)


def test_gradients_of_a_solve_with_two_right_sides_are_derivatives(monkeypatch):
    monkeypatch.setattr(low_rank, "SOLVED", 2)
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.randn(3, 8, columns, dtype=torch.float64, generator=generator)
        for columns in (8, 2, 5)
    ]
    assert torch.autograd.gradcheck(UnitLowerSolve.apply, [x.requires_grad_() for x in sides])


def chunks(adds: bool) -> tuple[LowRank, torch.Tensor]:
    """Four chunks of a made-up recurrence, and a state."""
    generator = torch.Generator().manual_seed(0)
    B, N, H, C, K, V = 2, 4, 3, 8, 5, 6
    shapes = [
        (B, N, H, K, 1),
        (B, N, H, C, K),
        (B, N, H, C, V),
        (B, N, H, C, K),
        (B, N, H, K, V),
        (B, H, K, V),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) / 3 for shape in shapes]
    *parts, added, state = (x.requires_grad_() for x in tensors)
    return LowRank(*parts, added if adds else None), state


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_scan_is_that_of_the_matrices(adds, reverse):
    """Values and gradients: `scan` with the K x K matrices made is the reference."""
    change, state = chunks(adds)
    leaves = [x for x in (*change, state) if x is not None]
    states, written, last = scan_low_rank(*change, state, reverse)
    true_states, true_last = scan(change.transition, change.write, state, reverse)
    true = (true_states, change.found + change.read @ true_states, true_last)
    seeds = [
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        for x in true
    ]
    for got, expected in zip((states, written, last), true):
        torch.testing.assert_close(got, expected)
    gradients = [
        torch.autograd.grad(outputs, leaves, seeds) for outputs in ((states, written, last), true)
    ]
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected)
