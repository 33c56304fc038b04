"""Whether bf16 is multiplied in hardware: flags first, then a measurement, once a process."""

import os
import subprocess
import sys

import pytest
import torch

from longfire.ops import bf16

pytestmark = pytest.mark.dtype

CPU = torch.device("cpu")
AVX512 = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
CPUS = [
    (
        AVX512,
        0,
    ),  # every AVX-512 CPU can emulate bf16: the flag of the units decides, and nothing is measured
    ({"architecture": "x86_64", "avx2": True}, 0),
    ({**AVX512, "avx512_bf16": True}, 1),
    ({**AVX512, "amx_bf16": True}, 1),
    ({"architecture": "aarch64"}, 1),  # whose flags differ from system to system
]


@pytest.mark.parametrize(("flags", "measured"), CPUS)
@pytest.mark.parametrize("ratio", [0.3, 2.2])
def test_flags_exclude_and_a_measurement_settles_the_rest(flags, measured, ratio, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(bf16, "measured_ratio", lambda: taken.append(ratio) or ratio)
    monkeypatch.setattr(bf16, "_answers", {})
    answers = [bf16.native_bf16(CPU) for _ in range(3)]
    assert answers == [bool(measured) and ratio > 1] * 3
    assert len(taken) == measured, "found once a process"


def test_one_product_that_was_interrupted_does_not_decide(monkeypatch):
    """Of the bf16 products the first is slow, as where another process had the CPU; the rule is the
    fastest. A CPU without units is given up early."""
    taken = {torch.float32: [2.0] * 5, torch.bfloat16: [100.0, 1.0, 1.0, 1.0, 1.0]}
    monkeypatch.setattr(bf16, "_seconds", lambda factor: taken[factor.dtype].pop(0))
    assert bf16.measured_ratio() == 2.0
    taken |= {torch.float32: [1.0] * 5, torch.bfloat16: [50.0] * 5}
    assert bf16.measured_ratio() == 1 / 50
    assert len(taken[torch.bfloat16]) == 5 - bf16.LEAST_TIMES


def test_an_assumption_ends_with_its_block():
    with bf16.assumed(True):
        assert bf16.native_bf16(CPU)
        with bf16.assumed(False):
            assert not bf16.native_bf16(CPU)
        assert bf16.native_bf16(CPU)


def test_no_other_device_multiplies_bf16_unasked():
    assert not bf16.native_bf16(torch.device("meta"))


@pytest.mark.skipif(
    torch.cpu.get_capabilities().get("architecture") != "x86_64", reason="limits of x86"
)
def test_units_that_the_library_may_not_use_are_none():
    """Flags say what the CPU has; here oneDNN is set to stay at AVX2, where bf16 takes 30 times as long as fp32."""
    program = (
        "import torch; from longfire.ops import bf16; print(bf16.native_bf16(torch.device('cpu')))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
