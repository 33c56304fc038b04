"""Readers of parquet and arrow files (formats.py says what a reader is)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from longfire.data.record_format import RecordFormat
from longfire.data.records import Record
from longfire.errors import DataError

BATCH_ROWS = 256  # rows of a table that become Python objects at a time
# The end marks of an arrow stream; the second one before Arrow 0.15.
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
ARROW_OLD_END = b"\0\0\0\0"


def read_parquet(
    file: Path, record_format: RecordFormat, row: int, offset: int
) -> Iterator[Record]:
    """The rows of a parquet file. Groups of rows before `row` are not read."""
    with pq.ParquetFile(file) as parquet:
        chosen = record_format.columns(file, parquet.schema_arrow.names)
        first = 0
        rows_before = 0
        while first < parquet.num_row_groups:
            group_rows = parquet.metadata.row_group(first).num_rows
            if rows_before + group_rows > row:
                break
            rows_before += group_rows
            first += 1
        batches = parquet_batches(parquet, first, chosen)
        rows = records_of_rows(batches, chosen, rows_before, row)
        for number, record in rows:
            content, problem = record_format.content_of(record)
            yield Record(number, content, problem, number / parquet.metadata.num_rows)


def parquet_batches(
    parquet: pq.ParquetFile, first_group: int, fields: tuple[str, ...]
) -> Iterator[pa.RecordBatch]:
    """The groups of rows from number `first_group` on, in batches."""
    for group in range(first_group, parquet.num_row_groups):
        yield from parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(fields))


def read_arrow(file: Path, record_format: RecordFormat, row: int, offset: int) -> Iterator[Record]:
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
        chosen = record_format.columns(file, reader.schema.names)
        whole_batches = (checked(batch, chosen) for batch in batches)
        for number, record in records_of_rows(whole_batches, chosen, 0, row):
            content, problem = record_format.content_of(record)
            yield Record(number, content, problem, mapped.tell() / max(mapped.size(), 1))


def checked(batch: pa.RecordBatch, fields: tuple[str, ...]) -> pa.RecordBatch:
    """The same batch. Raises ArrowInvalid where a place in one of these columns lies outside of it:
    reading there would end the process. Texts that are not UTF-8 are named later, by row."""
    for field in fields:
        column = batch.column(batch.schema.get_field_index(field))
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            if not is_text or "UTF8" not in str(error):
                raise
    return batch


def check_stream_end(file: Path) -> None:
    """Raises EOFError unless an arrow stream has its end mark, DataError if bytes follow it.

    The format lets a writer leave the mark out, and then a stream that was cut between two batches
    looks complete. Only the heads of messages are read here.
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
    if end.startswith(ARROW_END):
        place += len(ARROW_END)
    elif end.startswith(ARROW_OLD_END):
        place += len(ARROW_OLD_END)
    else:
        raise EOFError(
            "an arrow stream without its end mark: it was cut off, or its writer was not closed"
        )
    if place < size:
        raise DataError(
            f"{file}: {size - place:,} bytes are behind the end of its arrow stream; give each "
            "stream a file of its own"
        )


def records_of_rows(
    batches: Iterable[pa.RecordBatch], fields: tuple[str, ...], rows_before: int, row: int
) -> Iterator[tuple[int, dict[str, object]]]:
    """Number and fields of the rows after number `row`, where the first batch begins after row
    number `rows_before`."""
    for batch in batches:
        for start in range(max(row - rows_before, 0), batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            columns = [part.column(part.schema.get_field_index(field)) for field in fields]
            for i in range(part.num_rows):
                values = {field: value_of(column[i]) for field, column in zip(fields, columns)}
                yield rows_before + start + i + 1, values
        rows_before += batch.num_rows


def value_of(scalar: pa.Scalar) -> object:
    """A list of numbers is an array: of whole numbers without null a view of the file's memory. A
    string column may hold invalid UTF-8: then its bytes, so that `decode` names the place."""
    if isinstance(scalar, pa.ListScalar) and scalar.is_valid:
        values = scalar.values
        if pa.types.is_integer(values.type) and not values.null_count:
            return values.to_numpy()
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()
