"""One file -> its records: jsonl, json, parquet, arrow, text. A new format is one function and one
line of `FORMATS`.

A reader is a generator `(file, fields, row, offset) -> Iterator[Record]` that begins after record
number `row`, without reading what lies before where the format allows that. A record that cannot be
read is yielded with its `problem`, so that the caller may count it and go on; a file that cannot be
read raises DataError.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from longfire.data.compressed import ERRORS, open_file, packed_as
from longfire.data.lines import decode, lines_of
from longfire.errors import DataError

AUTO_FIELDS = ("text", "content")  # tried in this order where data.text_field is empty
BLOCK_BYTES = 2**20  # of a text that is split by a separator, read at a time
BATCH_ROWS = 256  # rows of a parquet or arrow file that become Python objects at a time
ARROW_END, ARROW_OLD_END = (
    b"\xff\xff\xff\xff\0\0\0\0",
    b"\0\0\0\0",
)  # of a stream; the second before Arrow 0.15


class Document(NamedTuple):
    """A text, or the reason why there is none.

    identity: relative path and row, the same wherever the folder lies: what decides whether it is
    held out;
    where: file and row for messages; problem: "" if the text could be read.
    """

    identity: str
    where: str
    text: str
    problem: str


class Record(NamedTuple):
    """What a reader yields: `row` counts from 1 (lines, where the format has lines); `done` is the
    share of the file that has been read; `offset` is the byte where the next line begins (0:
    unknown)."""

    row: int
    text: str
    problem: str
    done: float
    offset: int = 0


def read(
    file: Path, fields: tuple[str, ...], row: int = 0, offset: int = 0, split_documents: str = ""
) -> Iterator[Record]:
    """Records of a file after the first `row`. split_documents: how a text file is split
    (settings.Data). Raises DataError naming file, row and fix."""
    last = row
    reader = FORMATS[format_of(file)]
    if reader is _text and split_documents:
        records = _split_text(file, split_documents, row, offset)
    else:
        records = reader(file, fields, row, offset)
    try:
        for record in records:
            last = record.row
            yield record
    except (pa.ArrowException, *ERRORS) as e:
        reason = f"{type(e).__name__}: {e}"
        raise DataError(
            f"{file}: broken after row {last} ({reason}); replace or remove the file"
        ) from e


def format_of(file: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: what decides how a file is read; "" if we do not read it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = packed_as(file)
    suffix = "".join(suffixes[:-1][-1:] if packed else suffixes[-1:])
    return suffix if suffix in FORMATS and not (packed and suffix in (".parquet", ".arrow")) else ""


def text_of(record: Any, fields: tuple[str, ...]) -> tuple[str, str]:
    """(text, problem) of a JSON object. Several fields are joined by a newline; a null is an empty
    text."""
    if not isinstance(record, dict):
        return "", f"an object was expected, not {type(record).__name__}"
    chosen = fields or next(((field,) for field in AUTO_FIELDS if field in record), AUTO_FIELDS[:1])
    for field in chosen:
        if field not in record:
            return "", missing_field(field, record)
    texts = [as_text(record[field]) for field in chosen]
    return "\n".join(text for text, _ in texts if text), next(
        (problem for _, problem in texts if problem), ""
    )


def missing_field(field: str, there: Iterable[str]) -> str:
    return f"no field {field!r} (fields there: {', '.join(there) or 'none'}); set data.text_field"


def field_twice(field: str, times: int) -> str:
    return f"the field {field!r} is there {times} times; rename all but one, or set data.text_field to another"


def choose_fields(file: Path | str, there: list[str], fields: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that hold the text. Raises DataError listing those that are there."""
    chosen = fields or next(((field,) for field in AUTO_FIELDS if field in there), AUTO_FIELDS[:1])
    for field in chosen:
        if field not in there:
            raise DataError(f"{file}: {missing_field(field, there)}")
        if there.count(field) > 1:
            raise DataError(f"{file}: {field_twice(field, there.count(field))}")
    return chosen


