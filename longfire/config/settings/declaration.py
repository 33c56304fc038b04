"""How a setting is declared: its default, its help, its interval; and types that several share."""

from dataclasses import field
from typing import Any, Literal

NATURAL, POSITIVE, SHARE = "[0, inf)", "[1, inf)", "[0, 1]"  # intervals that many settings share


# Limits of what any machine can do: more threads or processes end in a crash of the system's
# libraries, and longer waits overflow its timers.
WORKERS = "[0, 1024]"
SECONDS_TO_WAIT = "[0, 31622400]"  # at most a year


def setting(
    default: Any, help: str, within: str = "", bare: str = "", is_prose: bool = False
) -> Any:
    """A dataclass field with its help; the help is the only documentation of the setting.

    within: the interval of allowed numbers, as mathematics writes it: "[0, 1)". bare: what the flag
    without a value means (booleans: true). is_prose: text that may hold a URL; in every other text
    one is refused (config/paths.py).
    """
    return field(
        default=default,
        metadata={"help": help, "within": within, "bare": bare, "is_prose": is_prose},
    )


# The files of parallel/context_strategies
ContextStrategyName = Literal["ring", "allgather", "alltoall"]

# which parts of a block are recomputed in the backward
Remat = Literal["none", "block", "mlp", "attention", "attention+mlp"]
