"""Tables of settings, read strictly: what is missing, of another type, or of an unknown name."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Any

from longfire.config.own_settings import Configured, check_table, own_settings
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


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Errors about a shape that do not know where it is written name the place."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(str(error).replace("model config:", f"{where}:", 1)) from error


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
    with placed(where):
        check_table(owner, name, given)
        require(given, fields(owner.Config), where, name, toml)
        return own_settings(owner, name, given, hidden_size)
