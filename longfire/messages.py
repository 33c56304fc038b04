"""Messages for the user of a run, by Python's logging.

A module logs to `logging.getLogger(__name__)`, which is below the logger "longfire". The commands
show what is logged (`show_messages`); a program that uses longfire as a library sees nothing until
it asks for it, by `show_messages` or by handlers of its own.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = logging.getLogger("longfire")
# Characters that move the cursor, change colours or turn the direction of what follows.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters other than line ends and tabs as escapes (\\x1b): names
    and texts from outside could otherwise command the terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ConsoleHandler(logging.Handler):
    """Messages on stdout as they are, warnings on stderr. Unlike logging's own handlers it looks
    the streams up for each message, and lets a closed pipe end the program."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(self.format(record))
        if record.levelno >= logging.WARNING:
            print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
        else:
            print(text, flush=True)


CONSOLE = ConsoleHandler()


def show_messages(is_first_process: bool = True) -> None:
    """Show the messages of longfire on the console; of all processes of a run, the first one
    shows them."""
    ROOT.addHandler(CONSOLE)
    log_in_first_process(is_first_process)


def log_in_first_process(is_first_process: bool) -> None:
    """Let the first process of a run log, and the others only what is an error: they all would
    say the same."""
    ROOT.setLevel(logging.INFO if is_first_process else logging.ERROR)


@contextmanager
def nothing_logged() -> Iterator[None]:
    """Inside, what is no error is not logged: it is logged elsewhere."""
    level = ROOT.level
    ROOT.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ROOT.setLevel(level)
