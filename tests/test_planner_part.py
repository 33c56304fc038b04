"""planner/part.py: what several sequences hold is read off straight lines."""

import pytest
import torch
from conftest import tiny_config

from longfire.model import on_meta
from longfire.ops.pretending import as_on_cuda
from longfire.planner.memory import Meter
from longfire.planner.part import EMBED, HEAD, Part


@pytest.mark.slow
def test_rows_are_straight_lines_between_operations():
    """What is predicted from one row and two is what five rows hold, also where another instant is then the fullest."""
    model = on_meta(tiny_config("attention", "gla", hidden_size=64, vocab_size=128), torch.bfloat16)
    few, many = (Meter(model, 128, 64, as_cuda=True) for _ in range(2))
    many.measure("none", 5)
    true_parts = {which: many.known[which, "none", 5] for which in (EMBED, 0, 1)}
    true_parts[HEAD] = many.measured_head(1, 5 * 128)
    for which, true in true_parts.items():
        guessed = few.part(which, "none", 5)
        assert guessed.kept == true.kept and guessed.passed == true.passed
        assert guessed.backward_peak(False) == pytest.approx(max(true.backward), rel=0.01)
        assert guessed.forward_peak == pytest.approx(max(true.forward), rel=0.01)
    assert not as_on_cuda()
    line = Part.of_sequences(Part((10, 4), (0,), (0,), 0, 0), Part((11, 14), (0,), (0,), 0, 0), 3)
    assert line.forward_peak == 24


def test_the_head_of_a_short_batch_and_a_large_chunk_is_no_straight_line():
    """Two sequences that fit into one chunk of the loss hold twice the logits of one; eight hold those of a chunk."""
    model = on_meta(tiny_config("attention", hidden_size=64, vocab_size=8192), torch.bfloat16)
    meter = Meter(model, 128, 256, as_cuda=True)
    for rows in (1, 2, 3, 8):
        guessed = meter.part(HEAD, "none", rows)
        true = meter.measured_head(1, rows * 128)
        assert guessed.forward_peak == pytest.approx(max(true.forward), rel=0.01)
        assert guessed.backward_peak(False) == pytest.approx(max(true.backward), rel=0.01)
