"""environment.json: versions, revision and devices of a run."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from longfire.disk import write_whole
from longfire.errors import CheckpointError
from longfire.ops.bf16 import may_have_units, native_bf16
from longfire.own_files import read_note

if TYPE_CHECKING:
    import torch

ENVIRONMENT = "environment.json"
# Packages whose versions are recorded
PACKAGES = (
    "longfire",
    "torch",
    "numpy",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "triton",
    "fla-core",
)


class Cuda(TypedDict, total=False):
    """The GPUs of a process."""

    devices: list[str]
    version: str | None


class Environment(TypedDict, total=False):
    """What of environment.json is read again."""

    cpu: str
    threads: int
    multiplies_bf16: bool | None
    cuda: Cuda | None
    python: str
    versions: dict[str, str]
    git: str | None
    time: str
    earlier: list[object]


def write_environment(folder: Path, start_step: int) -> None:
    """Write environment.json. A resumed run keeps its earlier environments under `earlier`."""
    path = folder / ENVIRONMENT
    now: dict[str, object] = {"start_step": start_step, **environment()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if start_step and path.exists():
            before = read_note(path, Environment)
            if before is not None:
                now["earlier"] = [*before.pop("earlier", []), before]
        write_whole(path, json.dumps(now, indent=1))
    except OSError as error:
        fix = "free some space or name another job.dump_folder"
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; {fix}") from error


def environment() -> dict[str, object]:
    """Versions, git revision, devices and command line of this process."""
    import torch

    versions: dict[str, str] = {}
    for name in PACKAGES:
        version = version_of(name)
        if version:
            versions[name] = version
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "versions": versions,
        "git": git_revision(Path(__file__).parent),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "multiplies_bf16": None if cuda else native_bf16(torch.device("cpu")),
        "cuda": {"devices": cuda, "version": torch.version.cuda} if cuda else None,
    }


def multiplies_bf16(folder: Path, device: "torch.device") -> bool:
    """`native_bf16` of the device, as the run in this folder found it on such a CPU before: it is
    measured, and on a busy machine another answer would end a resume to the bit."""
    if device.type == "cpu" and may_have_units() and (folder / ENVIRONMENT).exists():
        before = read_note(folder / ENVIRONMENT, Environment) or {}
        found = before.get("multiplies_bf16")
        if found is not None and before.get("cpu") == cpu_name():
            return found
    return native_bf16(device)


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """Commit of the sources in use, with `+changes` if files differ from it; None where they are
    not a git checkout."""
    try:
        describe = ["describe", "--always", "--abbrev=40", "--match=", "--dirty=+changes"]
        command = ["git", "-C", str(folder), *describe]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode == 0:
        return result.stdout.strip()
    return None


def cpu_name() -> str:
    """As /proc/cpuinfo names it, else as the platform does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if names:
        return names[0]
    return platform.processor() or platform.machine()
