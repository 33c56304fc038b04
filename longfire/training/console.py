"""The progress of a run on the console."""

import math
import time
from collections import deque
from collections.abc import Sequence

from rich.progress import BarColumn, Progress

from longfire.config import settings
from longfire.messages import visible
from longfire.plain_console import plain_column, plain_console
from longfire.plural import duration
from longfire.training.records import Values

WINDOW_STEPS = 50  # over which speeds are averaged


class ConsoleLines:
    """Progress, loss, speed and remaining time: one live line in a terminal, and a plain line every
    log_freq anywhere.

    total_steps: of the whole run; 0: not known yet.
    """

    def __init__(self, metrics: settings.Metrics, total_steps: int, start_step: int) -> None:
        self.log_freq = max(1, metrics.log_freq)
        self.total_steps = total_steps
        self.start_step = start_step
        self.rich = plain_console(highlight=False, soft_wrap=True)
        self.steps: deque[Values] = deque(maxlen=WINDOW_STEPS)
        self.times: deque[float] = deque(maxlen=WINDOW_STEPS + 1)
        self.progress: Progress | None = None
        if self.rich.is_terminal and not metrics.disable_color_printing:
            columns = [
                plain_column("{task.fields[place]}"),
                BarColumn(None),
                plain_column("{task.fields[numbers]}"),
            ]
            self.progress = Progress(*columns, console=self.rich, refresh_per_second=2)

    def open(self) -> None:
        self.times.append(time.monotonic())
        if self.progress:
            self.task = self.progress.add_task(
                "", total=self.total_steps or None, completed=self.start_step, place="", numbers=""
            )
            self.progress.start()

    def expect(self, total_steps: int) -> None:
        self.total_steps = total_steps
        if self.progress:
            self.progress.update(self.task, total=total_steps)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()

    def print(self, text: str) -> None:
        text = visible(text)
        if self.progress:
            self.rich.print(text, markup=False)
        else:
            print(text, flush=True)

    def write(self, step: int, values: Values) -> None:
        if "loss" not in values:
            self.print(evaluation_line(step, values))
            return
        self.steps.append(values)
        self.times.append(time.monotonic())
        if self.total_steps:
            place = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        else:
            place = f"step {step}"
        numbers = self.numbers(step)
        if self.progress:
            self.progress.update(self.task, completed=step, place=place, numbers=numbers)
        if step % self.log_freq == 0 or step in (self.start_step + 1, self.total_steps):
            self.print(f"{place}  {numbers}")

    def numbers(self, step: int) -> str:
        """This step's loss, norm and rate; speed as the mean of the last steps; the time that
        remains at that speed."""
        now = self.steps[-1]
        parts = [f"loss {now['loss']:.4f}"]
        if "grad_norm" in now:
            parts.append(f"grad norm {now['grad_norm']:.3g}")
        if "lr" in now:
            parts.append(f"lr {now['lr']:.3g}")
        timed = [step for step in self.steps if {"seconds", "tokens_per_second"} <= step.keys()]
        if sum(step["seconds"] for step in timed) > 0:
            parts.append(f"{mean_over_time(timed, 'tokens_per_second'):,.0f} tokens/s")
            if all("mfu" in step for step in timed):
                parts.append(f"mfu {mean_over_time(timed, 'mfu'):.0%}")
        if now.get("skipped_steps"):
            parts.append(f"{now['skipped_steps']:.0f} skipped")
        if self.total_steps:
            seconds_per_step = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            parts.append(f"{duration(seconds_per_step * max(0, self.total_steps - step))} left")
        return "  ".join(parts)


def mean_over_time(steps: Sequence[Values], name: str) -> float:
    """The mean of a number of several steps, weighted by their seconds."""
    seconds = sum(step["seconds"] for step in steps)
    return sum(step[name] * step["seconds"] for step in steps) / seconds


def evaluation_line(step: int, values: Values) -> str:
    """step 20  validation  wiki: loss 5.1234, bits per byte 2.3100; code: ..."""
    sources: dict[str, list[str]] = {}
    for key, value in values.items():
        source, _, name = key.removeprefix("eval/").rpartition("/")
        text = f"{name} {value:,.0f}" if value == int_of(value) else f"{name} {value:.4f}"
        sources.setdefault(source, []).append(text)
    parts: list[str] = []
    for source, numbers in sources.items():
        before = f"{source}: " if source else ""
        parts.append(before + ", ".join(numbers))
    return f"step {step}  validation  {'; '.join(parts)}"


def int_of(value: float) -> int | None:
    """A finite number without its fraction."""
    if math.isfinite(value):
        return int(value)
    return None
