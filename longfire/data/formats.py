"""One file -> its records: jsonl, json, parquet, arrow, text. A new format is one file and one line
of `FORMATS`. tables.py and text_files.py hold the readers of tables and of plain text.

A reader is a generator `(file, record_format, row, offset) -> Iterator[Record]` that begins after
record number `row`, without reading what comes before where the format allows that. A record that
cannot be read is yielded with its `problem`, so that the caller may count it and continue. A file
that cannot be read raises DataError.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from longfire.data.compressed import ERRORS, compression_of
from longfire.data.record_format import RecordFormat
from longfire.data.records import Record, Texts
from longfire.data.text_files import read_split_text, read_text
from longfire.errors import DataError
from longfire.lazy_table import LazyTable

Reader = Callable[[Path, RecordFormat, int, int], Iterator[Record]]

TEXT = "longfire.data.text_files:read_text"
FORMATS: LazyTable[Reader] = LazyTable(
    {
        ".jsonl": "longfire.data.json_files:read_jsonl",
        ".ndjson": "longfire.data.json_files:read_jsonl",
        ".json": "longfire.data.json_files:read_json",
        ".parquet": "longfire.data.tables:read_parquet",
        ".arrow": "longfire.data.tables:read_arrow",
        **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".py"), TEXT),
    }
)
# Errors of a broken file, whatever its format. Names of columns are decoded by pyarrow.
BROKEN = (pa.ArrowException, UnicodeDecodeError, *ERRORS)
TABLE_FORMATS = (".parquet", ".arrow")  # have their own compression
TEXT_FORMATS = tuple(suffix for suffix, place in FORMATS.places.items() if place == TEXT)


def read(
    file: Path,
    record_format: RecordFormat,
    row: int = 0,
    offset: int = 0,
    split_documents: str = "",
) -> Iterator[Record]:
    """Records of a file after the first `row`.

    offset: the byte behind them (0: unknown). split_documents: how a text file is split
    (settings.Data). Raises DataError naming file, record and fix.
    """
    last = row
    reader = FORMATS[format_of(file)]
    if reader is read_text and not isinstance(record_format, Texts):
        raise DataError(
            f"{file}: a file of text has no records, and data.record_format = "
            f"{record_format.name!r} reads their fields: name jsonl, json, parquet or arrow"
        )
    if reader is read_text and split_documents:
        records = read_split_text(file, split_documents, row, offset)
    else:
        records = reader(file, record_format, row, offset)
    try:
        for record in records:
            last = record.row
            yield record
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{file}: broken after row {last} ({reason}); replace or remove the file"
        ) from error


def format_of(file: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`: decides how a file is read; "" if there is no reader."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = compression_of(file)
    if compression:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in FORMATS:
        return ""
    suffix = suffixes[-1]
    if compression and suffix in TABLE_FORMATS:
        return ""
    return suffix


def is_text(file: Path) -> bool:
    """Whether a file is plain text: one document, unless data.split_documents splits it."""
    return format_of(file) in TEXT_FORMATS
