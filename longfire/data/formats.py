"""One file -> its records: jsonl, json, parquet, arrow, txt. A new format is one function and one line of `FORMATS`.

A reader is a generator `(file, fields, row) -> Iterator[Record]` that starts at record number `row` without reading what lies
before where the format allows it. A record that cannot be read is yielded with its `problem`, so that the caller may count it
and go on; a file that cannot be read at all raises DataError.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from longfire.errors import DataError

AUTO_FIELDS = ("text", "content")  # tried in this order when no text_field is set
BATCH_ROWS = 256  # rows of a parquet or arrow file converted at a time


class Record(NamedTuple):
    """One text, or the reason why there is none. `row` counts from 1 (lines, where the format has lines); `done` is the share of
    the file that has been read, `offset` where the next line begins (0: unknown)."""

    row: int
    text: str
    problem: str
    done: float
    offset: int = 0


def read(file: Path, fields: tuple[str, ...], row: int = 0, offset: int = 0) -> Iterator[Record]:
    """Records of a file after the first `row` of them. Raises DataError naming file, row and mend."""
    reader = FORMATS[format_of(file)]
    last = row
    try:
        for record in reader(file, fields, row, offset):
            last = record.row
            yield record
    except (pa.ArrowException, OSError, EOFError, zlib.error, zstandard.ZstdError) as e:
        raise DataError(
            f"{file}: cannot be read after row {last} ({type(e).__name__}: {e}); replace or remove the file"
        ) from e


def format_of(file: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: what decides how a file is read; "" if we do not read it."""
    suffixes = [s.lower() for s in file.suffixes]
    packed = suffixes[-1:] in ([".gz"], [".zst"])
    suffix = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    return suffix[0] if suffix[0] in FORMATS and not (packed and suffix[0] in (".parquet", ".arrow")) else ""


def text_of(record: Any, fields: tuple[str, ...]) -> tuple[str, str]:
    """(text, problem) of a json object. Several fields are joined by a newline; a null is an empty text."""
    if not isinstance(record, dict):
        return "", f"a JSON object was expected, not {type(record).__name__}"
    chosen = fields or next(((f,) for f in AUTO_FIELDS if f in record), AUTO_FIELDS[:1])
    missing = [f for f in chosen if f not in record]
    if missing:
        return "", missing_field(missing[0], list(record))
    texts = [as_text(record[f]) for f in chosen]
    return "\n".join(text for text, _ in texts), next((problem for _, problem in texts if problem), "")


def missing_field(field: str, there: list[str]) -> str:
    return f"no field {field!r} (fields there: {', '.join(map(str, there)) or 'none'}); set data.text_field"


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
            return "", f"half of a surrogate pair at character {e.start}: not Unicode text"
    return value, ""


def decode(raw: bytes) -> tuple[str, str]:
    try:
        return raw.decode("utf-8-sig" if raw.startswith(b"\xef\xbb\xbf") else "utf-8"), ""
    except UnicodeDecodeError as e:
        return "", f"invalid UTF-8 at byte {e.start}"


def _open(file: Path) -> tuple[BinaryIO, BinaryIO]:
    """(decompressed, raw) streams of a file; the raw one tells how far we are."""
    raw = open(file, "rb")  # noqa: SIM115 (the caller closes it)
    if file.suffix == ".gz":
        return gzip.open(raw, "rb"), raw
    if file.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 2**20), raw
    return raw, raw


def _jsonl(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    size = max(file.stat().st_size, 1)
    stream, raw = _open(file)
    with raw, stream:
        plain = stream is raw
        if plain and offset:
            stream.seek(offset)
        else:
            for _ in range(row):
                stream.readline()
            offset = raw.tell() if plain else 0
        for number, line in enumerate(stream, row + 1):
            offset += len(line) if plain else 0
            done = (offset if plain else raw.tell()) / size
            text, problem = _json_line(line, fields)
            if text is not None:
                yield Record(number, text, problem, done, offset)


def _json_line(line: bytes, fields: tuple[str, ...]) -> tuple[str | None, str]:
    """(text, problem) of a line; text None: a blank line is no record."""
    text, problem = decode(line)
    if problem:
        return "", problem
    if text.isspace() or not text:
        return None, ""
    try:
        return text_of(json.loads(text), fields)
    except ValueError as e:
        return "", f"broken JSON ({e})"
    except RecursionError:
        return "", "broken JSON (nested too deeply)"


def _json(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    """A list of objects, one object, or (under the wrong name, as often) an object a line."""
    stream, raw = _open(file)
    with raw, stream:
        text, problem = decode(stream.read())
    try:
        value = "" if problem else json.loads(text)
    except ValueError as e:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            yield from _jsonl(file, fields, row, offset)
            return
        problem = f"broken JSON ({e})"
    if problem:
        raise DataError(f"{file}: {problem}; mend or remove the file")
    records = value if isinstance(value, list) else [value]
    for number, record in enumerate(records[row:], row + 1):
        yield Record(number, *text_of(record, fields), number / len(records))


def _parquet(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    with pq.ParquetFile(file) as parquet:
        chosen = _columns(file, parquet.schema_arrow.names, fields)
        groups, before = [], 0
        for group in range(parquet.num_row_groups):  # whole groups before `row` are not read
            rows = parquet.metadata.row_group(group).num_rows
            if groups or before + rows > row:
                groups.append(group)
            else:
                before += rows
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(chosen)) if groups else ()
        yield from _records(batches, chosen, before, row, parquet.metadata.num_rows)


def _arrow(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    """The streaming format (what `datasets` writes) or the file format."""
    with pa.memory_map(str(file)) as mapped:
        try:
            reader = pa.ipc.open_stream(mapped)
            batches = iter(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        chosen = _columns(file, reader.schema.names, fields)
        yield from _records((b.select(list(chosen)) for b in batches), chosen, 0, row, 0, mapped)


def _columns(file: Path, names: list[str], fields: tuple[str, ...]) -> tuple[str, ...]:
    chosen = fields or next(((f,) for f in AUTO_FIELDS if f in names), AUTO_FIELDS[:1])
    for field in chosen:
        if field not in names:
            raise DataError(f"{file}: {missing_field(field, names)}")
    return chosen


def _records(
    batches: Any, chosen: tuple[str, ...], before: int, row: int, rows: int, mapped: Any = None
) -> Iterator[Record]:
    """Records of arrow batches, the first of which begins at record number `before`, from record `row` on."""
    for batch in batches:
        if before + batch.num_rows > row:
            for start in range(max(row - before, 0), batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                values = [part.column(part.schema.get_field_index(f)) for f in chosen]
                for i in range(part.num_rows):
                    number = before + start + i + 1
                    done = number / rows if rows else mapped.tell() / max(mapped.size(), 1)
                    yield Record(number, *text_of({f: _value(v[i]) for f, v in zip(chosen, values)}, chosen), done)
        before += batch.num_rows


def _value(scalar: pa.Scalar) -> Any:
    """Invalid UTF-8 in a string column comes out as its bytes, whose decoding then says where."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _text(file: Path, fields: tuple[str, ...], row: int, offset: int) -> Iterator[Record]:
    """A file of text is one document."""
    if row == 0:
        stream, raw = _open(file)
        with raw, stream:
            yield Record(1, *decode(stream.read()), 1.0)


FORMATS: dict[str, Callable[[Path, tuple[str, ...], int, int], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
    ".text": _text,
    ".md": _text,
    ".rst": _text,
    ".tex": _text,
    ".py": _text,
}
TEXT_FORMATS = tuple(suffix for suffix, reader in FORMATS.items() if reader is _text)
