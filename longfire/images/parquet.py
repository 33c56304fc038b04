"""The images of parquet files: a column with encoded images, one with classes."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longfire.data.formats import BROKEN
from longfire.errors import DataError
from longfire.own_files import json_of, of_type

GROUPS_KEPT = 8  # groups of rows in memory, for each source


class ImageParquet:
    """The rows of parquet files in the order of their names.

    image_field: a column of bytes, or of structs with `bytes` (what `datasets` writes).
    label_field: whole numbers, or text. Numbers are named by the features that `datasets` keeps in
    the file, where it has them. An image is read with its group of rows: `datasets` writes small
    ones. Raises DataError naming the file.
    """

    def __init__(
        self, files: list[Path], root: Path, name: str, image_field: str, label_field: str
    ) -> None:
        self.files = files
        self.root = root
        self.name = name
        self.image_field = image_field
        self.groups: list[tuple[int, int]] = []  # of each group of rows: file, number in it
        labels: list[object] = []
        firsts = [0]
        self.names: tuple[str, ...] = ()
        for number, file in enumerate(files):
            with opened(file) as parquet:
                self.check_columns(file, parquet.schema_arrow, label_field)
                for group in range(parquet.num_row_groups):
                    self.groups.append((number, group))
                    rows = parquet.metadata.row_group(group).num_rows
                    firsts.append(firsts[-1] + rows)
                labels += parquet.read(columns=[label_field])[label_field].to_pylist()
        self.firsts = np.array(firsts)
        self.classes, self.labels_N = numbered(labels, self.names, f"{root}: {label_field}")
        self.kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def check_columns(self, file: Path, schema: pa.Schema, label_field: str) -> None:
        """Both columns are there; what numbers of classes mean."""
        for key, field in (
            ("images.image_field", self.image_field),
            ("classification.label_field", label_field),
        ):
            if field not in schema.names:
                raise DataError(
                    f"{file} has no column {field!r} ({key}); its columns: "
                    f"{', '.join(schema.names)}"
                )
        self.names = self.names or class_names(schema, label_field)

    def content(self, number: int) -> bytes:
        group = int(self.firsts.searchsorted(number, "right")) - 1
        try:
            value = self.column(group)[number - int(self.firsts[group])].as_py()
        except UnicodeDecodeError as error:  # of a path beside the bytes
            raise DataError(f"{self.where(number)}: {self.image_field}: {error}") from error
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise DataError(
                f"{self.where(number)}: {self.image_field} holds no bytes of an image (a path that "
                "it names is not followed)"
            )
        return value

    def column(self, group: int) -> pa.ChunkedArray:
        """The images of a group of rows; the last ones that were asked for stay in memory."""
        with self.lock:
            if group not in self.kept:
                file, number = self.groups[group]
                with opened(self.files[file]) as parquet:
                    table = parquet.read_row_group(number, columns=[self.image_field])
                self.kept[group] = table[self.image_field]
                if len(self.kept) > GROUPS_KEPT:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(group)
            return self.kept[group]

    def where(self, number: int) -> str:
        group = int(self.firsts.searchsorted(number, "right")) - 1
        return f"{self.files[self.groups[group][0]]}, {self.identity(number)}"

    def identity(self, number: int) -> str:
        return f"row {number} of the source"

    def fingerprint(self) -> str:
        digest = blake2b(self.labels_N.tobytes(), digest_size=16)
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\0".encode())
        return digest.hexdigest()


@contextmanager
def opened(file: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file, closed at the end. Raises DataError where it, or what is read inside, is
    broken."""
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except BROKEN as error:
        raise DataError(f"{file}: no readable parquet file: {error}") from error


class Info(TypedDict):
    """The columns by name."""

    features: dict[str, object]


class Stored(TypedDict):
    """What `datasets` keeps in a parquet file."""

    info: Info


class ClassLabel(TypedDict):
    """A column of classes."""

    names: list[str]


def class_names(schema: pa.Schema, label_field: str) -> tuple[str, ...]:
    """The names of a column's numbers, as `datasets` keeps them in the file; empty without them."""
    metadata = schema.metadata or {}
    try:
        stored = json_of(metadata.get(b"huggingface", b"{}"), Stored)
        features = stored["info"]["features"]
        return tuple(of_type(features.get(label_field), ClassLabel)["names"])
    except ValueError:
        return ()


def numbered(
    labels: list[object], names: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes by name, and the number of each record's class, int64 (N,).

    Whole numbers are classes 0 to the largest, unless `names` has more; texts are classes in the
    order of their names. Raises DataError for other values.
    """
    if labels and all(type(label) is int for label in labels):
        labels_N = np.array(labels, np.int64)
        if labels_N.min() < 0:
            raise DataError(f"{where}: {labels_N.min()} is no class: numbers begin with 0")
        if names and labels_N.max() >= len(names):
            raise DataError(f"{where}: class {labels_N.max()} has no name among {len(names)}")
        return names or tuple(map(str, range(int(labels_N.max()) + 1))), labels_N
    for label in labels:
        if not isinstance(label, str) or not label:
            raise DataError(
                f"{where}: {label!r} is no class: give each record a whole number, or each a text"
            )
    classes = tuple(sorted(set(map(str, labels))))
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, np.array([number_of[str(label)] for label in labels], np.int64)
