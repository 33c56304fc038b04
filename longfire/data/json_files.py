"""Readers of jsonl and json files (formats.py says what a reader is)."""

import json
from collections.abc import Iterator
from pathlib import Path

from longfire.data.compressed import open_file
from longfire.data.lines import decode, lines_of
from longfire.data.record_format import Content, RecordFormat
from longfire.data.records import AUTO_FIELDS, Record, repeated_field
from longfire.errors import DataError

TOO_DEEP = "broken JSON: nested too deeply"


def read_jsonl(file: Path, record_format: RecordFormat, row: int, offset: int) -> Iterator[Record]:
    """One object a line; lines of white space are skipped, and are counted."""
    size = max(file.stat().st_size, 1)
    stream, raw = open_file(file)
    is_plain = stream is raw
    with raw, stream:
        if is_plain and offset:
            stream.seek(offset)
        else:
            offset = sum(len(stream.readline()) for _ in range(row))
        for number, line in enumerate(lines_of(stream), row + 1):
            offset += len(line)
            if line.isspace():
                continue
            content, problem = content_of_line(line, record_format)
            if is_plain:
                yield Record(number, content, problem, offset / size, offset)
            else:
                yield Record(number, content, problem, raw.tell() / size)


def content_of_line(line: bytes, record_format: RecordFormat) -> tuple[Content, str]:
    """(content, problem) of a line of JSON."""
    text, problem = decode(line)
    if problem:
        return "", problem
    try:
        record = load_json(text, record_format.fields or AUTO_FIELDS)
        return record_format.content_of(record)
    except ValueError as error:
        return "", f"broken JSON: {error}"
    except RecursionError:
        return "", TOO_DEEP


def load_json(text: str, wanted: tuple[str, ...]) -> object:
    """`json.loads`, which takes the last of two fields with one name. Raises ValueError where that
    is a field that is read."""
    if all(text.count(f'"{field}"') < 2 for field in wanted):
        return json.loads(text)  # at once: nearly every line

    def checked(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        for field in wanted:
            if names.count(field) > 1:
                raise ValueError(repeated_field(field, names.count(field)))
        return dict(pairs)

    return json.loads(text, object_pairs_hook=checked)


def read_json(file: Path, record_format: RecordFormat, row: int, offset: int) -> Iterator[Record]:
    """A list of objects, one object, or an object a line (a jsonl file with another suffix)."""
    stream, raw = open_file(file)
    with raw, stream:
        text, problem = decode(stream.read())
    value: object = None
    if not problem:
        try:
            value = load_json(text, record_format.fields or AUTO_FIELDS)
        except ValueError as error:
            if text.lstrip().startswith("{") and "\n" in text.strip():
                yield from read_jsonl(file, record_format, row, offset)
                return
            problem = f"broken JSON: {error}"
        except RecursionError:
            problem = TOO_DEEP
    if problem:
        raise DataError(f"{file}: {problem}; fix or remove the file")
    records = value if isinstance(value, list) else [value]
    for number, record in enumerate(records[row:], row + 1):
        content, record_problem = record_format.content_of(record)
        yield Record(number, content, record_problem, number / len(records))
