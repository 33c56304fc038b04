"""The kinds of kernels, by name, and how long the device works on each."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import profile

# In this order: the first pattern that a kernel's name has says its kind; the rest is elementwise
# (sums, norms, the loss and what torch.compile joins among it).
PATTERNS = {
    "copies": r"memcpy|memset|copy_kernel|CatArrayBatchedCopy|\bcopy_|aten::copy_|aten::cat\b",
    "attention": r"flash|fmha|attention|sdpa|mha_|softmax_warp",
    "recurrence": (
        r"chunk_|chunk$|fused_recurrent|recompute_w|solve_tril|prepare_wy|merge_16x16|delta_rule|"
        r"causal_conv|short_conv|selective_scan|longfire::scan|parallel_|wy_|dplr|cumsum"
    ),
    "GEMM": (
        r"gemm|gemv|cublas|cutlass|nvjet|wgmma|xmma|ampere_|sm80_|sm90_|sm100_|aten::mm|aten::bmm|"
        r"aten::addmm|triton_tem|splitK"
    ),
}
KINDS = (*PATTERNS, "elementwise")
COMPILED = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in PATTERNS.items()}


class Kernel(NamedTuple):
    """Something that a device did: when, in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The kind of a kernel, or of an operator of torch, by its name."""
    for kind, pattern in COMPILED.items():
        if pattern.search(name):
            return kind
    return "elementwise"


def kernels_of(profiled: profile) -> list[Kernel]:
    """All kernels and copies on CUDA devices that a profile has, in the order of their starts."""
    found: list[Kernel] = []
    for event in profiled.events() or ():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found.append(Kernel(event.name, event.time_range.start, event.time_range.end))
    return sorted(found, key=lambda kernel: kernel.start)


def busy_seconds(kernels: Iterable[Kernel]) -> float:
    """Seconds in which at least one of these (in the order of their starts) was at work."""
    total = 0.0
    until = float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end - max(until, kernel.start))
        until = max(until, kernel.end)
    return total / 1e6


def seconds_by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds of kernels of each kind."""
    found = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        found[kind_of(kernel.name)] += (kernel.end - kernel.start) / 1e6
    return found


def operator_seconds(profiled: profile) -> dict[str, float]:
    """The same on a CPU: seconds of torch's operators themselves, without those that they call."""
    found = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return found
