"""The progress of token stores that are being filled: a bar on a terminal, else a line now and
then."""

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from rich.progress import BarColumn, Progress, TimeRemainingColumn

from longfire.data.documents import Documents
from longfire.data.jobs import Job
from longfire.plain_console import plain_column, plain_console

logger = logging.getLogger(__name__)

NOTE_SECONDS = 30.0  # between lines of progress where no bar can be shown


class Filler(Protocol):
    """One store that is being filled."""

    job: Job
    documents: Documents

    def tokens(self) -> int: ...


class FillProgress:
    """Shows tokens, bytes and speed. A context manager."""

    def __init__(self, fillers: Sequence[Filler]) -> None:
        self.fillers = fillers
        self.names = ", ".join(filler.job.source.name for filler in fillers)
        sizes = [filler.job.source.bytes_total for filler in fillers]
        self.bytes_total = sum(sizes) if all(sizes) else None
        self.tokens_before = self._tokens()
        self.bytes_before = self._bytes_read()
        self.started_at = time.monotonic()
        self.noted_at = self.started_at
        console = plain_console(stderr=True)
        self.bar = Progress(
            plain_column("tokenize {task.description}"),
            BarColumn(),
            plain_column("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(
            self.names, total=self.bytes_total, completed=self.bytes_before, speed=""
        )

    def __enter__(self) -> "FillProgress":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def _tokens(self) -> int:
        return sum(filler.tokens() for filler in self.fillers)

    def _bytes_read(self) -> int:
        size = 0
        for filler in self.fillers:
            size += filler.documents.bytes_read
        return size

    def update(self) -> None:
        """Show how far the stores are now."""
        tokens = self._tokens()
        size = self._bytes_read()
        now = time.monotonic()
        seconds = max(now - self.started_at, 1e-9)
        speed = (tokens - self.tokens_before) / seconds
        text = f"{tokens / 1e6:.1f}M tokens, {size / 1e6:.0f} MB, {speed / 1e6:.2f}M tokens/s"
        self.bar.update(self.task, completed=size, speed=text)
        if self.bar.disable and now - self.noted_at > NOTE_SECONDS:
            self.noted_at = now
            logger.info(f"data: {self.names}: {text}{self._time_left(seconds, size)}")

    def _time_left(self, seconds: float, size: int) -> str:
        """`, 90 s left`; "" where it is not known."""
        if not self.bytes_total:
            return ""
        left = seconds * (self.bytes_total - size) / max(size - self.bytes_before, 1)
        if not left:
            return ""
        return f", {left:.0f} s left"
