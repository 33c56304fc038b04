"""A seeded fuzzer of files: `python -m tests.faults.fuzz --kind checkpoint --cases 1000 --seed 7`.

Each case damages or forges one thing and lets longfire read it in this process. It survives where
the result is right, or an error of longfire says what is wrong, in time, nothing is left lying, and
nothing outside the folder has changed. What failed is kept as a folder, to be tried again by hand.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from longfire.plural import duration
from tests.faults.damage import Kind
from tests.faults.fuzz_checkpoint import CHECKPOINT_KIND
from tests.faults.fuzz_commands import COMMANDS_KIND
from tests.faults.fuzz_config import CONFIG_KIND
from tests.faults.fuzz_data import DATA_KIND
from tests.faults.fuzz_export import EXPORT_KIND
from tests.faults.fuzz_files import FILES_KIND
from tests.faults.fuzz_limits import LIMITS_KIND
from tests.faults.fuzz_run import RUN_KIND, TOML_KIND, UNTRUSTED_KIND
from tests.faults.fuzz_settings import SETTINGS_KIND
from tests.faults.fuzz_signals import SIGNALS_KIND
from tests.faults.fuzz_store import STORE_KIND

CPU_SECONDS = 60  # of a case that computes without an end
WAIT_SECONDS = 300  # of a case that waits without an end: a busy machine makes others wait
LINE_CASES = 50  # between two lines of progress


class TooSlow(BaseException):
    """A case did not end in its time."""


KINDS = {
    "run": RUN_KIND,
    "toml": TOML_KIND,
    "checkpoint": CHECKPOINT_KIND,
    "store": STORE_KIND,
    "export": EXPORT_KIND,
    "untrusted": UNTRUSTED_KIND,
    "settings": SETTINGS_KIND,
    "config": CONFIG_KIND,
    "data": DATA_KIND,
    "files": FILES_KIND,
    "signals": SIGNALS_KIND,
    "limits": LIMITS_KIND,
    "commands": COMMANDS_KIND,
}


@contextmanager
def limited() -> Iterator[None]:
    """Raises TooSlow inside when the time of a case is over, of the processor or of the clock."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {CPU_SECONDS} s of work, or than {WAIT_SECONDS} s in all")

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, CPU_SECONDS),
        signal.SIGALRM: (signal.ITIMER_REAL, WAIT_SECONDS),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def failure_of(kind: Kind, folder: Path) -> str:
    """How a case did not survive; "" if it did."""
    try:
        with limited():
            kind.read(folder)
    except (Exception, TooSlow):
        return traceback.format_exc()
    left = [path.name for path in folder.rglob("*.aside*")]
    return f"left lying: {left}" if left else ""


class Tried(NamedTuple):
    """How many cases were tried, and how those failed that did not survive."""

    cases: int
    failures: list[str]


def fuzz(
    name: str,
    cases: int,
    seed: int,
    place: Path,
    kept: Path | None = None,
    until: float = float("inf"),
) -> Tried:
    """Try the cases of a kind in a folder, up to a time of the monotonic clock. Failures are
    printed at once."""
    kind = KINDS[name]
    base = place / "base"
    kind.make(base)
    tried = Tried(0, [])
    begun = time.monotonic()
    for number in range(cases):
        if time.monotonic() >= until:
            break
        failure = failure_of_case(kind, base, random.Random(f"{seed} {number}"))
        tried = Tried(number + 1, tried.failures)
        damaged = place / "damaged"
        if failure:
            tried.failures.append(f"{name}, seed {seed}, case {number}: {failure}")
            print(tried.failures[-1], file=sys.stderr, flush=True)
        if failure and kept:
            shutil.move(damaged, kept / f"{name}-{seed}-{number}")
        shutil.rmtree(damaged, ignore_errors=True)
        report_progress(name, tried, cases, time.monotonic() - begun)
    return tried


def report_progress(name: str, tried: Tried, cases: int, seconds: float) -> None:
    """A line now and then. No bar: a thread that draws it would be there when a case forks."""
    if tried.cases % LINE_CASES == 0 and tried.cases < cases:
        left = duration(seconds * (cases - tried.cases) / tried.cases)
        failed = len(tried.failures)
        line = f"{name}: {tried.cases} of {cases} tried, {failed} failed, {left} left"
        print(line, file=sys.stderr, flush=True)


def failure_of_case(kind: Kind, base: Path, chance: random.Random) -> str:
    """Damage a copy of the base, keep a copy of that as `damaged`, and read it; how that failed."""
    folder = base.with_name("step-4")
    shutil.copytree(base, folder)
    kind.damage(folder, chance)
    damaged = base.with_name("damaged")
    shutil.copytree(folder, damaged, symlinks=True, copy_function=copy_if_regular)
    failure = failure_of(kind, folder)
    shutil.rmtree(folder)
    return failure


def copy_if_regular(source: str, target: str) -> None:
    """Copy a file; a FIFO or socket would be waited for."""
    if os.path.isfile(source):
        shutil.copy(source, target)


def main() -> int:
    """Print what was tried and what survived; the exit code is 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then no more cases")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), metavar="FOLDER")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as place:
        tried = fuzz(options.kind, options.cases, options.seed, Path(place), options.keep, until)
    survived = tried.cases - len(tried.failures)
    print(f"{options.kind}: {tried.cases} tried, {survived} survived, seed {options.seed}")
    if not tried.failures and not any(options.keep.iterdir()):
        options.keep.rmdir()
    return int(bool(tried.failures))


if __name__ == "__main__":
    sys.exit(main())
