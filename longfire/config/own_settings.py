"""The own settings of a mixer or an MLP: its table in a model's config, as its own dataclass."""

import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, TypeGuard

from longfire.errors import SettingsError

# Above what any count of a model config can be: tensors of such sizes cannot be described.
MAX_NUMBER = 2**31 - 1


class Configured(Protocol):
    """A class of layers with settings of its own: a mixer or an MLP."""

    Config: ClassVar[type]


def own_settings(
    owner: type[Configured], name: str, given: dict[str, Any], hidden_size: int
) -> Any:
    """The settings in the table `given` of a layer's part, by the name that the layer has for it.

    Raises SettingsError naming the key, and the nearest name or what is wrong.
    """
    check_table(owner, name, given)
    for field in fields(owner.Config):
        if field.default is MISSING and field.name not in given:
            raise SettingsError(f"model config: {name}.{field.name} is missing")
    config = owner.Config(**given)
    config.check(hidden_size)
    return config


def check_table(owner: type[Configured], name: str, given: dict[str, Any]) -> None:
    """Raises SettingsError for a key that is unknown, or a value of another type."""
    if not isinstance(given, dict):
        raise SettingsError(f"model config: {name} = {given!r} must be a table of its settings")
    known = {field.name: field for field in fields(owner.Config)}
    for key in given:
        if key not in known:
            raise SettingsError(
                f"model config: {name}.{key} is unknown{nearest(key, known)} ({name} has: "
                f"{', '.join(known)})"
            )
        check_type(f"model config: {name}.{key}", given[key], known[key].type)


def nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return ""


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether this is a number that is neither infinite nor larger than floating point holds."""
    if type(value) is int:
        return abs(value) <= MAX_NUMBER
    return type(value) is float and math.isfinite(value)


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises SettingsError unless a value of a config.json is what a field of this type takes; no
    number of a shape that counts something is negative. A field without a default (MISSING) is
    looked for elsewhere."""
    if value is MISSING or kind == dict[str, dict[str, Any]]:
        return
    wanted = {bool: "true or false", int: "a whole number", str: "text"}.get(kind, "a number")
    if kind == float | str:
        wanted = "a number or the name of a rule"
    if kind == tuple[float, ...]:
        wanted = "a list of numbers"
        right = isinstance(value, list | tuple) and all(map(is_finite, value))
    elif kind == tuple[str, ...]:
        wanted = "a list of names"
        right = isinstance(value, list | tuple) and all(type(v) is str for v in value)
    elif type(value) is int:  # JSON's 1 is a number like its 1.0, and true is none
        right = kind is int or isinstance(1.0, kind)
    else:
        right = isinstance(value, kind) and (kind is bool or type(value) is not bool)
    if right and kind is int and value < 0:
        wanted = "0 or more"
        right = False
    if right and type(value) is int and value > MAX_NUMBER:
        raise SettingsError(f"{name} has {len(str(value))} digits: it must be at most {MAX_NUMBER}")
    if right and isinstance(value, float) and not math.isfinite(value):  # TOML has nan and inf
        wanted = "a finite number"
        right = False
    if not right:
        raise SettingsError(f"{name} = {value!r} must be {wanted}")
