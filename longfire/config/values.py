"""A value, from TOML or from the command line, as the type of its setting: strictly, and inside its
interval. Free of torch."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from types import UnionType
from typing import Literal, get_args, get_origin

from longfire.own_files import parse_toml

TRUTH = {
    "true": True,
    "on": True,
    "yes": True,
    "1": True,
    "false": False,
    "off": False,
    "no": False,
    "0": False,
}
MAX_NUMBER = 2**63 - 1  # what torch, numpy and the operating system take
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint with the known word that is most like this one; empty where none is."""
    near = get_close_matches(word, list(known), 1)
    if near:
        return f" (did you mean {prefix + near[0]!r}?)"
    return ""


def as_type(kind: object, value: object, text: bool) -> object:
    """The value as a type: bool, int, float, str, a tuple of one of them, a Literal, or number or
    text. text: whether it was written as text, on the command line; else it must have the type.
    Raises ValueError with what is wanted."""
    if get_origin(kind) is tuple:
        return as_tuple(get_args(kind)[0], value, text)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(str(value), choices)}")
        return value
    if isinstance(kind, UnionType):
        return as_number_or_text(value, text)
    assert isinstance(kind, type)
    if text and isinstance(value, str) and kind is not str:
        value = from_text(kind, value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"must be {KINDS[kind]}{hint_of_type(kind, value)}")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError(f"has {len(str(abs(value)))} digits: it must be at most {MAX_NUMBER}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def hint_of_type(kind: type, value: object) -> str:
    """How to write a value that has another type than this one, where that is obvious."""
    if kind is int and isinstance(value, float) and is_readable(value):
        return f"; write {value:.0f}"
    if isinstance(value, str):
        return "; write it without quotes"
    return ""


def as_number_or_text(value: object, text: bool) -> object:
    """A value that may be either: text is a number where it reads as one. Raises ValueError with
    what is wanted."""
    if not isinstance(value, str):
        return as_type(float, value, text=False)
    try:
        return as_type(float, value, text)
    except ValueError:
        return value


def from_text(kind: type, text: str) -> object:
    """Text as bool, int or float. Raises ValueError with what is wanted."""
    if kind is bool:
        if text.lower() not in TRUTH:
            raise ValueError("must be true or false (the bare flag means true)")
        return TRUTH[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be {KINDS[kind]}{hint_of_text(kind, text)}") from None


def is_readable(number: float) -> bool:
    """Whether a number is whole and no larger than a setting may be."""
    return number.is_integer() and abs(number) <= MAX_NUMBER


def hint_of_text(kind: type, text: str) -> str:
    """How to write a whole number that was written like 1e3 or 5.0."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if kind is int and is_readable(number):
        return f"; write {number:.0f}"
    return ""


def as_tuple(kind: type, value: object, text: bool) -> tuple[object, ...]:
    """A TOML array, or text: comma-separated, or written as a TOML array where an entry holds a
    comma."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_toml(f"list = {value}")["list"]
            text = False
        except ValueError as e:
            raise ValueError(f"is not a TOML array: {e}") from e
    elif isinstance(value, str):
        value = value.split(",") if value else []
        text = True
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"must be a list of {KINDS[kind].removeprefix('a ')}s: a TOML array, or comma-separated"
        )
    entries: list[object] = []
    for entry in value:
        if text and isinstance(entry, str):
            entry = entry.strip()
        entries.append(as_type(kind, entry, text))
    return tuple(entries)


def check_interval(value: object, interval: str) -> None:
    """Raises ValueError unless the number is in an interval written like "[0, 1)"; an empty one has
    no limits."""
    if not interval:
        return
    assert isinstance(value, int | float)
    low, high = map(float, interval[1:-1].split(","))
    is_above = value > low or (interval[0] == "[" and value == low)
    is_below = value < high or (interval[-1] == "]" and value == high)
    if is_above and is_below:
        return
    if interval.startswith("[") and high == math.inf:
        raise ValueError(f"must be at least {low:g}")
    raise ValueError(f"must lie in {interval}")
