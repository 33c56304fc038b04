"""An error of one measurement is a finding, whatever its class, and the next one runs."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from longfire.errors import first_line

logger = logging.getLogger(__name__)

SHOWN = 200  # characters of an error


@contextmanager
def noted(problems: list[str], what: str) -> Iterator[None]:
    """An exception inside becomes a line in `problems`; its traceback goes to the log.

    what: the measurement, which the line begins with.
    """
    try:
        yield
    except Exception as error:
        problems.append(f"{what}: {type(error).__name__}: {first_line(error, SHOWN)}")
        logger.error(f"{what}\n{traceback.format_exc()}")
