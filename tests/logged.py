"""What longfire logs, as lists of messages that tests can look at."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from longfire.messages import ROOT


class ListHandler(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def logged_to(messages: list[str]) -> Iterator[list[str]]:
    """Inside, every message of longfire is appended to the list, warnings without a prefix."""
    handler = ListHandler(messages)
    level = ROOT.level
    ROOT.addHandler(handler)
    ROOT.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        ROOT.removeHandler(handler)
        ROOT.setLevel(level)


@contextmanager
def nothing_logged() -> Iterator[None]:
    """Inside, no message is expected."""
    with logged_to([]) as messages:
        yield
    assert not messages, messages
