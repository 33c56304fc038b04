"""The process of a run and its surroundings: how many there are, what asks it to stop, what ends it
when it hangs.

The only reader and writer of os.environ: everything else is a setting.
"""

import atexit
import faulthandler
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from longfire.config.settings import Comm
from longfire.errors import SettingsError, TrainingError

# What signal.signal takes and returns
Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

# Where a launcher says which process this is: torchrun's names, then Slurm's. SLURM_NTASKS is not
# among them: a batch script sees it too, and may start one process only.
NAMES = {
    "size": ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    "rank": ("RANK", "SLURM_PROCID"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID"),
}
# What only a launcher can decide, and users of earlier frameworks write as a setting
LauncherWord = Literal[
    "processes of this machine", "machines", "number of this machine", "meeting point"
]
STDERR = 2  # the file descriptor: it needs no Python object that a hang might hold
GRACE_SECONDS = 15  # after which the hang is taken to hold the interpreter itself


@dataclass(frozen=True)
class World:
    """The processes that run this program together, and which this one is: of all, and of those on
    its machine."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ALONE = World()


def data_folder() -> Path | None:
    """The folder that DATA_DIR of the environment names, as in flash-attention: data with relative
    names are also looked for there, and token stores are kept there. None without it."""
    name = os.environ.get("DATA_DIR", "")
    if not name:
        return None
    return Path(name).expanduser().absolute()


def world() -> World:
    """What the launcher says. Raises SettingsError where it cannot be."""
    names = next((names for names in zip(*NAMES.values()) if names[0] in os.environ), ("",))
    source, *_ = names
    size = number(source, 1)
    if size <= 1:
        return ALONE
    _, rank_name, local_name = names
    for name in (rank_name, "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise SettingsError(
                f"{source} = {size} in the environment means several processes, but {name} is "
                "not set: start them with scripts/train.sh or torchrun (see "
                "docs/parallelism.md), or unset it for one process"
            )
    rank = number(rank_name, 0)
    if rank >= size:
        raise SettingsError(
            f"{rank_name} = {rank} in the environment, but {source} = {size}: ranks count from 0"
        )
    for ours, theirs in (("RANK", rank), ("WORLD_SIZE", size)):
        os.environ[ours] = str(theirs)  # torch reads these names only
    sees_its_own_gpu = (
        local_name.startswith("SLURM") and os.environ.get("SLURM_GPUS_PER_TASK") == "1"
    )
    return World(size, rank, 0 if sees_its_own_gpu else number(local_name, 0))


def number(name: str, default: int) -> int:
    """A number of the environment. Raises SettingsError if it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise SettingsError(
            f"{name} = {value!r} in the environment is not a number of processes; unset it"
        )
    return int(value)


def is_another_process() -> bool:
    """Whether a launcher says that this is not the first of several processes."""
    return os.environ.get("RANK", "0") != "0"


def started(word: LauncherWord) -> str:
    """What the launcher has decided of this, as text."""
    size = number("WORLD_SIZE", 1)
    here = number("LOCAL_WORLD_SIZE", size)
    if word == "processes of this machine":
        return str(here)
    if word == "machines":
        return str(number("GROUP_WORLD_SIZE", -(-size // here)))
    if word == "number of this machine":
        return str(number("GROUP_RANK", 0))
    return meeting_point()


def agrees(word: LauncherWord, value: str) -> bool:
    """Whether a word of a launcher says what was started; one machine may name any meeting
    point."""
    if word == "meeting point":
        return started("machines") == "1" or value in meeting_point().rpartition(":")
    return value == started(word)


def meeting_point() -> str:
    """Where the processes of a run find each other."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def attempt() -> int:
    """Which start of the run this is, where torchrun starts all again after one has died
    (--max-restarts)."""
    return number("TORCHELASTIC_RESTART_COUNT", 0)


def record_collectives(count: int) -> None:
    """torch's flight recorder keeps the last so many collectives of each process and writes them
    when one hangs (NCCL only)."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(count))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def offline() -> bool:
    """Whether the Hugging Face hub may not be asked (HF_HUB_OFFLINE, which its own libraries heed
    as well)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def stay_offline() -> None:
    """From here on nothing is fetched: neither by the hub's libraries, which must not be imported
    yet, nor by what this process starts."""
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_EVALUATE_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    ):
        os.environ[name] = "1"


def no_color() -> bool:
    """https://no-color.org: any value that is not empty."""
    return bool(os.environ.get("NO_COLOR"))


def wandb_run() -> dict[str, str]:
    """What the environment says about the W&B run, as arguments of wandb.init; it wins over the
    settings."""
    names = {
        "WANDB_PROJECT": "project",
        "WANDB_NAME": "name",
        "WANDB_RUN_ID": "id",
        "WANDB_MODE": "mode",
    }
    given = {argument: os.environ[name] for name, argument in names.items() if os.environ.get(name)}
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        given["mode"] = "disabled"
    return given


def cxx_compiler() -> str | None:
    """A C++ compiler that torch.compile can use on this CPU, None without one or without Python's
    headers, which it includes.

    torch looks at CXX and else for one name only; a compiler of another name is given to it by
    setting CXX.
    """
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            os.environ.setdefault("CXX", found)
            return found
    return None


class StopRequest:
    """`requested` turns true on SIGTERM or SIGINT, for the loop to finish its step; a second SIGINT
    ends the process at once. A second SIGTERM does not: launchers send it to themselves and to
    those they have started, who pass it on.

    In a thread other than the main one nothing is caught: Python lets only the main thread do that.
    """

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = 0
        self.before: dict[int, Handler] = {}
        self.woken_before = -1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # off, since `terminable`, whose it is, would not wait for a save
            self.woken_before = signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            signal.set_wakeup_fd(self.woken_before)

    def ask(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGTERM:
            return
        if self.requested:
            write_to_stderr(
                f"{signal.Signals(number).name} again: stopping at once; the newest complete "
                "checkpoint stays"
            )
            os._exit(128 + number)
        self.requested = True
        self.exit_code = 128 + number
        write_to_stderr(
            f"{signal_name(self.exit_code)}: finishing this step or ending an evaluation, then "
            "saving (Ctrl-C again: stop at once)"
        )


def signal_name(exit_code: int) -> str:
    """Of the exit code with which a process ends that a signal stopped."""
    return signal.Signals(exit_code - 128).name


class Watchdog:
    """Ends a process that hangs: a message, the stack of every thread, exit code of TrainingError.

    From entering until the first `step_done()` comm.init_timeout_seconds are allowed, between two
    of them comm.train_timeout_seconds; 0 allows for ever. A thread watches; should the hang hold
    the interpreter's lock, faulthandler's own timer, which needs no lock, prints the stacks and
    exits (code 1) GRACE_SECONDS later.
    """

    def __init__(
        self, comm: Comm, what: str = "to finish a step", grace_seconds: float = GRACE_SECONDS
    ) -> None:
        self.limits = {"init": comm.init_timeout_seconds, "train": comm.train_timeout_seconds}
        self.phase = "init"
        self.last = time.monotonic()
        self.what = what
        self.grace_seconds = grace_seconds
        self.look = threading.Event()
        self.over = False

    def __enter__(self) -> "Watchdog":
        self.last = time.monotonic()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.look.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def step_done(self) -> None:
        """The run moves: count anew. Costs a microsecond."""
        self.last = time.monotonic()
        if self.phase == "init":
            self.phase = "train"
            self.look.set()  # its limit may be shorter than what the thread sleeps for

    def watch(self) -> None:
        while not self.over:
            limit = self.limits[self.phase]
            left = None
            faulthandler.cancel_dump_traceback_later()
            if limit:
                left = self.last + limit - time.monotonic()
                if left <= 0:
                    self.end(limit)
                self.set_second_timer(left + self.grace_seconds)
            self.look.wait(left)
            self.look.clear()

    def set_second_timer(self, seconds: float) -> None:
        """Let faulthandler end the process after so many seconds; not where the system refuses it
        the thread or the memory that it needs, since training goes on without it."""
        with suppress(RuntimeError):
            faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)

    def end(self, limit: int) -> None:
        write_to_stderr(
            f"{limit} s were not enough {self.what} (comm.{self.phase}_timeout_seconds): the run "
            "hangs. The stack of every thread follows. The newest whole checkpoint stays, and "
            "the same command resumes from it; raise the limit if it may take so long."
        )
        faulthandler.dump_traceback(all_threads=True, file=STDERR)
        os._exit(TrainingError.exit_code)


def end_process(exit_code: int) -> NoReturn:
    """End this process with an exit code, after everything that is to run at exit.

    One of several processes ends without taking its interpreter down. A thread of the
    communication library may still release a tensor, for which it takes the lock of the
    interpreter; if that is being taken down, the thread aborts the process ("terminate called
    without an active exception") and a launcher sees a failure of a run that has ended well.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(exit_code)
    atexit._run_exitfuncs()
    with suppress(OSError):  # whoever reads them may have ended before
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def write_to_stderr(message: str) -> None:
    """To standard error, whole and at once: these messages come from signal handlers and just
    before an exit. Nowhere if it cannot be written, since what follows matters more: its reader may
    have got the same signal, as in `longfire train 2>&1 | tee log`."""
    with suppress(OSError):
        os.write(STDERR, f"longfire: {message}\n".encode())
