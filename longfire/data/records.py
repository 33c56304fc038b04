"""Records of a file, and the text in their fields."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from longfire.data.lines import decode
from longfire.errors import DataError

AUTO_FIELDS = ("text", "content")  # tried in this order where data.text_field is empty


class Record(NamedTuple):
    """What a reader yields.

    row: counts from 1 (lines, where the format has lines). problem: why there is no text, or "".
    done: the part of the file that has been read, from 0 to 1. offset: the byte where the next
    record begins (0: unknown).
    """

    row: int
    text: str
    problem: str
    done: float
    offset: int = 0


def text_of(record: object, fields: tuple[str, ...]) -> tuple[str, str]:
    """(text, problem) of a JSON object. Several fields are joined by a newline; a null is an empty
    text."""
    if not isinstance(record, Mapping):
        return "", f"an object was expected, not {type(record).__name__}"
    chosen = fields or auto_fields(record)
    for field in chosen:
        if field not in record:
            return "", missing_field(field, record)
    texts = []
    problem = ""
    for field in chosen:
        text, field_problem = as_text(record[field])
        problem = problem or field_problem
        if text:
            texts.append(text)
    return "\n".join(texts), problem


def auto_fields(available: Iterable[str]) -> tuple[str, ...]:
    """The field that is read where data.text_field is empty."""
    names = list(available)
    for field in AUTO_FIELDS:
        if field in names:
            return (field,)
    return AUTO_FIELDS[:1]


def choose_fields(
    file: Path | str, available: Sequence[str], fields: tuple[str, ...]
) -> tuple[str, ...]:
    """The columns that hold the text. Raises DataError listing the available ones."""
    chosen = fields or auto_fields(available)
    for field in chosen:
        if field not in available:
            raise DataError(f"{file}: {missing_field(field, available)}")
        times = available.count(field)
        if times > 1:
            raise DataError(f"{file}: {repeated_field(field, times)}")
    return chosen


def missing_field(field: str, available: Iterable[str]) -> str:
    """A message."""
    names = ", ".join(available) or "none"
    return f"no field {field!r} (fields there: {names}); set data.text_field"


def repeated_field(field: str, times: int) -> str:
    """A message."""
    return (
        f"the field {field!r} is there {times} times; rename all but one, or set data.text_field "
        "to another"
    )


def as_text(value: object) -> tuple[str, str]:
    """(text, problem) of a field's value."""
    if value is None:
        return "", ""
    if isinstance(value, bytes):
        return decode(value)
    if not isinstance(value, str):
        return "", f"the text field holds {type(value).__name__}, not text"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return "", (
                f"half a surrogate pair at character {error.start}, which no UTF-8 text can hold"
            )
    return value, ""
