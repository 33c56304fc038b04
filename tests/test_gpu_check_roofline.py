"""The counted kernels of a step: their FLOPs beside those that models say of themselves, and what torch.compile joins."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longfire.gpu_check.model_runs import MODELS, config_of, run_of
from longfire.gpu_check.roofline import (
    CountedSequence,
    Kernel,
    KernelCounter,
    Totals,
    counted_step,
    joined_elementwise,
)
from longfire.gpu_check.stage import Work
from longfire.parallel.cost import DEVICES

ROOT = Path(__file__).parents[1]
H100 = DEVICES["h100-80gb"]


@pytest.mark.parametrize("name", MODELS)
def test_counted_flops_are_those_of_the_model(tmp_path, name):
    """Matrix products are counted by operator, attention and recurrences by formula; the model adds up its own. A GPT-3
    does not count its biases, and a recurrence not what is masked within a chunk: 5 %."""
    work = Work(tmp_path, False, 60)
    step = counted_step(config_of(run_of(name, work)), 2, 2048)
    counted = sum(step.compiled.flops.values())
    assert counted == pytest.approx(step.model_flops, rel=0.05)
    assert counted == sum(step.eager.flops.values()), "joining kernels changes no FLOPs"
    for kind, size in step.compiled.bytes.items():
        assert size <= step.eager.bytes[kind]
    assert step.mfu(step.eager, H100) < step.mfu(step.compiled, H100)
    assert step.mfu(step.compiled, H100) < step.mfu(step.compiled, H100, at_best=True) < 1


def test_bytes_and_flops_of_operators():
    """y = relu(x w), backward: three products, each over its own matrices, in fp32."""
    with FakeTensorMode():
        x, w = torch.empty(8, 16, requires_grad=True), torch.empty(16, 32, requires_grad=True)
        counter = KernelCounter()
        with counter:
            (x @ w).relu().sum().backward()
    products = [kernel for kernel in counter.kernels if kernel.kind == "GEMM"]
    assert [kernel.flops for kernel in products] == [2 * 8 * 16 * 32] * 3
    sizes = {8 * 16 * 4, 16 * 32 * 4, 8 * 32 * 4}
    assert [kernel.bytes for kernel in products] == [sum(sizes)] * 3
    relu = counter.kernels[1]
    assert relu.bytes == 2 * 8 * 32 * 4


@pytest.mark.parametrize("window", [1, 8, 64, 100])
def test_scores_within_a_window(window):
    """Beside all pairs that are seen; of a query's own key half counts, as in the whole triangle."""
    T = 64
    q = torch.zeros(1, T, 2, 4)
    counter = KernelCounter()
    CountedSequence(counter).attention(q, q, q, window=window)
    places = torch.arange(T)
    seen = (places[:, None] >= places) & (places[:, None] < places + window)
    exact = 2.0 * seen.sum().item() * 2 * (4 + 4)
    half_a_key = 2.0 * T / 2 * 2 * (4 + 4)
    assert exact - half_a_key <= counter.kernels[0].flops <= exact


def test_elementwise_kernels_in_a_row_are_one():
    """a -> b -> c, of which c alone is read by a product later: one kernel that reads a and writes c."""
    kernels = [
        Kernel("elementwise", 0, {1: 100}, {2: 100}),
        Kernel("elementwise", 0, {2: 100, 1: 100}, {3: 100}),
        Kernel("GEMM", 7.0, {3: 100, 9: 50}, {4: 10}),
        Kernel("elementwise", 0, {4: 10, 2: 100}, {5: 10}),
    ]
    joined = joined_elementwise(kernels)
    assert [kernel.kind for kernel in joined] == ["elementwise", "GEMM", "elementwise"]
    assert joined[0].reads == {1: 100} and joined[0].writes == {2: 100, 3: 100}, "2 is read later"
    assert joined[1] == kernels[2] and joined[2].writes == {5: 10}
    assert Totals.of(joined).launches["elementwise"] == 2
    without_2 = joined_elementwise([*kernels[:3], Kernel("elementwise", 0, {4: 10}, {5: 10})])
    assert without_2[0].writes == {3: 100}


def test_seconds_are_the_longer_of_computing_and_moving(tmp_path: Path):
    computing = Totals.of([Kernel("GEMM", H100.flops["bfloat16"], {1: 8}, {2: 8})])
    moving = Totals.of([Kernel("GEMM", 1.0, {1: int(H100.memory_bandwidth)}, {2: 0})])
    assert computing.seconds(H100, at_best=True)["GEMM"] == pytest.approx(1.0)
    assert moving.seconds(H100, at_best=True)["GEMM"] == pytest.approx(1.0)
    assert computing.seconds(H100)["GEMM"] > 1.0


@pytest.mark.slow
def test_the_tables_of_the_page_are_those_of_the_script():
    page = (ROOT / "docs/gpu.md").read_text()
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import roofline
    finally:
        sys.path.remove(str(ROOT / "bench"))
    steps = {name: roofline.counted(name, roofline.SEQUENCES) for name in roofline.ALL_MODELS}
    assert roofline.with_tables(page, roofline.tables(steps, roofline.SEQUENCES)) == page
