"""All stages of `longfire gpu-check`: a table row on the console and a JSON line in the file after
each, within the time that was given."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from longfire.errors import MachineError, SettingsError
from longfire.gpu_check import facts, goals
from longfire.gpu_check.processes import Ended, run_stage, starter
from longfire.gpu_check.stage import Outcome, Stage
from longfire.gpu_check.stages import STAGES
from longfire.json_types import JsonObject
from longfire.plain_console import plain_console
from longfire.plural import duration

STYLES = {"ok": "green", "skipped": "yellow", "wrong": "bold red", "failed": "bold red"}
LIMIT_FACTOR = 3  # of its estimate: after so long a stage is taken for one that hangs
# Seconds; by whether sizes are small: then nothing is timed, and a machine may have much else to do
LEAST_LIMIT = {False: 60, True: 600}
SHOWN_PROBLEMS = 8  # of a stage, on the console; the file has all
WIDTHS = (28, 8, 7)  # of the table's columns: stage, state, seconds


@dataclass
class Check:
    """One run of the check.

    output: JSON lines are appended to it. stages: the first is `facts`, which says what device is
    here. is_small: small sizes; a machine without a GPU has them in any case.
    """

    output: Path
    minutes: float
    is_small: bool
    stages: Sequence[Stage] = STAGES
    console: Console = field(default_factory=lambda: plain_console(highlight=False, soft_wrap=True))
    computes: bool = True
    lines: list[JsonObject] = field(default_factory=list)

    def run(self) -> int:
        """Run the stages; 0 if nothing is wrong, else 1. Raises MachineError where the output
        cannot be written, at the start or later."""
        begun = time.monotonic()
        self.begin()
        context = starter()
        for stage in self.stages:
            left = 60 * self.minutes - (time.monotonic() - begun)
            estimate = stage.estimate(self.is_small)
            if estimate > left and self.lines:
                self.skip(stage, left)
                continue
            limit = min(
                max(LEAST_LIMIT[self.is_small], LIMIT_FACTOR * estimate), max(left, estimate)
            )
            self.add(stage.name, run_stage(context, stage, self.is_small, limit))
        self.add("summary", goals.summary(self.lines))
        return int(any(line["state"] in ("wrong", "failed") for line in self.lines))

    def begin(self) -> None:
        """Open the output, and print what will be written where and for how long."""
        self.append("")
        total = sum(stage.estimate(self.is_small) for stage in self.stages)
        self.console.print(
            f"a JSON line after each stage in {self.output.absolute()}; at most "
            f"{duration(60 * self.minutes)}, all stages are estimated to take {duration(total)}"
        )
        self.console.print(columns("stage", "state", "seconds", "found"), style="bold")

    def append(self, text: str) -> None:
        """To the output, whose folder is made. Raises MachineError, on a full disk for example."""
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise MachineError(
                f"--output {self.output} cannot be written: {error.strerror}"
            ) from error

    def skip(self, stage: Stage, left: float) -> None:
        """A stage for which there is no time."""
        estimate = stage.estimate(self.is_small)
        row = f"estimated at {estimate:.0f} s, {max(0.0, left):.0f} s are left: see --minutes"
        self.add(stage.name, Ended("skipped", Outcome(row, {}), 0.0))

    def add(self, name: str, ended: Ended) -> None:
        """Print and write what a stage found, and take over what the facts say."""
        if name == facts.STAGE.name:
            self.take_facts(ended.outcome.numbers)
        outcome = ended.outcome
        line: JsonObject = {
            "stage": name,
            "state": ended.state,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(ended.seconds, 1),
            "small": self.is_small,
            "computes": self.computes,
            "row": outcome.row,
            "problems": list(outcome.problems),
            "missing": list(outcome.missing),
            "numbers": outcome.numbers,
        }
        self.lines.append(line)
        self.append(json.dumps(line) + "\n")
        self.console.print(
            columns(name, ended.state, f"{ended.seconds:.0f}", ""),
            Text(outcome.row or "no outcome", style=STYLES[ended.state]),
        )
        for problem in outcome.problems[:SHOWN_PROBLEMS]:
            self.console.print(f"  {ended.state}: {problem}", style=STYLES["wrong"])
        more = len(outcome.problems) - SHOWN_PROBLEMS
        if more > 0:
            self.console.print(f"  {ended.state}: {more} more, in {self.output}")
        for missing in outcome.missing:
            self.console.print(f"  not looked at: {missing}", style=STYLES["skipped"])

    def take_facts(self, found: JsonObject) -> None:
        """Small sizes where there is no GPU, and what a device that computes nothing shows."""
        self.computes = bool(found.get("computes", True))
        if found.get("device") != "cuda" and not self.is_small:
            self.is_small = True
            total = sum(stage.estimate(True) for stage in self.stages)
            self.console.print(
                f"no GPU here: small sizes (--small), estimated to take {duration(total)}; no "
                "number says anything of a GPU",
                style=STYLES["skipped"],
            )


def columns(*words: str) -> str:
    """A line of the table; the last column is as long as it is."""
    found: list[str] = []
    for word, width in zip(words, WIDTHS):
        found.append(f"{word:<{width}}")
    return " ".join([*found, *words[len(WIDTHS) :]]).rstrip()


def chosen(names: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """The stages whose names begin with one of these words, and `facts`, which comes first; all if
    no word is given. Raises SettingsError."""
    if not names:
        return list(stages)
    for name in names:
        if not any(stage.name.startswith(name) for stage in stages):
            known = ", ".join(stage.name for stage in stages)
            raise SettingsError(f"--only {name}: no such stage; they are: {known}")
    found: list[Stage] = []
    for stage in stages:
        if stage is stages[0] or stage.name.startswith(tuple(names)):
            found.append(stage)
    return found
