"""The head and the loss on CUDA: our two Triton kernels are compiled for the device, started once
for each chunk, and nothing waits."""

import counts
import pytest
import torch
from no_kernels import without_numbers

from longfire.ops import forms
from longfire.ops.choice import choose
from longfire.ops.cross_entropy import CHUNK_TOKENS_ON_CUDA, linear_cross_entropy, token_losses

CUDA = torch.device("cuda")
CHUNKS = 3
N = CHUNKS * CHUNK_TOKENS_ON_CUDA
W, D = 50_257, 64


@pytest.fixture(autouse=True)
def nothing_is_computed():
    before = dict(forms.decided)
    with without_numbers():
        yield
    forms.decided.clear()
    forms.decided.update(before)


def step(kernels: str, dtype: torch.dtype, softcap: float = 0.0) -> counts.Counts:
    """What a second call with its backward starts."""
    assert choose(CUDA, kernels)["linear_cross_entropy"].name in ("triton", "torch")
    hidden_ND = torch.zeros(N, D, dtype=dtype, device=CUDA, requires_grad=True)
    weight_WD = torch.zeros(W, D, device=CUDA, requires_grad=True)
    labels_N = torch.zeros(N, dtype=torch.long, device=CUDA)
    for _ in range(2):
        before = counts.now()
        loss = linear_cross_entropy(hidden_ND, weight_WD, labels_N, softcap=softcap)
        loss.backward()
    return counts.now() - before


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_kernels_of_ours_a_chunk(dtype, softcap):
    done = step("auto", dtype, softcap)
    assert done.triton_launches == 2 * CHUNKS
    assert done.matmuls == 3 * CHUNKS
    assert done.waits == 0


def test_fewer_kernels_than_the_form_on_torch():
    assert step("auto", torch.bfloat16).launches < step("torch", torch.bfloat16).launches


def test_evaluation_needs_the_first_alone():
    choose(CUDA, "auto")
    hidden_ND = torch.zeros(N, D, dtype=torch.bfloat16, device=CUDA)
    labels_N = torch.zeros(N, dtype=torch.long, device=CUDA)
    before = counts.now()
    token_losses(hidden_ND, torch.zeros(W, D, device=CUDA), labels_N)
    assert (counts.now() - before).triton_launches == CHUNKS