def as_text(value: Any) -> tuple[str, str]:
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
        except UnicodeEncodeError as e:
            return "", f"half a surrogate pair at character {e.start}, which no UTF-8 text can hold"
    return value, ""


def _jsonl(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    size = max(file.stat().st_size, 1)
    stream, raw = open_file(file)
    plain = stream is raw
    with raw, stream:
        if plain and offset:
            stream.seek(offset)
        else:
            offset = sum(len(stream.readline()) for _ in range(row))
        for number, line in enumerate(lines_of(stream), row + 1):
            offset += len(line)
            if line.isspace():
                continue
            text, problem = _json_line(line, fields)
            yield Record(
                number,
                text,
                problem,
                (offset if plain else raw.tell()) / size,
                offset if plain else 0,
            )


def _json_line(line: bytes, fields: tuple[str, ...]) -> tuple[str, str]:
    text, problem = decode(line)
    if problem:
        return "", problem
    try:
        return text_of(load_json(text, fields), fields)
    except ValueError as e:
        return "", f"broken JSON: {e}"
    except RecursionError:
        return "", "broken JSON: nested too deeply"


def load_json(text: str, fields: tuple[str, ...]) -> Any:
    """`json.loads`, which takes the last of two fields with one name. Raises ValueError where that
    is a field that we read."""
    wanted = fields or AUTO_FIELDS
    if all(text.count(f'"{field}"') < 2 for field in wanted):
        return json.loads(text)  # at once: nearly every line

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for field in wanted:
            if names.count(field) > 1:
                raise ValueError(field_twice(field, names.count(field)))
        return dict(pairs)

    return json.loads(text, object_pairs_hook=checked)


def _json(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    """A list of objects, one object, or (a jsonl file under another name) an object a line."""
    stream, raw = open_file(file)
    with raw, stream:
        text, problem = decode(stream.read())
    if not problem:
        try:
            value = load_json(text, fields)
        except ValueError as e:
            if text.lstrip().startswith("{") and "\n" in text.strip():
                yield from _jsonl(file, fields, row, offset)
                return
            problem = f"broken JSON: {e}"
        except RecursionError:
            problem = "broken JSON: nested too deeply"
    if problem:
        raise DataError(f"{file}: {problem}; fix or remove the file")
    records = value if isinstance(value, list) else [value]
    for number, record in enumerate(records[row:], row + 1):
        yield Record(number, *text_of(record, fields), number / len(records))


def _parquet(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    with pq.ParquetFile(file) as parquet:
        chosen = choose_fields(file, parquet.schema_arrow.names, fields)
        rows_of = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        first = before = 0
        while (
            first < len(rows_of) and before + rows_of[first] <= row
        ):  # whole groups before `row` are not read
            before, first = before + rows_of[first], first + 1
        groups = range(first, len(rows_of))
        batches = (
            b
            for g in groups
            for b in parquet.iter_batches(BATCH_ROWS, row_groups=[g], columns=list(chosen))
        )
        for number, text, problem in _rows(batches, chosen, before, row):
            yield Record(number, text, problem, number / parquet.metadata.num_rows)


def _arrow(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    """The streaming format (what `datasets` writes) or the file format."""
    with pa.memory_map(str(file)) as mapped:
        try:
            reader = pa.ipc.open_stream(mapped)
            is_stream = True
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
            is_stream = False
        if is_stream:
            check_stream_end(file)
            batches = iter(reader)
        else:
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        chosen = choose_fields(file, reader.schema.names, fields)
        for number, text, problem in _rows(batches, chosen, 0, row):
            yield Record(number, text, problem, mapped.tell() / max(mapped.size(), 1))


def check_stream_end(file: Path) -> None:
    """Raises EOFError unless an arrow stream has its end mark, DataError if something is behind it.

    The format lets a writer leave the mark out, and then a stream that was cut between two batches
    looks whole. Only the heads of messages are read here.
    """
    with pa.memory_map(str(file)) as mapped:
        messages = pa.ipc.MessageReader.open_stream(mapped)
        place = 0
        try:
            while True:
                messages.read_next_message()
                place = mapped.tell()
        except StopIteration:
            pass
        mapped.seek(place)
        end = mapped.read(len(ARROW_END))
        size = mapped.size()
    mark = next((mark for mark in (ARROW_END, ARROW_OLD_END) if end.startswith(mark)), b"")
    if not mark:
        raise EOFError(
            "an arrow stream without its end mark: it was cut off, or its writer was not closed"
        )
    if place + len(mark) < size:
        raise DataError(
            f"{file}: {size - place - len(mark):,} bytes are behind the end of its arrow stream; give each stream a file "
            "of its own"
        )


def _rows(
    batches: Iterable[pa.RecordBatch], fields: tuple[str, ...], before: int, row: int
) -> Iterator[tuple[int, str, str]]:
    """(number, text, problem) after record `row`, where the first batch begins after record
    `before`."""
    for batch in batches:
        for start in range(max(row - before, 0), batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            columns = [part.column(part.schema.get_field_index(field)) for field in fields]
            for i in range(part.num_rows):
                values = {field: _value(column[i]) for field, column in zip(fields, columns)}
                yield before + start + i + 1, *text_of(values, fields)
        before += batch.num_rows


def _value(scalar: pa.Scalar) -> Any:
    """A string column may hold invalid UTF-8: then its bytes, so that `decode` says where."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _text(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    """A file of text is one document."""
    if row == 0:
        stream, raw = open_file(file)
        with raw, stream:
            yield Record(1, *decode(stream.read()), 1.0)


def _split_text(file: Path, split_documents: str, row: int, offset: int) -> Iterator[Record]:
    """The documents of a text file that holds several, without the white space around them; a row
    is what lies between two separators, and rows without text are no documents."""
    size = max(file.stat().st_size, 1)
    stream, raw = open_file(file)
    plain = stream is raw
    with raw, stream:
        if plain and offset:
            stream.seek(offset)
        pieces = _pieces(stream, split_documents)
        if not (plain and offset):
            offset = sum(len(piece) for piece in islice(pieces, row))
        for number, piece in enumerate(pieces, row + 1):
            offset += len(piece)
            text, problem = decode(piece.removesuffix(_separator(split_documents)))
            if problem or text.strip():
                yield Record(
                    number,
                    text.strip(),
                    problem,
                    (offset if plain else raw.tell()) / size,
                    offset if plain else 0,
                )


def _separator(split_documents: str) -> bytes:
    """What is removed from the end of a piece; white space goes anyway."""
    return b"" if split_documents in ("lines", "blank_lines") else split_documents.encode()


def _pieces(stream: BinaryIO, split_documents: str) -> Iterator[bytes]:
    """The bytes of a text up to and with each separator; all of them together are the text."""
    if split_documents == "lines":
        yield from lines_of(stream)
    elif split_documents == "blank_lines":
        yield from _paragraphs(stream)
    else:
        yield from _between(stream, split_documents.encode())


def _paragraphs(stream: BinaryIO) -> Iterator[bytes]:
    """Lines up to a blank one."""
    lines: list[bytes] = []
    for line in lines_of(stream):
        lines.append(line)
        if line.isspace():
            yield b"".join(lines)
            lines = []
    if lines:
        yield b"".join(lines)


def _between(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """What ends with the separator, and the rest; a block at a time, so that a file need not fit
    into memory."""
    rest = bytearray()
    while block := stream.read(BLOCK_BYTES):
        begin = max(0, len(rest) - len(separator) + 1)  # what lies before was searched already
        rest += block
        while (found := rest.find(separator, begin)) >= 0:
            end = found + len(separator)
            yield bytes(rest[:end])
            del rest[:end]  # moves nothing: Python keeps where the bytes begin
            begin = 0
    if rest:
        yield bytes(rest)


FORMATS: dict[str, Callable[[Path, tuple[str, ...], int, int], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".py"), _text),
}
TEXT_FORMATS = tuple(suffix for suffix, reader in FORMATS.items() if reader is _text)
