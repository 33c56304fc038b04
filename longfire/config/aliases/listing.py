"""The spellings of each earlier system and what they mean here, as rows of a table."""

import re
from collections.abc import Callable, Mapping
from inspect import cleandoc
from typing import NamedTuple

from longfire.config.aliases.earlier_longfire import EARLIER_LONGFIRE
from longfire.config.aliases.flame_accelerate import FLAME_ACCELERATE
from longfire.config.aliases.flame_torchtitan import FLAME_TORCHTITAN
from longfire.config.aliases.flash_attention import FLASH_ATTENTION
from longfire.config.aliases.meaning import Dropped, Old, Refused, Started, WithOthers
from longfire.config.aliases.ring_attention import RING_ATTENTION

SYSTEMS: dict[str, Mapping[str, Old]] = {
    "flame-accelerate": FLAME_ACCELERATE,
    "flame-torchtitan": FLAME_TORCHTITAN,
    "flash-attention": FLASH_ATTENTION,
    "ring-attention": RING_ATTENTION,
    "earlier-longfire": EARLIER_LONGFIRE,
}
REFUSED = "refused"
NOT_NEEDED = "not needed"
BY_VALUE = "by its value"
LAUNCHER = "the launcher"


class Row(NamedTuple):
    """A spelling, what is here instead of it, and why.

    setting: our key, "" where the spelling is none. state: what becomes of the spelling then.
    accepted: values of a refused spelling that ask for nothing.
    """

    spelling: str
    setting: str = ""
    state: str = ""
    why: str = ""
    accepted: tuple[str, ...] = ()


def row_of(spelling: str, meaning: Old) -> Row:
    """The row of a spelling."""
    if isinstance(meaning, str):
        return Row(spelling, setting=meaning)
    if isinstance(meaning, Refused):
        accepted = tuple(value for value in meaning.harmless if value)
        return Row(spelling, state=REFUSED, why=meaning.reason, accepted=accepted)
    if isinstance(meaning, Dropped):
        return Row(spelling, state=NOT_NEEDED, why=meaning.reason)
    if isinstance(meaning, Started):
        why = f"accepted where it is what was started ({meaning.word}); scripts/train.sh takes it"
        return Row(spelling, state=LAUNCHER, why=why)
    function = meaning.meaning if isinstance(meaning, WithOthers) else meaning
    return Row(spelling, state=BY_VALUE, why=sentence_of(function))


def sentence_of(function: Callable[..., object]) -> str:
    """What the docstring of a translation says, without the number of a feature and its errors."""
    first = cleandoc(function.__doc__ or "").split("\n\n")[0]
    first = re.sub(r"\s*Raises \w+[^.]*\.", "", first)
    return re.sub(r"^S\d[-\d, S]*(?:to S\d-\d+)?[:.]?\s*", "", " ".join(first.split()))


def rows_of(system: str) -> list[Row]:
    """A row for each spelling of a system."""
    return [row_of(spelling, meaning) for spelling, meaning in SYSTEMS[system].items()]
