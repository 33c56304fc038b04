"""`longfire doctor`: every fast op against its reference on this machine, forward and backward.

Where there are several forms (our own on torch, fla's kernels on CUDA) each that a run could choose
is checked, on the CPU and on the GPU. doctor/cases/ has the cases and their inputs, op_cases.py
what rounding may explain.
"""

import platform
import time
from collections.abc import Iterator

import psutil
import torch
from rich.console import Console
from rich.text import Text

from longfire.doctor.cases import all_cases
from longfire.doctor.op_cases import DTYPES, Case, Sizes, errors, tolerance
from longfire.errors import UserError, first_line
from longfire.launch import cxx_compiler
from longfire.ops.bf16 import native_bf16
from longfire.ops.choice import choose, describe
from longfire.ops.forms import Choice
from longfire.plain_console import plain_console
from longfire.training.environment import version_of

PACKAGES = ("longfire", "torch", "triton", "fla-core", "flash-linear-attention", "transformers")
CASES = tuple(all_cases())
WIDTHS = (21, 30, 9, 6, 6, 21, 10, 6)


def check(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
) -> tuple[bool, str, str]:
    """(right or not, which result was furthest off, by how much or what was raised). sizes: those
    of the device if None."""
    try:
        found = errors(case, device, dtype, sizes)
    except Exception as error:
        # what a kernel raises that cannot run here is a finding, whatever its class, not the end
        if isinstance(error, UserError):
            raise
        return False, type(error).__name__, first_line(error, 80)
    worst = max(found, key=found.__getitem__)
    error_of_worst = found[worst]
    tokens = sizes.T if sizes else None
    is_right = error_of_worst <= tolerance(case, device, dtype, tokens)
    return is_right, worst, f"{error_of_worst:.1e}"


def tables(device: torch.device) -> Iterator[dict[str, Choice]]:
    """Each set of forms that a run on this device could choose, chosen while it is looked at."""
    automatic = choose(device, "auto")
    if any(choice.name != "torch" for choice in automatic.values()):
        yield choose(device, "torch")
    yield choose(device, "auto")


def facts() -> dict[str, str]:
    """What a reader must know to judge the table, and what a report of a fault should hold."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in PACKAGES:
        found[name] = version_of(name) or "not installed"
    found["cpu"] = about_cpu()
    found["gpu"] = about_gpu()
    no_compiler = "no C++ compiler found: training.compile stays off on a CPU"
    found["compiler"] = cxx_compiler() or no_compiler
    return found


def about_cpu() -> str:
    """Cores, instruction set, memory, and how bf16 is multiplied."""
    memory = psutil.virtual_memory()
    total = memory.total / 2**30
    free = memory.available / 2**30
    return (
        f"{psutil.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {total:.1f} GiB "
        f"({free:.1f} free); {bf16(torch.device('cpu'))}"
    )


def about_gpu() -> str:
    """The first GPU: its name, memory, CUDA, and how bf16 is multiplied."""
    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        return f"none that torch sees (torch built for CUDA {cuda or 'not at all'})"
    gpu = torch.cuda.get_device_properties(0)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{gpu.name}, {memory}, CUDA {cuda}; {bf16(torch.device('cuda'))}"


def bf16(device: torch.device) -> str:
    """Whether it is multiplied as it is."""
    if native_bf16(device):
        return "multiplies bf16 natively"
    return "no bf16 matrix units: bf16 is multiplied in fp32"


def main() -> int:
    """Print the table; 0 if every form is right, 1 if one is not."""
    console = plain_console(highlight=False, soft_wrap=True)
    for name, value in facts().items():
        console.print(f"{name:<24}{value}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    begun = time.perf_counter()
    count = 0
    wrong: list[str] = []
    for device in devices:
        for table in tables(device):
            count += len(DTYPES) * sum(not case.missing(device) for case in CASES)
            wrong += check_all(device, table, console)
    seconds = time.perf_counter() - begun
    console.print(f"\n{count - len(wrong)} of {count} right, in {seconds:.0f} s")
    if wrong:
        console.print(
            f"wrong: {'; '.join(wrong)}. Train with model.kernels = reference (or torch, if only "
            "fla is wrong), and report this whole page",
            style="bold red",
        )
    return int(bool(wrong))


def check_all(
    device: torch.device,
    table: dict[str, Choice],
    console: Console,
) -> list[str]:
    """Check and print every case in both types, with the forms that are chosen; those that are
    wrong."""
    console.print()
    for choice in describe(table):
        console.print(f"{device.type}, {choice}")
    words = ("op", "case", "type", "device", "form", "largest error in", "relative", "limit")
    console.print(line(*words), style="bold")
    wrong: list[str] = []
    for case in CASES:
        form = table[case.op].name if case.op in table else "torch"
        if reason := case.missing(device):
            console.print(line(case.op, case.name, "", device.type, "not available", reason))
            continue
        for dtype in DTYPES:
            is_right, where, relative = check(case, device, dtype)
            type_name = str(dtype).removeprefix("torch.")
            text = line(
                case.op,
                case.name,
                type_name,
                device.type,
                form,
                where,
                relative,
                f"{tolerance(case, device, dtype):.0e}",
            )
            if is_right:
                console.print(text, Text("ok", style="green"))
            else:
                console.print(text, Text("FAIL", style="bold red"))
                wrong.append(f"{case} ({form}, {type_name}, {device.type})")
    return wrong


def line(*words: str) -> str:
    """A line of the table."""
    columns: list[str] = []
    for word, width in zip(words, WIDTHS):
        columns.append(f"{word:<{width}}")
    return " ".join(columns)
