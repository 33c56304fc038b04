"""Recurrences of segments of sequences that several processes share, on CUDA: what is started for a
segment does not depend on its length."""

from collections import Counter

import counts
import pytest
import torch
from no_kernels import without_numbers
from torch import Tensor

from longfire.ops import forms
from longfire.ops.choice import choose
from longfire.ops.maps import RECURRENCES
from longfire.ops.maps.contract import Affine

CUDA = torch.device("cuda")
B, H, K, V = 1, 4, 128, 128
OPS = {
    "delta_rule": ("K", "K", "V", ""),
    "delta_rule scalar": ("K", "K", "V", "", ""),
    "delta_rule vector": ("K", "K", "V", "", "K"),
    "dplr": ("K", "K", "V", "K", "K", "K"),
}


@pytest.fixture(autouse=True)
def forms_as_before():
    before = dict(forms.decided)
    yield
    forms.decided.clear()
    forms.decided.update(before)


def inputs_of(case: str, tokens: int) -> list[Tensor]:
    shapes = {"K": (B, tokens, H, K), "V": (B, tokens, H, V), "": (B, tokens, H)}
    found = []
    for name in OPS[case]:
        x = torch.zeros(shapes[name], dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        found.append(x)
    return found


def state_before(mine: Affine) -> Tensor:
    return mine(mine.write)


def started(case: str, tokens: int) -> tuple[Counter[str], counts.Counts]:
    """Triton's kernels by their names, and what else was started, forward and backward."""
    recurrence = RECURRENCES[case.split()[0]]
    inputs = inputs_of(case, tokens)
    with without_numbers() as kernels:
        for _ in range(2):  # the first makes tables
            kernels.clear()
            before = counts.now()
            recurrence.on_segments(state_before, *inputs).sum().backward()
            done = counts.now() - before
        return Counter(kernels), done


@pytest.mark.parametrize("case", OPS)
def test_long_segments_start_no_more_than_short_ones(case):
    assert choose(CUDA, "auto")[case.split()[0]].name == "fla"
    short_kernels, short = started(case, 2048)
    long_kernels, long = started(case, 16384)
    assert long_kernels == short_kernels
    assert sum(long_kernels.values()) <= 30
    assert long.launches == short.launches <= 50
    assert long.matmuls == short.matmuls <= 10
    assert long.waits == 0


def test_the_form_in_torch_starts_a_product_for_each_chunk():
    choose(CUDA, "torch")
    _, short = started("delta_rule scalar", 2048)
    _, long = started("delta_rule scalar", 4096)
    more_chunks = (4096 - 2048) // 64
    assert long.matmuls - short.matmuls >= 2 * more_chunks  # forward and backward
