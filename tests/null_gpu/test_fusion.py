"""Which kernels torch.compile makes of a block on CUDA: a residual sum and the norm after it are one, and no weight is rounded
where a step has rounded it."""

import re

import pytest
import torch
from conftest import tiny_config
from no_kernels import without_numbers
from torch._inductor.utils import run_and_get_code

from longfire.initialise import build
from longfire.mixers.mixer import Sequence
from longfire.ops.choice import choose
from longfire.ops.rounded_weights import matrices_rounded, rounded_once

CUDA = torch.device("cuda", 0)
B, T, D = 2, 96, 64
MATRICES = 7  # q, k, v, o, gate, up, down
ROUNDING = re.compile(r"triton_poi_fused__to_copy(_transpose)?_\d+")


def kernels_of_a_block(rounds_once: bool) -> tuple[list[str], list[str]]:
    """Triton's kernels of an attention block in the order of their launches, forward and backward."""
    torch._dynamo.reset()
    choose(CUDA, "auto")
    with without_numbers():
        model = build(tiny_config("attention", hidden_size=D), 0, CUDA, torch.bfloat16)
        (block, *_) = model.layers
        matrices = matrices_rounded(block, torch.bfloat16) if rounds_once else []
        seq = Sequence(torch.arange(T, device=CUDA).expand(B, T))
        model.prepare(seq)
        compiled = torch.compile(block, dynamic=False)
        x_BTD = torch.zeros(B, T, D, dtype=torch.bfloat16, device=CUDA, requires_grad=True)

        def forward_and_backward() -> None:
            compiled(x_BTD, seq).sum().backward()

        with rounded_once(matrices, torch.bfloat16):
            _, (forward, backward) = run_and_get_code(forward_and_backward)
    torch._dynamo.reset()
    return started(forward), started(backward)


def started(code: str) -> list[str]:
    return re.findall(r"(triton_\w+)\.run\(", code)


@pytest.mark.parametrize("rounds_once", [False, True])
def test_a_residual_sum_and_its_norm_are_one_kernel(rounds_once):
    """The norm before the mixer is one, the sum after it with the MLP's norm another; the block's last sum is by itself, since
    the next block is compiled by itself too. Weights are rounded by kernels of their own, unless the step has done it."""
    forward, backward = kernels_of_a_block(rounds_once)
    norms = [name for name in forward if "rms_norm" in name]
    sums = [name for name in forward if "add" in name and "cat" not in name]  # rope joins halves
    assert len(norms) == 2 and "add" not in norms[0]
    assert sums == [norms[1], forward[-1]]
    for kernels in (forward, backward):
        roundings = [name for name in kernels if ROUNDING.fullmatch(name)]
        assert len(roundings) == (0 if rounds_once else MATRICES)
