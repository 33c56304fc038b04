"""How every script here measures: times side by side, peak memory in a fresh process, results with their machine.

A script compares functions with `alternate`, so that a slow minute of the machine falls on all of them alike, and says
ratios of medians. It takes `--quick` (sizes that CI can afford; nothing is written) and ends with `write_result`.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from longfire.training.environment import cpu_name, version_of

RESULTS = Path(__file__).parent / "results"

# Runs a script, then writes its own high-water mark to a file descriptor. The mark is read inside the process: what a
# parent gets from wait4 includes the parent's own size on Linux, since the child is made by vfork.
PEAK = """
import os, runpy, sys
fd, *sys.argv = int(sys.argv[1]), *sys.argv[2:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
if os.path.exists("/proc/self/status"):
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
os.write(fd, str(peak).encode())
"""


def arguments(description: str, **more: Any) -> argparse.Namespace:
    """The command line of a script: `--quick`, and `--<name> <default>` for each of `more`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, few repeats, nothing written: what CI runs",
    )
    for name, default in more.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    return parser.parse_args()


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, finished work on the device included."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], Any], repeats: int = 7, warmup: int = 2) -> float:
    for _ in range(warmup):
        function()
    return statistics.median(seconds(function) for _ in range(repeats))


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn (a b c a b c ...)."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def peak_rss_bytes(script_args: Iterable[Any]) -> int:
    """Largest resident size of `python <script> <args...>` in a process of its own; CalledProcessError if it fails."""
    read_fd, write_fd = os.pipe()
    try:
        command = [sys.executable, "-c", PEAK, str(write_fd), *map(str, script_args)]
        subprocess.run(command, check=True, pass_fds=[write_fd])
        os.close(write_fd)
        write_fd = -1
        return int(os.read(read_fd, 32))
    finally:
        os.close(read_fd)
        if write_fd >= 0:
            os.close(write_fd)


def machine() -> dict[str, Any]:
    """What a reader must know to judge the numbers."""
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "longfire")},
    }


def write_result(name: str, result: dict[str, Any], quick: bool = False) -> None:
    """bench/results/<name>.json: the result with machine, command and date. A quick run writes nothing."""
    if quick:
        print("quick run: nothing written")
        return
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"date": date, "command": command, "machine": machine(), **result}, indent=1)
        + "\n"
    )
    print(f"written: {path}")


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One line a row; the keys of the first row are the columns."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)
