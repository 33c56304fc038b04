"""Whether a device multiplies bf16 matrices in hardware: found once a process, before a model is
built.

Flags settle it where they can say no: an x86 CPU without `avx512_bf16` and `amx_bf16` emulates
bf16. What they cannot settle is measured: an ARM CPU, a CPU whose units a library may not use
(ONEDNN_MAX_CPU_ISA), a library that does not know the units. On two cores of three kinds of server
CPU a bf16 product of 512 x 512 matrices ran at 2.2 times the speed of fp32 with units, at 0.32
times emulated by AVX-512, at 0.02 times without either: the bound of 1 is far from all of them.
Time of the CPU is measured, not of the clock, and no single product decides: a busy machine, which
interrupts one of them, gives the same answer as an idle one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from longfire.ops.pretending import as_on_cuda

UNITS_OF_X86 = ("avx512_bf16", "amx_bf16")
MEASURED_SIZE = 512  # rows and columns of the matrices that are multiplied
MEASURED_TIMES = 5  # of which the fastest counts
HOPELESS = 4.0  # times slower than fp32: after LEAST_TIMES such products the others are not needed
LEAST_TIMES = 3

_answers: dict[str, bool] = {}  # device type -> answer


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 products on this device are at least as fast as fp32 ones.

    A planner that stands in for CUDA on a CPU gets CUDA's answer.
    """
    if as_on_cuda():
        return True
    if device.type not in _answers:
        _answers[device.type] = _found(device)
    return _answers[device.type]


@contextmanager
def assumed(answer: bool, device_type: str = "cpu") -> Iterator[None]:
    """Inside, `native_bf16` gives this answer for devices of this type, whatever they have."""
    before = dict(_answers)
    _answers[device_type] = answer
    try:
        yield
    finally:
        _answers.clear()
        _answers.update(before)


def assume(answer: bool, device_type: str = "cpu") -> None:
    """From here on `native_bf16` gives this answer: one process decides for all of a run."""
    _answers[device_type] = answer


# To torch.compile a constant: a graph neither breaks here nor holds what it was found by.
@torch.compiler.assume_constant_result
def _found(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and may_have_units() and measured_ratio() >= 1


def may_have_units() -> bool:
    """False where the CPU's flags exclude bf16 units."""
    flags = torch.cpu.get_capabilities()
    if flags.get("architecture") != "x86_64":
        return True
    return any(flags.get(unit, False) for unit in UNITS_OF_X86)


def measured_ratio() -> float:
    """Speed of a bf16 matrix product on this CPU over that of the same product in fp32; takes 10 to
    100 ms."""
    wide = torch.ones(MEASURED_SIZE, MEASURED_SIZE)
    narrow = wide.bfloat16()
    for factor in (wide, narrow):
        factor @ factor  # the first product of a kind also builds its kernel
    fastest_wide = _seconds(wide)
    fastest_narrow = _seconds(narrow)
    for done in range(1, MEASURED_TIMES):
        if done >= LEAST_TIMES and fastest_narrow > HOPELESS * fastest_wide:
            break
        fastest_wide = min(fastest_wide, _seconds(wide))
        fastest_narrow = min(fastest_narrow, _seconds(narrow))
    return fastest_wide / fastest_narrow


def _seconds(factor: Tensor) -> float:
    start = time.process_time()
    factor @ factor
    return time.process_time() - start
