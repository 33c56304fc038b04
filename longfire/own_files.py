"""The one reader of JSON and TOML: what is damaged, or of another type than it should be, is an
error that names file, line where it is known, what was expected, and the fix.

    facts = read_json(place / "state.json", Facts, CheckpointError, "take another step")
    before = read_note(folder / "data.json", dict[str, str])    None, and a warning, where damaged

A type is a TypedDict, a NamedTuple (a list in JSON), dict[str, T], list[T], int, float, str, bool,
`T | None`, or object, which is anything.
"""

import json
import logging
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from longfire.errors import UserError, first_line
from longfire.json_types import JsonObject, check_type
from longfire.listing import exists
from longfire.regular_files import read_regular

logger = logging.getLogger(__name__)

T = TypeVar("T")
SHOWN = 80  # characters of a line that a message shows


def read_json(file: Path, kind: type[T], raises: type[UserError], fix: str) -> T:
    """The content of a JSON file. Raises `raises` naming the file, what is wrong, and the fix."""
    try:
        return json_of(read_regular(file), kind)
    except (OSError, ValueError) as error:
        raise raises(f"{file}: {problem_of(error)}; {fix}") from error


def read_toml(file: Path, kind: type[T], raises: type[UserError], fix: str) -> T:
    """The content of a TOML file. Raises as `read_json`."""
    try:
        return of_type(parse_toml(read_regular(file)), kind)
    except (OSError, ValueError) as error:
        raise raises(f"{file}: {problem_of(error)}; {fix}") from error


def read_note(file: Path, kind: type[T]) -> T | None:
    """What an earlier start has noted in a JSON file. None where there is none, and, with a
    warning, where it is damaged: who asks writes a new one, or does without."""
    if not exists(file):
        return None
    return note(file, lambda: json_of(read_regular(file), kind))


def read_toml_note(file: Path, kind: type[T]) -> T | None:
    """The same of a TOML file."""
    if not exists(file):
        return None
    return note(file, lambda: of_type(parse_toml(read_regular(file)), kind))


def note(file: Path, read: Callable[[], T]) -> T | None:
    """What `read` returns; None, with a warning, where the file is damaged."""
    try:
        return read()
    except (OSError, ValueError) as error:
        logger.warning(f"{file}: {problem_of(error)}; what it held is not used")
        return None


def problem_of(error: Exception) -> str:
    """What is wrong with a file."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or first_line(error)}"
    return str(error)


def json_of(content: bytes | str, kind: type[T]) -> T:
    """JSON of this type. Raises ValueError."""
    return of_type(parse_json(content), kind)


def of_type(value: object, kind: type[T]) -> T:
    """The value, which was read from JSON or TOML, as one of this type. Raises ValueError."""
    check_type(value, kind)
    return cast(T, value)


def parse_json(content: bytes | str, is_strict: bool = False) -> object:
    """JSON of any type. is_strict: a key may not stand twice in a table, and NaN is no number.
    Raises ValueError naming the line."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        if is_strict:
            return json.loads(
                text, object_pairs_hook=without_repeats, parse_constant=infinity_alone
            )
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = error.doc.split("\n")
        line = lines[error.lineno - 1].strip()[:SHOWN] if error.doc.strip() else "an empty file"
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not valid JSON: {place}: {error.msg}: {line}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: not UTF-8 at byte {error.start:,}") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits; what is_strict refuses
        raise ValueError(f"not valid JSON: {first_line(error)}") from error


def parse_toml(content: bytes | str) -> JsonObject:
    """TOML. Raises ValueError naming the line."""
    try:
        return tomllib.loads(content.decode() if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not readable as TOML: not UTF-8 at byte {error.start:,}") from error
    except RecursionError as error:
        raise ValueError("not readable as TOML: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not readable as TOML: {first_line(error)}") from error


def without_repeats(pairs: list[tuple[str, object]]) -> JsonObject:
    """A JSON object. Raises ValueError where a key stands twice, of which Python would silently
    take the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} stands twice in a table"
        )
    return table


def infinity_alone(name: str) -> float:
    """Infinity, which is no JSON: some classes of transformers write it for "no limit". Raises
    ValueError for NaN."""
    if name == "NaN":
        raise ValueError(f"{name} is no number of JSON")
    return float(name)
