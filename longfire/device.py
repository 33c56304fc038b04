"""The device of a run: which it is, what it computes in, how fast it multiplies, how much memory it
uses, what a step spends."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch

from longfire.config.settings import Float8, Model, Training
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
FLOAT8_CAPABILITY = (8, 9)  # of the first CUDA devices with float8 units
# Seconds between two readings of a clock: the clocks of some machines stand still or run backwards
SHORTEST = 1e-9


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
            f"this is process {local_rank} of its machine (LOCAL_RANK), which has "
            f"{torch.cuda.device_count()} CUDA device(s): start as many processes as there are "
            "devices"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def has_float8_units(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit numbers itself."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def check_float8(float8: Float8, device: torch.device) -> None:
    """Raises SettingsError if 8-bit numbers are to be multiplied on a device without units for
    it."""
    if not float8.enable_float8_linear or float8.emulate or has_float8_units(device):
        return
    if device.type != "cuda":
        what = f"this {device.type} has"
    else:
        what = "{} has compute capability {}.{},".format(
            torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device)
        )
    raise SettingsError(
        f"float8.enable_float8_linear = true, but {what} no float8 units (CUDA devices of compute "
        "capability 8.9 or higher have them): set it to false, or float8.emulate to true, which "
        "gives the same rounding in float32, slower than without float8"
    )


def choose_dtype(model: Model, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute type and one sentence that says why: the precision policy of the run."""
    native = native_bf16(device)
    if model.compute_dtype != "auto":
        wanted = model.compute_dtype
    elif native:
        wanted = "bfloat16"
    else:
        wanted = "float32"
    why = "asked for by model.compute_dtype"
    if model.compute_dtype == "auto":
        if native:
            why = "multiplied natively here"
        else:
            why = f"this {device.type} has no bf16 matrix units"
    elif wanted == "bfloat16" and not native:
        why += (
            f"; this {device.type} has no bf16 matrix units: values are rounded to bf16 and "
            "multiplied in fp32"
        )
    return getattr(torch, wanted), f"parameters and optimizer float32, activations {wanted} ({why})"


def fastest_matmul_peak(device: torch.device) -> tuple[float, str]:
    """Highest FLOP/s of a matrix product in any type that models compute in, and the source of the
    number.

    MFU refers to it, so that a type which this machine multiplies slowly shows as a low number.
    """
    if device.type == "cuda" or not native_bf16(device):
        return matmul_peak(device, torch.bfloat16 if native_bf16(device) else torch.float32)
    return max(matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of a matrix product, and the source of the number: the data sheet (CUDA, bf16), else a
    measurement of some 0.1 s."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAK_FLOPS.items():
            if key in name:
                return peak, f"data sheet of {key}"
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 6)
    measured = torch.float32 if device.type == "cpu" and not native_bf16(device) else dtype
    # its own generator: a measurement must not advance the random numbers of the run
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=measured, generator=generator)
    a @ a
    start = wait(device)
    for _ in range(repeats):
        a @ a
    flops_per_second = repeats * 2 * size**3 / max(wait(device) - start, SHORTEST)
    return flops_per_second, f"measured {str(measured).removeprefix('torch.')} matmul of {size}"


def wait(device: torch.device, now: Callable[[], float] = time.perf_counter) -> float:
    """Wait until the device has done all that was sent to it; the seconds on the clock then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allocator_numbers(device: torch.device) -> dict[str, float]:
    """Of CUDA's caching allocator, so far: the most bytes that it reserved, how often it had to
    free its cache and try again, how often memory was out; empty on other devices."""
    if device.type != "cuda":
        return {}
    counts = torch.cuda.memory_stats(device)
    return {
        "memory_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "memory_retries": counts.get("num_alloc_retries", 0),
        "memory_ooms": counts.get("num_ooms", 0),
    }


class Clock:
    """The seconds of a step, by part. `with clock("forward"): ...` adds to that part; `read()`
    returns all parts and starts anew.

    On CUDA a part is the time between two events on the stream, so that the clock never makes the
    device wait.
    now: what is read for the time, in seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.now = now
        self.begun = now()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((part, start, end))
        else:
            begun = self.now()
            yield
            self.add(part, max(0.0, self.now() - begun))

    def add(self, part: str, seconds: float) -> None:
        """Count these seconds to a part."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading, `seconds` in all, and `other`, the rest."""
        now = wait(self.device, self.now)
        for part, start, end in self.events:
            self.add(part, start.elapsed_time(end) / 1000)
        seconds = max(now - self.begun, SHORTEST)
        parts = {
            **self.parts,
            "other": max(0.0, seconds - sum(self.parts.values())),
            "seconds": seconds,
        }
        self.parts = {}
        self.events = []
        self.begun = now
        return parts
