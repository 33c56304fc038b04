"""Errors of the file system: the nth call of a kind fails in a command, once or from then on."""

import atexit
import errno
import io
import json
import os
import random
import shutil
from operator import attrgetter
from pathlib import Path
from unittest import mock

from tests.faults.damage import Kind
from tests.faults.forked import run_forked
from tests.faults.workplace import (
    COMMANDS,
    assert_message,
    assert_recovers,
    kept,
    make_workplace,
    some_command,
)

CASE = "case.json"
COUNTS = "counts.json"
READING = (errno.EACCES, errno.EIO, errno.EMFILE)
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
REMOVING = (errno.EROFS, errno.EACCES, errno.EIO)
# The calls that may fail, and how
ERRORS = {
    "io.open": (*READING, *WRITING),
    "os.open": (*READING, *WRITING),
    "os.fsync": (errno.EIO, errno.ENOSPC),
    "os.rename": WRITING,
    "os.replace": WRITING,
    "os.mkdir": WRITING,
    "os.unlink": REMOVING,
    "os.rmdir": REMOVING,
    "os.scandir": READING,
    "os.listdir": READING,
    "os.stat": (errno.EACCES, errno.EIO),
    "fcntl.flock": (errno.ENOLCK, errno.EIO),
}
HAS_DESCRIPTOR = ("os.fsync", "fcntl.flock")


class Calls:
    """Calls of one kind that concern the folder of the process are counted; number `fails_at`
    fails, or with `lasts` all from it on. 0: none fails."""

    def __init__(self, name: str, fails_at: int = 0, number: int = 0, lasts: bool = False) -> None:
        self.name = name
        self.fails_at = fails_at
        self.number = number
        self.lasts = lasts
        self.count = 0
        self.folder = os.getcwd()
        self.call = (
            io.open if name == "io.open" else attrgetter(name.split(".")[1])(module_of(name))
        )

    def start(self) -> "Calls":
        """From here on the calls are counted."""
        mock.patch(self.name, self.instead).start()
        if self.name == "io.open":
            mock.patch("builtins.open", self.instead).start()
        return self

    def instead(self, *arguments: object, **options: object) -> object:
        if arguments and self.concerns(arguments[0]):
            self.count += 1
            if self.count == self.fails_at or (self.lasts and self.count > self.fails_at > 0):
                place = str(arguments[0]) if isinstance(arguments[0], str | Path) else None
                raise OSError(self.number, os.strerror(self.number), place)
        return self.call(*arguments, **options)

    def concerns(self, place: object) -> bool:
        """Whether a path is in the folder; where a descriptor leads is not asked for."""
        if isinstance(place, str | Path):
            return not os.path.isabs(place) or str(place).startswith(self.folder)
        return self.name in HAS_DESCRIPTOR


def module_of(name: str) -> object:
    import fcntl

    return {"os": os, "fcntl": fcntl}[name.split(".")[0]]


def make_files(folder: Path) -> None:
    """The workplace, and how many calls of each kind each command makes."""
    make_workplace(folder)
    counts: dict[str, dict[str, int]] = {}
    for name, command in COMMANDS.items():
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        run_forked(command.words, copy, hurt=count_all)
        counts[name] = json.loads((copy / COUNTS).read_text())
        shutil.rmtree(copy)
    (folder / COUNTS).write_text(json.dumps(counts))


def count_all() -> None:
    """Count the calls of this process, and write the numbers at its end."""
    counted = [Calls(name).start() for name in ERRORS]
    atexit.register(write_counts, counted)


def write_counts(counted: list[Calls]) -> None:
    counts = {calls.name: calls.count for calls in counted}
    Path(COUNTS).write_text(json.dumps(counts))


def damage_files(folder: Path, chance: random.Random) -> None:
    """Choose a command, a call of it, and an error."""
    command = some_command(folder, chance)
    counts = json.loads((folder / COUNTS).read_text())[command]
    name = chance.choice([name for name, count in counts.items() if count])
    case = {
        "command": command,
        "name": name,
        "fails_at": chance.randint(1, counts[name]),
        "number": chance.choice(ERRORS[name]),
        "lasts": chance.random() < 0.3,
    }
    (folder / CASE).write_text(json.dumps(case))


def read_files(folder: Path) -> None:
    case = json.loads((folder / CASE).read_text())
    name = case.pop("command")
    before = kept(folder, COMMANDS[name])

    def hurt() -> None:
        Calls(**case).start()

    ended = run_forked(COMMANDS[name].words, folder, hurt)
    assert_message(ended)
    assert_recovers(folder, name, before)


FILES_KIND = Kind(make_files, damage_files, read_files)
