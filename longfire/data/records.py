"""Records of a file, and the text in their fields."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from longfire.data.lines import decode
from longfire.data.record_format import Content, Encoded, EndTokens, text_of_content
from longfire.data.token_record import document_record
from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError

TEXT_SETTING = "data.text_field"
AUTO_FIELDS = ("text", "content")  # tried in this order where data.text_field is empty


class Record(NamedTuple):
    """What a reader yields.

    row: counts from 1 (lines, where the format has lines). content: a text, or what else the
    record format makes of the record. problem: why there is none, or "". done: the part of the
    file that has been read, from 0 to 1. offset: the byte where the next record begins (0:
    unknown).
    """

    row: int
    content: Content
    problem: str
    done: float
    offset: int = 0

    @property
    def text(self) -> str:
        return text_of_content(self.content)


@dataclass(frozen=True)
class Texts:
    """Records of text (data.record_format = "text"). fields: those that are joined; (): `text`, or
    else `content`."""

    fields: tuple[str, ...] = ()

    name: ClassVar[str] = "text"
    cut_for_validation: ClassVar[bool] = True

    def options(self, tokenizer: Tokenizer) -> dict[str, object]:
        return {}

    def columns(self, file: Path | str, available: Sequence[str]) -> tuple[str, ...]:
        return choose_fields(file, available, self.fields)

    def content_of(self, record: object) -> tuple[Content, str]:
        return text_of(record, self.fields)

    def encode(
        self, content: Content, tokenizer: Tokenizer, ends: EndTokens
    ) -> tuple[Encoded | None, str]:
        """One text; many at once are encoded by workers.py, to the same tokens."""
        assert isinstance(content, str)
        encoded = tokenizer.arrays([content])
        pieces = list(encoded)
        if ends.bos is not None:
            pieces.insert(0, np.array([ends.bos], tokenizer.dtype))
        if ends.eos is not None:
            pieces.append(np.array([ends.eos], tokenizer.dtype))
        record = document_record(np.concatenate(pieces))
        text_bytes = np.array([len(content.encode())], np.int64)
        return Encoded(record, text_bytes, tokenizer.losses_of([content], encoded)), ""


TEXTS = Texts()


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


def missing_field(field: str, available: Iterable[str], setting: str = TEXT_SETTING) -> str:
    """A message."""
    names = ", ".join(available) or "none"
    return f"no field {field!r} (fields there: {names}); set {setting}"


def repeated_field(field: str, times: int, setting: str = TEXT_SETTING) -> str:
    """A message."""
    return (
        f"the field {field!r} is there {times} times; rename all but one, or set {setting} "
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
