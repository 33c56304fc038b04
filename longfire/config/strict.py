"""Tables of settings, read strictly: what is missing, of another type, or of an unknown name."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol

from longfire.errors import SettingsError


def require(
    given: dict[str, Any], known: Sequence[Field[object]], where: str, table: str, toml: bool
) -> None:
    """Raises SettingsError naming each key that a table must have and has not, and what to write.

    table: the mixer whose keys these are, empty for the keys of the model. toml: written in a
    recipe, not in JSON.
    """
    missing = [
        f
        for f in known
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given
    ]
    if not missing:
        return
    keys = {f.name: f.metadata.get("example", 1) for f in missing}
    if toml:
        lines = ", ".join(f"{name} = {json.dumps(value)}" for name, value in keys.items())
        example = f"{lines} in {f'[model.{quoted(table)}]' if table else '[model]'}"
    else:
        example = json.dumps({table: keys} if table else keys)[1:-1]
    named = ", ".join(f"{table}.{f.name}" if table else f.name for f in missing)
    helps = "; ".join(f.metadata.get("help", "") for f in missing)
    raise SettingsError(f"{where}: {named} missing ({helps}); write, for example, {example}")


def quoted(table: str) -> str:
    """A name as a key of TOML: attention:local needs quotes."""
    if table.replace("_", "").isalnum():
        return table
    return json.dumps(table)


def nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return ""


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Errors about a shape that do not know where it is written name the place."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(str(error).replace("model config:", f"{where}:", 1)) from error


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
    if right and isinstance(value, float) and not math.isfinite(value):  # TOML has nan and inf
        wanted = "a finite number"
        right = False
    if not right:
        raise SettingsError(f"{name} = {value!r} must be {wanted}")


class Configured(Protocol):
    """A class of layers with settings of its own: a mixer or an MLP."""

    Config: ClassVar[type]


def read_own_settings(
    owner: type[Configured],
    name: str,
    given: dict[str, Any],
    hidden_size: int,
    where: str = "model config",
    toml: bool = False,
) -> Any:
    """The own settings of a mixer, or of an MLP, strictly.

    where, toml: the file that they are written in, and whether that is a recipe. Raises
    SettingsError naming the file, the owner, the key, and the nearest name or what to write.
    """
    if not isinstance(given, dict):
        raise SettingsError(f"{where}: {name} = {given!r} must be a table of its settings")
    known = {f.name: f for f in fields(owner.Config)}
    for key in given:
        if key not in known:
            raise SettingsError(
                f"{where}: {name}.{key} is unknown{nearest(key, known)} ({name} has: "
                f"{', '.join(known)})"
            )
        check_type(f"{where}: {name}.{key}", given[key], known[key].type)
    require(given, list(known.values()), where, name, toml)
    with placed(where):
        config = owner.Config(**given)
        config.check(hidden_size)
    return config
