"""Settings that a part from a table declares for itself: name=value,other=value in one setting of
ours, read as a dataclass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from longfire.config.values import as_type, check_interval, nearest
from longfire.errors import SettingsError


@dataclass(frozen=True)
class NoOptions:
    """Of a part whose settings are all among ours."""


def read_named_options(kind: type, given: Sequence[str], key: str, owner: str) -> object:
    """The entries of a setting as the dataclass `kind`.

    key: the setting, as optimizer.options. owner: the setting that names the part, with its value.
    Raises SettingsError naming the option.
    """
    known = {option.name: option for option in fields(kind)}
    values: dict[str, object] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        place = f"{key}: {entry!r}"
        if not equals:
            raise SettingsError(f"{place} must be written as name=value")
        if name not in known:
            has = ", ".join(known) or "none"
            raise SettingsError(
                f"{place} is no option of {owner}{nearest(name, known)}; its options: {has}"
            )
        if name in values:
            raise SettingsError(f"{place} is the second value of {name}: leave one out")
        try:
            values[name] = as_type(known[name].type, text, text=True)
            check_interval(values[name], known[name].metadata.get("within", ""))
        except ValueError as error:
            raise SettingsError(f"{place} {error}") from error
    return kind(**values)
