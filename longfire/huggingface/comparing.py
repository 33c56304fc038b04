"""What all comparisons with transformers need: a check that raises, and silence."""

from collections.abc import Iterator
from contextlib import contextmanager

from longfire.errors import CheckpointError


def check(condition: bool, difference: str) -> None:
    """Raises CheckpointError unless the condition holds. A comparison with NaN does not hold."""
    if not condition:
        raise CheckpointError(f"nothing was written: {difference}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no warning that it does not know fla's model types."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    showed_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if showed_bars:
            logging.enable_progress_bar()
