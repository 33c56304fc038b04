"""metrics.jsonl: one record a line, written at once and read from either end."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longfire.errors import CheckpointError
from longfire.listing import exists
from longfire.own_files import json_of
from longfire.plural import counted
from longfire.regular_files import open_regular, open_without_link

METRICS = "metrics.jsonl"
BLOCK_BYTES = 1 << 16  # of metrics.jsonl that are read at a time from its end

# The numbers of a step or of an evaluation, by name
Values = Mapping[str, float]


class RecordFile:
    """metrics.jsonl: one JSON object a line, flushed at once, in the order of steps, each step
    once.

    A step and its evaluation are two lines. A line of the same step and fields as the one before it
    replaces it: so the last evaluation of a finished run stands there once, however often the run
    is started again.

    unreadable: how many lines no record could be read from; they stay where they are.
    has_evaluation: whether there is one of start_step.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.last: tuple[int, frozenset[str]] | None = None
        self.last_at = 0
        self.unreadable = 0
        self.has_evaluation = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if exists(path):
                self.cut(start_step)
            self.file = open_without_link(path, "a+b")
        except OSError as error:
            raise self.unwritable(error) from error

    def write(self, step: int, values: Values) -> None:
        record = {"step": step, **{key: plain(value) for key, value in values.items()}}
        fields = (step, frozenset(record))
        try:
            if fields == self.last:
                self.file.truncate(self.last_at)
            self.last = fields
            self.last_at = self.file.seek(0, 2)
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise self.unwritable(error) from error

    def cut(self, start_step: int) -> None:
        """Leave out the records of later steps, and an end that a kill broke off. What cannot be
        read says no step: it stays."""
        kept_from: int | None = None  # where the first line lies that is left out
        after: list[bytes] = []  # lines behind it that stay
        at = 0
        with open_without_link(self.path, "r+b") as file:
            for line in file:
                record = parsed(line)
                is_kept = line.endswith(b"\n") and (record is None or record["step"] <= start_step)
                if is_kept:
                    self.look_at(record, at, start_step)
                    at += len(line)
                    if kept_from is not None:
                        after.append(line)
                elif kept_from is None:
                    kept_from = at
            if kept_from is None:
                return
            file.seek(kept_from)
            file.writelines(after)
            file.truncate()

    def look_at(self, record: dict[str, Any] | None, at: int, start_step: int) -> None:
        """Take note of a line that stays; `at`: where it begins."""
        if record is None:
            self.unreadable += 1
            self.last = None
            return
        self.last = (record["step"], frozenset(record))
        self.last_at = at
        self.has_evaluation |= record["step"] == start_step and is_evaluation(record)

    def close(self) -> None:
        self.file.close()

    def unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written: {error.strerror}. Free some space or name another "
            "job.dump_folder; the same command resumes from the newest whole checkpoint"
        )


def is_evaluation(record: Mapping[str, object]) -> bool:
    return any(key.startswith("eval/") for key in record)


def opened(path: Path) -> BinaryIO:
    """A metrics.jsonl for reading. Raises CheckpointError."""
    try:
        return open_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; restore it from a copy, or remove it"
        ) from error


def records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a metrics.jsonl in its order; None for a line that none can be read from. A
    line that is being written right now is left out."""
    with opened(path) as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield parsed(line)


def last_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records that can be read, from the end of the file to its beginning; what is not asked
    for is not read."""
    with opened(path) as file:
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            rest = lines.pop(0) if start else b""
            yield from filter(None, map(parsed, reversed(lines)))
            end = start


def unreadable_line(path: Path, count: int) -> str:
    return (
        f"{path}: {counted(count, 'line')} cannot be read; what they held is missing "
        "from curves and tables"
    )


def parsed(line: bytes | str) -> dict[str, Any] | None:
    """The record in a whole line of metrics.jsonl, else None."""
    try:
        record = json_of(line, dict[str, float | None])
    except ValueError:
        return None
    is_step = isinstance(record.get("step"), int)
    return {**record} if is_step else None


def plain(value: float) -> float | None:
    if math.isfinite(value):
        return value
    return None
