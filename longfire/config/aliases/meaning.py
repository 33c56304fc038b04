"""What a spelling of an earlier framework may mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

OFF = ("false", "off", "no", "0")


@dataclass(frozen=True)
class Refused:
    reason: str
    harmless: tuple[str, ...] = OFF


@dataclass(frozen=True)
class Dropped:
    reason: str


# A setting of ours by its key, a refusal, nothing, or a function that translates the value
Translation = Callable[[str], Mapping[str, object]]
Old = str | Refused | Dropped | Translation

STARTED = (
    "processes are started by scripts/train.sh (NGPU, NNODE, MASTER_ADDR, MASTER_PORT) or "
    "torchrun, not by a setting"
)


IN_CONFIG = (
    "the config of a model is in the file that model.config names, or in [model] of the recipe"
)


FLOAT8 = (
    "not supported yet: no machine with float8 units has shown here that the loss stays what it is"
)


NO_EFFECT = "has no effect in its own system: no code there reads it"


ITSELF = "read from the data itself"


def as_text(value: object) -> str:
    """A TOML value as the command line would spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(as_text, value))
    return str(value)
