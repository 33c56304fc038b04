"""The stand-in itself: torch takes it for an H100 with 80 GB, whose memory ends and whose work is
counted."""

import gc
import re
from importlib.metadata import requires
from pathlib import Path

import counts
import pytest
import torch
from no_kernels import without_numbers

from longfire.ops.bf16 import native_bf16

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_is_computed():
    with without_numbers():
        yield


def test_torch_takes_it_for_an_h100():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.get_device_capability() == (9, 0)
    assert "H100" in torch.cuda.get_device_name()
    assert native_bf16(CUDA)


def test_memory_ends_where_that_of_the_device_does():
    gc.collect()  # what earlier tests have left in circles
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert 78 * 2**30 < free < total < 80 * 2**30
    kept = torch.empty(free // 2, dtype=torch.uint8, device=CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(free // 2 + 2**30, dtype=torch.uint8, device=CUDA)
    del kept
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == free


def test_what_small_tensors_hold_survives_copies():
    x = torch.arange(1000)
    assert torch.equal(x.to(CUDA).clone().cpu()[:1], x[:1])
    assert torch.equal(x.to(CUDA).cpu(), x)


def test_work_and_waits_are_counted():
    a = torch.zeros(64, 64, device=CUDA, dtype=torch.bfloat16)
    before = counts.now()
    (a @ a).sum().item()
    torch.cuda.synchronize()
    done = counts.now() - before
    assert done.matmuls == 1
    assert done.launches >= 1
    assert done.to_host == 1
    assert done.stream_waits >= 1 and done.device_waits == 1


def test_the_constraints_have_the_triton_that_torch_asks_for():
    """One set of versions for CPUs and GPUs: a CUDA build of torch names its triton exactly."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if f"torch=={torch.__version__.split('+')[0]}\n" not in constraints:
        pytest.skip("another torch than that of the constraints")
    asked = [line for line in requires("torch") or [] if re.match(r"triton[ =<>]", line)]
    (pin,) = [line for line in constraints.splitlines() if line.startswith("triton==")]
    assert [line.split(";")[0].strip() for line in asked] == [pin]
