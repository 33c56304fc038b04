"""Texts with a class each, from jsonl and parquet files; all of them are in memory."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from longfire.data.compressed import open_file
from longfire.data.file_checks import check_inside, check_pointers
from longfire.data.formats import BROKEN, format_of
from longfire.data.json_files import load_json
from longfire.data.lines import decode, lines_of
from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError, SettingsError
from longfire.listing import files_below

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TEXT_FIELD = "text"
SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class LabelledTexts:
    """The records of a source. where: the place of each, for messages."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    where: tuple[str, ...]

    def fingerprint(self) -> str:
        """A digest of all records in their order."""
        digest = blake2b(digest_size=16)
        for text, label in zip(self.texts, self.labels):
            digest.update(f"{len(text)} {label}\0{text}".encode())
        return digest.hexdigest()


def read_labelled(entry: str, name: str, text_field: str, label_field: str) -> LabelledTexts:
    """The records of a file, or of the files of a folder in the order of their paths. Raises
    SettingsError and DataError naming file, record and fix.

    text_field: empty: `text`. Labels are texts or whole numbers.
    """
    texts: list[str] = []
    labels: list[str] = []
    where: list[str] = []
    text_field = text_field or TEXT_FIELD
    for file in files_of(Path(entry).expanduser()):
        for row, record in enumerate(records_of(file, (text_field, label_field)), 1):
            place = f"{file}:{row}"
            texts.append(text_of(record, text_field, place))
            labels.append(label_of(record, label_field, place))
            where.append(place)
    if not texts:
        raise DataError(f"{entry}: no record with a text and a class is in it")
    return LabelledTexts(name, tuple(texts), tuple(labels), tuple(where))


def files_of(path: Path) -> list[Path]:
    """The files of a source. Raises SettingsError and DataError."""
    readable = (*JSON_LINES, PARQUET)
    if path.is_file() and format_of(path) in readable:
        files = [path]
    elif path.is_dir():
        files = [file for file in files_below(path) if format_of(file) in readable]
        for file in files:
            check_inside(file, path)
    else:
        raise SettingsError(
            f"data: {str(path)!r} is no jsonl or parquet file (or a folder of them) that is here"
        )
    check_pointers(files)
    return files


def records_of(file: Path, fields: tuple[str, str]) -> Iterator[dict[str, object]]:
    """The records of a file. Raises DataError."""
    try:
        if format_of(file) == PARQUET:
            yield from records_of_parquet(file, fields)
        else:
            yield from records_of_lines(file, fields)
    except BROKEN as error:
        raise DataError(f"{file}: cannot be read: {type(error).__name__}: {error}") from error


def records_of_parquet(file: Path, fields: tuple[str, str]) -> Iterator[dict[str, object]]:
    """The rows of a parquet file."""
    with pq.ParquetFile(file) as parquet:
        missing = [field for field in fields if field not in parquet.schema_arrow.names]
        if missing:
            raise DataError(
                f"{file} has no column {missing[0]!r} (data.text_field, "
                f"classification.label_field); its columns: {', '.join(parquet.schema_arrow.names)}"
            )
        for batch in parquet.iter_batches(columns=list(fields)):
            yield from batch.to_pylist()


def records_of_lines(file: Path, fields: tuple[str, str]) -> Iterator[dict[str, object]]:
    """The objects of a jsonl file, one a line; empty lines are skipped."""
    stream, raw = open_file(file)
    with raw, stream:
        for number, line in enumerate(lines_of(stream), 1):
            if line.isspace():
                continue
            text, problem = decode(line)
            try:
                record = load_json(text, fields)
            except (ValueError, RecursionError) as error:
                problem = problem or f"broken JSON: {error}"
            if problem or not isinstance(record, dict):
                raise DataError(f"{file}:{number}: {problem or 'no JSON object'}; repair it")
            yield record


def text_of(record: dict[str, object], field: str, place: str) -> str:
    """Raises DataError where there is none."""
    text = record.get(field)
    if not isinstance(text, str) or SPACE.fullmatch(text):
        raise DataError(
            f"{place}: the field {field!r} (data.text_field) holds no text; repair or remove the "
            "record"
        )
    return text


def label_of(record: dict[str, object], field: str, place: str) -> str:
    """Raises DataError where there is none."""
    label = record.get(field)
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(
            f"{place}: the field {field!r} (classification.label_field) holds no class: {label!r}; "
            "a text or a whole number was expected"
        )
    return str(label)


def classes_of(labels: set[str]) -> tuple[str, ...]:
    """The classes in the order of their numbers: of whole numbers by size, else by name."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def encoded(
    texts: LabelledTexts, tokenizer: Tokenizer, seq_len: int, add_bos: bool, add_eos: bool
) -> tuple[list[np.ndarray], int]:
    """The ids of each text, with BOS and EOS where they are asked for, and how many texts were
    longer than seq_len: of these the first tokens are left, and EOS."""
    before = [tokenizer.bos_id] if add_bos else []
    after = [tokenizer.eos_id] if add_eos else []
    room = seq_len - len(before) - len(after)
    found: list[np.ndarray] = []
    cut = 0
    for ids in tokenizer.arrays(list(texts.texts)):
        cut += int(len(ids) > room)
        found.append(np.concatenate([before, ids[:room], after]).astype(np.int64))
    return found, cut
