"""The progress of long work: a bar on a terminal, elsewhere a line now and then, both with the time
that is left."""

import logging
import time
from collections.abc import Callable

from rich.progress import BarColumn, Progress, TimeRemainingColumn

from longfire.plain_console import plain_column, plain_console
from longfire.plural import duration

logger = logging.getLogger(__name__)

FIRST_SECONDS = 10.0  # before the first line where no bar can be shown
NOTE_SECONDS = 30.0  # between the lines that follow


class WorkProgress:
    """Shows how much of some work is done, and how long the rest will take at the speed so far. A
    context manager.

    what: the work, in a word or two. total: of the work, in `unit`.
    """

    def __init__(
        self,
        what: str,
        total: float,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.clock = clock
        self.started_at = clock()
        self.next_line_at = self.started_at + FIRST_SECONDS
        console = plain_console(stderr=True)
        self.bar = Progress(
            plain_column("{task.description}"),
            BarColumn(),
            plain_column("{task.fields[amount]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(what, total=total, amount="")

    def __enter__(self) -> "WorkProgress":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def add(self, amount: float) -> None:
        """So much more is done."""
        self.done += amount
        text = f"{self.done:,.0f} of {self.total:,.0f} {self.unit}"
        self.bar.update(self.task, completed=self.done, amount=text)
        now = self.clock()
        if self.bar.disable and now >= self.next_line_at and self.done < self.total:
            self.next_line_at = now + NOTE_SECONDS
            logger.info(f"{self.what}: {text}, {self.time_left(now)} left")

    def time_left(self, now: float) -> str:
        """At the speed so far, as `3 min 20 s`."""
        return duration((now - self.started_at) * (self.total - self.done) / max(self.done, 1e-9))
