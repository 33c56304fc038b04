"""What a stage of `longfire gpu-check` is: a name, how long it takes, what it is given, and what it
finds."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longfire.json_types import JsonObject

# What a stage is doing, beside its outcome: all that is left of one that hangs or dies.
DOING_FILE = "doing.txt"


@dataclass(frozen=True)
class Work:
    """What a stage is given: an empty folder, sizes, and its time.

    seconds: that it should take at most; one that measures many things leaves out the last.
    """

    folder: Path
    is_small: bool
    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU where there is none."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def note(self, doing: str) -> None:
        """Keep what is being done."""
        (self.folder / DOING_FILE).write_text(doing, encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What a stage found.

    row: one line for the console. numbers: what a JSON line can hold. problems: what is wrong, a
    line each. missing: what could not be looked at, and why.
    """

    row: str
    numbers: JsonObject
    problems: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


Measure = Callable[[Work], Outcome]


@dataclass(frozen=True)
class Stage:
    """A stage: `measure` runs in a process of its own, so it is a function of a module, or a
    partial of one.

    seconds: an estimate for one GPU. seconds_small: for small sizes on a CPU.
    """

    name: str
    seconds: float
    seconds_small: float
    measure: Measure

    def estimate(self, is_small: bool) -> float:
        """Seconds that it is expected to take."""
        return self.seconds_small if is_small else self.seconds
