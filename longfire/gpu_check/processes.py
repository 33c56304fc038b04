"""A stage in a process of its own with a time limit, so that neither a hang nor an error of CUDA
that lasts as long as the process ends the check.

Processes are forked from one that has imported torch and has never touched a GPU, since a start
takes seconds.
"""

import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypedDict

from longfire.errors import MachineError
from longfire.gpu_check.findings import noted
from longfire.gpu_check.stage import DOING_FILE, Outcome, Stage, Work
from longfire.json_types import JsonObject
from longfire.launch import signal_name
from longfire.messages import show_messages
from longfire.own_files import read_json

OUTCOME_FILE = "outcome.json"
LOG_FILE = "log.txt"
STDOUT, STDERR = 1, 2  # file descriptors
OWN_SHARE = 0.9  # of the limit: what a stage is given, so that it can leave out the rest and end
LOG_LINES = 30  # the last ones of a stage that died or raised


class Written(TypedDict):
    """An outcome as its process writes it."""

    row: str
    numbers: JsonObject
    problems: list[str]
    missing: list[str]


@dataclass(frozen=True)
class Ended:
    """How a stage ended. state: ok, wrong (it found problems) or failed (it did not end by
    itself, or raised)."""

    state: str
    outcome: Outcome
    seconds: float


def starter() -> ForkServerContext:
    """What starts the processes of stages."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longfire.gpu_check.stages"])
    return context


def run_stage(context: ForkServerContext, stage: Stage, is_small: bool, limit: float) -> Ended:
    """Run a stage for at most `limit` seconds; an error, a crash and a hang are outcomes."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="longfire-gpu-check-") as name:
        folder = Path(name)
        given = OWN_SHARE * limit
        process = context.Process(target=work_on, args=(stage, folder, is_small, given))
        process.start()
        with ended_afterwards(process):
            process.join(limit)
            is_over_time = process.is_alive()
        seconds = time.monotonic() - begun
        if is_over_time:
            problem = f"stopped after {seconds:.0f} s while it was at: {doing(folder)}"
            return failed(folder, problem, seconds)
        if not (folder / OUTCOME_FILE).exists():
            code = process.exitcode or 0
            how = signal_name(128 - code) if code < 0 else f"exit code {code}"
            return failed(folder, f"ended ({how}) while it was at: {doing(folder)}", seconds)
        return ended(folder, seconds)


@contextmanager
def ended_afterwards(process: BaseProcess) -> Iterator[None]:
    """Afterwards neither the process nor one that it has started is alive."""
    try:
        yield
    finally:
        if process.pid is not None:
            end_group(process.pid)
        process.kill()
        process.join()


def end_group(pid: int) -> None:
    """End the processes of a session that a stage has begun; it may not have come to that."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def ended(folder: Path, seconds: float) -> Ended:
    """The outcome that a stage has written."""
    written = read_json(folder / OUTCOME_FILE, Written, MachineError, "run the stage again")
    outcome = Outcome(
        written["row"],
        written["numbers"],
        tuple(written["problems"]),
        tuple(written["missing"]),
    )
    if not outcome.row:  # it raised
        numbers: JsonObject = {"log": last_lines(folder)}
        return Ended("failed", replace(outcome, numbers=numbers), seconds)
    return Ended("wrong" if outcome.problems else "ok", outcome, seconds)


def failed(folder: Path, problem: str, seconds: float) -> Ended:
    """The outcome of a stage that has written none."""
    return Ended("failed", Outcome("", {"log": last_lines(folder)}, (problem,)), seconds)


def last_lines(folder: Path) -> list[str]:
    """What a stage printed last, the traceback of an error among it."""
    log = folder / LOG_FILE
    if not log.exists():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]


def doing(folder: Path) -> str:
    """What a stage was at."""
    file = folder / DOING_FILE
    return file.read_text(encoding="utf-8") if file.exists() else "its start"


def work_on(stage: Stage, folder: Path, is_small: bool, seconds: float) -> None:
    """The process of a stage: its outcome, and in the log all that it prints."""
    os.setsid()  # a session of its own, which ends with all that it has started
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, STDOUT)
    os.dup2(log, STDERR)
    show_messages()
    logging.captureWarnings(True)
    problems: list[str] = []
    outcome = None
    with noted(problems, stage.name):
        outcome = stage.measure(Work(folder, is_small, seconds))
    if outcome is None:
        outcome = Outcome("", {}, tuple(problems))
    written = folder / f"{OUTCOME_FILE}.tmp"
    written.write_text(json.dumps(finite(asdict(outcome))), encoding="utf-8")
    written.replace(folder / OUTCOME_FILE)
    sys.stdout.flush()


def finite(value: object) -> object:
    """The same value for a JSON file: null in the place of numbers that are not finite, text in
    the place of what JSON has not."""
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
