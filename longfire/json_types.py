"""Whether a value that was read from JSON or TOML is of the type that its reader relies on."""

import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

JsonObject = dict[str, object]
LARGEST = 2**63  # what counters, sizes and shapes are smaller than
SHOWN = 40  # characters of a value that a message shows
NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def check_type(value: object, kind: object, where: str = "") -> None:
    """Raises ValueError naming the key (`where`), the type that was expected, and the value.

    kind: as own_files.py lists them. Whole numbers have at most 63 bits, and no number is NaN.
    """
    origin = get_origin(kind)
    if kind in (object, Any):
        return
    if origin in (Union, UnionType):
        check_one_of(value, get_args(kind), where)
    elif is_typeddict(kind):
        check_table(value, kind, where)
    elif origin in (dict, Mapping):
        for key, entry in table_of(value, where).items():
            check_type(entry, get_args(kind)[1], inside(where, key))
    elif origin in (list, tuple, Sequence):
        for number, entry in enumerate(list_of(value, where)):
            check_type(entry, get_args(kind)[0], f"{where}[{number}]")
    elif isinstance(kind, type) and issubclass(kind, tuple):
        check_row(value, kind, where)
    elif not is_simple(value, kind):
        raise unexpected(value, NAMES[kind], where)


def check_one_of(value: object, kinds: tuple[object, ...], where: str) -> None:
    """Raises ValueError unless the value is of one of these types: simple ones, or one and None."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return
    if len(others) == 1 and others[0] not in NAMES:
        check_type(value, others[0], where)
        return
    if not any(is_simple(value, kind) for kind in kinds):
        names = " or ".join(NAMES[kind] for kind in kinds)
        raise unexpected(value, names, where)


def check_table(value: object, kind: object, where: str) -> None:
    """Raises ValueError unless the value has the keys of a TypedDict; more of them may be there."""
    table = table_of(value, where)
    required: frozenset[str] = getattr(kind, "__required_keys__", frozenset())
    missing = sorted(required - set(table))
    if missing:
        raise ValueError(f"{where + ' has ' if where else ''}no key {missing[0]!r}")
    for key, kind_of_key in get_type_hints(kind).items():
        if key in table:
            check_type(table[key], kind_of_key, inside(where, key))


def check_row(value: object, kind: type, where: str) -> None:
    """Raises ValueError unless the value is a list of the fields of a NamedTuple."""
    row = list_of(value, where)
    hints = get_type_hints(kind)
    fewest = len(hints) - len(getattr(kind, "_field_defaults", {}))
    if not fewest <= len(row) <= len(hints):
        raise unexpected(value, f"a list of {', '.join(hints)}", where)
    for entry, (name, kind_of_entry) in zip(row, hints.items()):
        check_type(entry, kind_of_entry, inside(where, name))


def is_simple(value: object, kind: object) -> bool:
    """Whether a value is of a simple type. A whole number is a number too; true is none."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < LARGEST
    if isinstance(value, float):
        return kind is float and not math.isnan(value)
    if value is None:
        return kind is type(None)
    return isinstance(value, str) and kind is str


def table_of(value: object, where: str) -> Mapping[str, object]:
    """The value. Raises ValueError unless it is an object."""
    if not isinstance(value, dict):
        raise unexpected(value, "an object", where)
    return value


def list_of(value: object, where: str) -> Sequence[object]:
    """The value. Raises ValueError unless it is a list."""
    if not isinstance(value, list):
        raise unexpected(value, "a list", where)
    return value


def inside(where: str, key: str) -> str:
    """A key of a table, for messages."""
    return f"{where}.{key}" if where else key


def unexpected(value: object, expected: str, where: str) -> ValueError:
    """The error that a value is of another type."""
    return ValueError(f"{where or 'it'} must be {expected}, not {shown(value)}")


def shown(value: object) -> str:
    """A value for a message, short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a whole number of more than 63 bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
