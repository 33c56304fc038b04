"""Commands of longfire in forked processes of their own, which a test can hurt: a fork of a process
that has imported everything starts in milliseconds."""

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from longfire.cli.entry import main

LIMIT_SECONDS = 200.0  # that a command may take on a busy machine
POLL_SECONDS = 0.002
GONE_SECONDS = 10.0  # until the processes that a command has started must be gone
NO_CODE = 99  # of a process in which the test itself failed


class Ended(NamedTuple):
    """How a command ended: its exit code, or minus the number of the signal that ended it; what it
    printed; how long it took."""

    code: int
    shown: str
    errors: str
    seconds: float


def run_forked(
    words: Sequence[str],
    folder: Path,
    hurt: Callable[[], None] | None = None,
    number: int = 0,
    delay_seconds: float = 0.0,
) -> Ended:
    """Run `longfire` with these words in a folder.

    hurt: called in the process before the command. number: of a signal that is sent delay_seconds
    after the command has begun; 0: none. Raises AssertionError where the command does not end in
    its time, or leaves processes behind.
    """
    outputs = folder.with_name(f"{folder.name}.stdout"), folder.with_name(f"{folder.name}.stderr")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        become_command(words, folder, outputs, hurt, writer)
    os.close(writer)
    os.read(reader, 1)  # the command begins now
    os.close(reader)
    begun = time.monotonic()
    status = waited(child, number, begun + delay_seconds, begun + LIMIT_SECONDS)
    seconds = time.monotonic() - begun
    shown, errors = (output.read_text(errors="replace") for output in outputs)
    for output in outputs:
        output.unlink()
    is_gone = group_ends(child)
    assert status is not None, f"{words} did not end within {LIMIT_SECONDS} s: {errors}"
    assert is_gone, f"{words} left processes: {errors}"
    return Ended(os.waitstatus_to_exitcode(status), shown, errors, seconds)


def become_command(
    words: Sequence[str],
    folder: Path,
    outputs: tuple[Path, Path],
    hurt: Callable[[], None] | None,
    ready: int,
) -> NoReturn:
    """The body of the forked process; `ready` is a descriptor that says when the command begins."""
    code = NO_CODE
    try:
        os.setsid()
        atexit._clear()  # what the parent does at its end is not done here
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)
        torch.set_num_threads(1)  # the pool of the parent's threads is not in this process
        os.write(ready, b"!")
        os.close(ready)
        if hurt:
            hurt()
        code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT  # before the command has begun, or after it has ended
        print("the signal came before the command, or after it", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            with suppress(BaseException):
                sys.stdout.flush()
                atexit._run_exitfuncs()
        finally:  # a signal that comes just now must not let this process go on as its parent
            os._exit(code)


def waited(child: int, number: int, signal_at: float, limit: float) -> int | None:
    """The status with which a process ends, to which a signal is sent at a time; None where it has
    to be ended at the limit."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        now = time.monotonic()
        if number and now >= signal_at:
            os.kill(child, number)
            number = 0
        if now >= limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(POLL_SECONDS)


def group_ends(group: int) -> bool:
    """Whether all processes of a group end in time; those that do not are ended."""
    limit = time.monotonic() + GONE_SECONDS
    while living(group):
        if time.monotonic() >= limit:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            return False
        time.sleep(POLL_SECONDS)
    return True


def living(group: int) -> list[int]:
    """The processes of a group, without those that have ended and were not waited for."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return []
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group_of_it = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group_of_it) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found
