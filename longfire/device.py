"""The device of a run: which it is, what it computes in, how fast it multiplies, how much memory it
uses, what a step spends."""

import contextlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from longfire.config.settings import Model, Training
from longfire.errors import SettingsError
from longfire.ops.bf16 import native_bf16

# Dense bf16 matmul peaks, FLOP/s, from the makers' data sheets; other devices are measured
# (`matmul_peak`).
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
SHORTEST = (
    1e-9  # seconds between two looks at a clock: some machines' clocks stand still or run back
)


def choose_device(training: Training, local_rank: int = 0) -> torch.device:
    """The device that `training.device` names, with threads, seed and determinism set. Raises
    SettingsError if it is not there.

    local_rank: which of the machine's CUDA devices is this process's own.
    """
    if training.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "training.device = 'cuda', but torch sees no CUDA device here; set it to auto or cpu"
        )
    if training.threads:
        torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    torch.use_deterministic_algorithms(training.deterministic)
    if training.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"this is process {local_rank} of its machine (LOCAL_RANK), which has {torch.cuda.device_count()} CUDA device(s): start "
            "as many processes as there are devices"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_dtype(model: Model, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute type and one sentence that says why: the precision policy of the run."""
    native = native_bf16(device)
    wanted = (
        model.compute_dtype
        if model.compute_dtype != "auto"
        else ("bfloat16" if native else "float32")
    )
    why = "asked for by model.compute_dtype"
    if model.compute_dtype == "auto":
        why = (
            "multiplied natively here" if native else f"this {device.type} has no bf16 matrix units"
        )
    elif wanted == "bfloat16" and not native:
        why += f"; this {device.type} has no bf16 matrix units: values are rounded to bf16 and multiplied in fp32"
    return getattr(torch, wanted), f"parameters and optimizer float32, activations {wanted} ({why})"


def fastest_matmul_peak(device: torch.device) -> tuple[float, str]:
    """Highest FLOP/s of a plain matrix product in any type that models compute in, and where the
    number is from.

    MFU refers to it, so that a type which this machine multiplies slowly shows as a low number.
    """
    if device.type == "cuda" or not native_bf16(device):
        return matmul_peak(device, torch.bfloat16 if native_bf16(device) else torch.float32)
    return max(matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of a plain matrix product, and where the number is from: data sheet (CUDA, bf16), else
    measured here in ~0.1 s."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAK_FLOPS.items():
            if key in name:
                return peak, f"data sheet of {key}"
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 6)
    measured = torch.float32 if device.type == "cpu" and not native_bf16(device) else dtype
    generator = torch.Generator(device).manual_seed(
        0
    )  # its own: a measurement must not move the run's random numbers
    a = torch.randn(size, size, device=device, dtype=measured, generator=generator)
    a @ a
    start = wait(device)
    for _ in range(repeats):
        a @ a
    flops_per_second = repeats * 2 * size**3 / max(wait(device) - start, SHORTEST)
    return flops_per_second, f"measured {str(measured).removeprefix('torch.')} matmul of {size}"


def wait(device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds on the clock when all that was sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Where the seconds of a step go. `with clock("forward"): ...` adds to that part; `read()`
    gives all parts and starts anew.

    On CUDA a part is the time between two events on the stream, so that the clock never makes the
    device wait.
    now: what is read for the time, in seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.parts, self.events, self.now = device, Counter(), [], now
        self.begun = now()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((part, start, end))
        else:
            start = self.now()
            yield
            self.parts[part] += max(0.0, self.now() - start)

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading, `seconds` in all, and `other`, the rest."""
        now = wait(self.device, self.now)
        for part, start, end in self.events:
            self.parts[part] += start.elapsed_time(end) / 1000
        seconds = max(now - self.begun, SHORTEST)
        parts = {
            **self.parts,
            "other": max(0.0, seconds - sum(self.parts.values())),
            "seconds": seconds,
        }
        self.parts, self.events, self.begun = Counter(), [], now
        return parts
