"""Signals at a random moment of a command: what it ends with, and that the next start goes on."""

import json
import random
import signal
from pathlib import Path

from tests.faults.damage import Kind
from tests.faults.forked import run_forked
from tests.faults.workplace import (
    COMMANDS,
    assert_message,
    assert_recovers,
    facts_of,
    kept,
    make_workplace,
    some_command,
)

CASE = "case.json"
# The exit codes of a command that a signal ends. A signal that comes before the command handles it,
# or after that, ends the process itself.
CODES = {
    signal.SIGTERM: (0, 128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (0, 128 + signal.SIGINT),
    signal.SIGKILL: (0, -signal.SIGKILL),
}


def damage_signals(folder: Path, chance: random.Random) -> None:
    """Choose a command, a signal, and the moment of it."""
    command = some_command(folder, chance)
    seconds = facts_of(folder)[command]["seconds"]
    case = {
        "command": command,
        "number": chance.choice(list(CODES)),
        "delay_seconds": chance.uniform(0, seconds),
    }
    (folder / CASE).write_text(json.dumps(case))


def read_signals(folder: Path) -> None:
    case = json.loads((folder / CASE).read_text())
    name = case["command"]
    before = kept(folder, COMMANDS[name])
    ended = run_forked(
        COMMANDS[name].words,
        folder,
        number=case["number"],
        delay_seconds=case["delay_seconds"],
    )
    assert_message(ended, CODES[case["number"]])
    assert_recovers(folder, name, before)


SIGNALS_KIND = Kind(make_workplace, damage_signals, read_signals)
