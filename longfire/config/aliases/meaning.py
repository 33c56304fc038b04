"""What a spelling of an earlier framework may mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longfire.launch import LauncherWord

OFF = ("false", "off", "no", "0")


@dataclass(frozen=True)
class Refused:
    """No such thing here. harmless: values that ask for nothing. accepted: whether the other
    spellings of the same place make any value harmless."""

    reason: str
    harmless: tuple[str, ...] = OFF
    accepted: Callable[[Mapping[str, str]], bool] | None = None


@dataclass(frozen=True)
class Dropped:
    """Sets nothing here, whatever its value. bare: what the flag without a value means."""

    reason: str
    bare: str = ""


# A function that translates the value
Translation = Callable[[str], Mapping[str, object]]


@dataclass(frozen=True)
class WithOthers:
    """A translation of the value that needs other spellings of the same place too: it is given all
    of them, by spelling. link_text: what stands between the spelling and its meaning in the
    sentence that is logged.
    """

    meaning: Callable[[str, Mapping[str, str]], Mapping[str, object]]
    link_text: str = "is now"


@dataclass(frozen=True)
class Started:
    """What a launcher decides, which a setting cannot change: accepted where it agrees with what
    was started."""

    word: LauncherWord


# A setting of ours by its key, a refusal, nothing, or a translation
Old = str | Refused | Dropped | Translation | WithOthers | Started


IN_CONFIG = (
    "the config of a model is in the file that model.config names, or in [model] of the recipe"
)


FLOAT16 = (
    "training in float16 needs a scale of the loss that follows the gradients, which fall below "
    "its smallest numbers; that is not here. Write bfloat16, which has the range of float32 at the "
    "same cost and needs none, or float32 where the device does not multiply bfloat16"
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
