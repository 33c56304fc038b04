"""Sources that are files on this machine."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from longfire.data import fingerprints, formats
from longfire.data.chosen_files import relative
from longfire.data.documents import Document, Position
from longfire.data.fingerprints import Content
from longfire.data.manifest import checksum
from longfire.data.record_format import RecordFormat
from longfire.data.records import TEXTS


@dataclass(frozen=True)
class FileSource:
    """Files, sorted by their path relative to `root`.

    split_documents: how text files are split (settings.Data). description: which files of a folder
    or a glob are read and which are not. folder: where hashes of files are remembered
    (data.folder).
    """

    entry: str
    root: Path
    files: tuple[Path, ...]
    record_format: RecordFormat = TEXTS
    split_documents: str = ""
    description: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        """A short name for folders, records and messages."""
        return short_name(self.entry)

    def name_of(self, file: Path) -> str:
        """The name of a file in the identities of its documents: the same wherever the folder
        is."""
        return relative(file, self.root)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Of the files in bytes, as they are stored."""
        return tuple(file.stat().st_size for file in self.files)

    @property
    def bytes_total(self) -> int:
        return sum(self.sizes)

    @cached_property
    def contents(self) -> list[Content]:
        """What each file held when it was first asked for, in the order of the files."""
        return fingerprints.contents_of(self.files, self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Of the sorted relative names, sizes and contents."""
        return self.fingerprint_of([content.digest for content in self.contents])

    @property
    def former_fingerprint(self) -> str:
        """As it was before large files were hashed completely: the address of older stores."""
        digests = []
        for file, content in zip(self.files, self.contents):
            digests.append(fingerprints.former_digest(file, content))
        return self.fingerprint_of(digests)

    def fingerprint_of(self, digests: Sequence[str]) -> str:
        """digests: one for each file."""
        lines = []
        for file, content, digest in zip(self.files, self.contents, digests):
            name = os.fsencode(relative(file, self.root))
            lines.append(name + f"\0{content.stamp.size}\0{digest}\n".encode())
        return checksum(*lines)

    def changed(self, first: int, stop: int) -> str:
        """Which of the files [first, stop) has other content than when its fingerprint was
        computed; "" if none has. `touch` changes no content."""
        for number in range(first, min(stop, len(self.files))):
            file = self.files[number]
            before = self.contents[number]
            now = fingerprints.stamp_of(file)
            if now == before.stamp:
                continue
            if now.size != before.stamp.size:
                return (
                    f"{file}: it has {now.size:,} bytes, and had {before.stamp.size:,} when "
                    "preparation began"
                )
            if fingerprints.content_of(file).digest != before.digest:
                return f"{file}: it does not hold what it did when preparation began"
            self.contents[number] = Content(before.digest, now)
        return ""

    def is_one_document(self, file: Path) -> bool:
        """Whether a file is a single document."""
        return formats.is_text(file) and not self.split_documents

    def documents(self, position: Position | None = None) -> "FileDocuments":
        """The documents after a position."""
        return FileDocuments(self, position or {})

    def identities(self) -> Iterator[str]:
        """Of its documents that are not empty, in order. Files that are one document each are not
        read."""
        if all(self.is_one_document(file) for file in self.files):
            for file, size in zip(self.files, self.sizes):
                if size:
                    yield self.name_of(file)
        else:
            for document in self.documents():
                if not document.is_empty:
                    yield document.identity

    def numbered(self) -> Iterator[str]:
        for document in self.documents():
            yield document.identity

    @property
    def parts(self) -> int:
        return len(self.files)

    def part(self, number: int) -> Iterator[Document]:
        """The documents of one file."""
        return iter(replace(self, files=self.files[number : number + 1]).documents())


class FileDocuments:
    """The documents of files after a position; can be iterated once."""

    def __init__(self, source: FileSource, position: Position) -> None:
        self.source = source
        self.position: Position = {"file": 0, "row": 0, "offset": 0, **position}
        self.bytes_read = sum(source.sizes[: self.position["file"]])

    def __iter__(self) -> Iterator[Document]:
        source = self.source
        first = self.position["file"]
        bytes_before = sum(source.sizes[:first])
        for number in range(first, len(source.files)):
            yield from self._documents_of(number, bytes_before)
            bytes_before += source.sizes[number]
            self.position = {"file": number + 1, "row": 0, "offset": 0}

    def _documents_of(self, number: int, bytes_before: int) -> Iterator[Document]:
        """The documents of one file that are after the position. bytes_before: of the files before
        it."""
        source = self.source
        file = source.files[number]
        name = source.name_of(file)
        is_one_document = source.is_one_document(file)
        row = self.position["row"]
        offset = self.position["offset"]
        records = formats.read(file, source.record_format, row, offset, source.split_documents)
        for record in records:
            self.position = {"file": number, "row": record.row, "offset": record.offset}
            self.bytes_read = bytes_before + int(source.sizes[number] * record.done)
            place = "" if is_one_document else f":{record.row}"
            yield Document(name + place, f"{file}{place}", record.content, record.problem)


def short_name(entry: str) -> str:
    """The name of a source in folders, records and messages: the last part of its path; of a glob
    the last two."""
    parts = [part for part in Path(entry).parts if part.strip("/.~")]
    count = 2 if glob.has_magic(entry) else 1
    names = [re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts[-count:]]
    return "-".join(name for name in names if name) or "source"
