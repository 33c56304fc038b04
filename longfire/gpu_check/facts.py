"""Facts: the card, the versions, and how fast this machine multiplies and copies. And whether it
computes at all."""

import shutil
import statistics
import subprocess
from collections.abc import Iterator

import torch
from torch import Tensor

from longfire.device import matmul_peak, wait
from longfire.doctor.check import facts as versions
from longfire.gpu_check.joined_products import described, joined_times
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.json_types import JsonObject
from longfire.ops.bf16 import native_bf16

SIZES = {True: 256, False: 8192}  # rows of the matrices that are multiplied; True: small
COPIED_BYTES = {True: 2**22, False: 2**30}
REPEATS = 10
DRIVER_FACTS = ("driver_version", "power.limit", "clocks.max.sm", "pcie.link.gen.max")
DRIVER_SECONDS = 20  # that the driver's own program may take
COMPUTES_NOTHING = (
    "this device computes nothing: no number and no time of this check means anything, only that "
    "its code runs"
)


def measure(work: Work) -> Outcome:
    """Raises nothing that the driver's own program does; what it does not say is left out."""
    device = work.device
    numbers: JsonObject = {**versions(), "device": device.type, "small": work.is_small}
    dtype = torch.bfloat16 if native_bf16(device) else torch.float32
    type_name = str(dtype).removeprefix("torch.")
    if work.is_cuda:
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        numbers |= {
            "card": properties.name,
            "capability": capability,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            **dict(driver_facts()),
        }
        about = f"{properties.name}, compute capability {capability}, CUDA {torch.version.cuda}"
    else:
        about = f"no GPU: {torch.get_num_threads()} threads of the CPU, small sizes"
    work.note("a matrix product whose result is known")
    computes = multiplies_right(device, dtype)
    work.note("the speed of a matrix product")
    flops = product_flops(device, dtype, SIZES[work.is_small])
    work.note("one product in the place of several")
    joined = joined_times(device, dtype, work.is_small)
    work.note("the speed of copies")
    rates = copy_rates(device, COPIED_BYTES[work.is_small])
    peak, source = matmul_peak(device, dtype)
    numbers |= {
        "computes": computes,
        "product_type": type_name,
        "product_flops": flops,
        "peak_flops": peak,
        "peak_source": source,
        **rates,
        **joined,
    }
    row = (
        f"{about}; {type_name} product {flops / 1e12:,.3g} TFLOP/s, "
        f"copy {rates['copy_bytes_per_second'] / 1e9:,.3g} GB/s; {described(joined)}"
    )
    return Outcome(row, numbers, () if computes else (COMPUTES_NOTHING,))


def driver_facts() -> Iterator[tuple[str, str]]:
    """What the driver's own program says of the first card; nothing where it is not installed."""
    program = shutil.which("nvidia-smi")
    if not program:
        return
    command = [program, f"--query-gpu={','.join(DRIVER_FACTS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return
    values = done.stdout.strip().split(", ")
    if done.returncode == 0 and len(values) == len(DRIVER_FACTS):
        yield from zip(DRIVER_FACTS, values)


def multiplies_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of small whole numbers, which every type has exactly, is right."""
    a = (torch.arange(64 * 64) % 7 - 3).reshape(64, 64)
    b = (torch.arange(64 * 64) % 5 - 2).reshape(64, 64)
    product = a.to(device, dtype) @ b.to(device, dtype)
    exact = (a.float() @ b.float()).to(dtype)
    return torch.equal(product.cpu(), exact)


def product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product: the median of REPEATS."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    product = a @ a
    seconds: list[float] = []
    for _ in range(REPEATS):
        begun = wait(device)
        torch.mm(a, a, out=product)
        seconds.append(wait(device) - begun)
    return 2 * size**3 / max(statistics.median(seconds), 1e-9)


def copy_rates(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second, read and written: of a copy on the device, and to and from pinned memory of
    the host."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    rates = {"copy_bytes_per_second": 2 * rate(torch.empty_like(source), source, device)}
    if device.type == "cuda":
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        rates["to_device_bytes_per_second"] = rate(source, host, device)
        rates["to_host_bytes_per_second"] = rate(host, source, device)
    return rates


def rate(target: Tensor, source: Tensor, device: torch.device) -> float:
    """Bytes a second of a copy: the median of REPEATS after a first one."""
    target.copy_(source)
    seconds: list[float] = []
    for _ in range(REPEATS):
        begun = wait(device)
        target.copy_(source, non_blocking=True)
        seconds.append(wait(device) - begun)
    return source.nbytes / max(statistics.median(seconds), 1e-9)


STAGE = Stage("facts", 30, 3, measure)
