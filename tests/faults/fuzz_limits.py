"""Low limits of memory, descriptors, threads and file sizes while a command runs.

Memory is limited above what the imported packages have: with less, Python and torch themselves
cannot start, and their libraries end the process.
"""

import json
import os
import random
import resource
import threading
from pathlib import Path
from unittest import mock

from tests.faults.damage import Kind
from tests.faults.forked import Ended, run_forked
from tests.faults.workplace import (
    COMMANDS,
    assert_message,
    assert_recovers,
    kept,
    make_workplace,
    some_command,
)

CASE = "case.json"
MIB = 2**20
GLIBC_ENDS = "cannot allocate memory for thread-local data: ABORT"
LIMITS = {
    "memory": (16, 512),  # MiB above what the process has
    "descriptors": (4, 40),  # above those that are open
    "file_bytes": (0, 60_000),
    "threads": (0, 8),  # that can be started
}
NUMBERS = {
    "memory": resource.RLIMIT_AS,
    "descriptors": resource.RLIMIT_NOFILE,
    "file_bytes": resource.RLIMIT_FSIZE,
}


def damage_limits(folder: Path, chance: random.Random) -> None:
    """Choose a command and a limit."""
    kind = chance.choice(list(LIMITS))
    case = {
        "command": some_command(folder, chance),
        "kind": kind,
        "amount": chance.randint(*LIMITS[kind]),
    }
    (folder / CASE).write_text(json.dumps(case))


class FewThreads:
    """Starts so many threads, and then fails as Python does at RLIMIT_NPROC, which does not bind
    the administrator, as whom a test may run."""

    def __init__(self, amount: int) -> None:
        self.left = amount
        self.start = threading._start_new_thread

    def __call__(self, *arguments: object) -> int:
        if not self.left:
            raise RuntimeError("can't start new thread")
        self.left -= 1
        return self.start(*arguments)


def limit(kind: str, amount: int) -> None:
    """Set a limit of this process."""
    if kind == "threads":
        mock.patch("threading._start_new_thread", FewThreads(amount)).start()
        return
    if kind == "memory":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        amount = pages * os.sysconf("SC_PAGE_SIZE") + amount * MIB
    elif kind == "descriptors":
        amount += len(os.listdir("/proc/self/fd"))
    _, hard = resource.getrlimit(NUMBERS[kind])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(NUMBERS[kind], (amount, hard))


def read_limits(folder: Path) -> None:
    case = json.loads((folder / CASE).read_text())
    name = case["command"]
    before = kept(folder, COMMANDS[name])

    def hurt() -> None:
        limit(case["kind"], case["amount"])

    ended = run_forked(COMMANDS[name].words, folder, hurt)
    if not is_ended_by_glibc(ended):
        assert_message(ended)
    assert_recovers(folder, name, before)


def is_ended_by_glibc(ended: Ended) -> bool:
    """Where a library has variables of its own for each thread, glibc allocates them when a thread
    first uses them, and ends the process if it cannot: no code of a program is asked."""
    return ended.code == 127 and ended.errors.strip().endswith(GLIBC_ENDS)


LIMITS_KIND = Kind(make_workplace, damage_limits, read_limits)
