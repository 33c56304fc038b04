"""Where documents come from: files and folders, datasets of the hub, Python's own library; each in
one fixed order.

sources(data)          what settings.Data names, found and checked
source.documents(at)   the documents from a position on; `.position` of what it returns is where to go on
source.fingerprint     of the content alone: changes when the documents may have changed
"""

import glob
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from longfire.config import settings
from longfire.data import fingerprints, folders, formats
from longfire.data.fingerprints import Content
from longfire.data.folders import relative
from longfire.data.formats import Document
from longfire.data.tokens import checksum
from longfire.errors import DataError, SettingsError

# Left out of the embedded corpus: tests, what was installed, and the tables of character sets,
# which are numbers, not language.
NOT_LIBRARY = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "__pycache__",
        "encodings",
    }
)


class Documents(Protocol):
    """The documents of a source from a position on; iterated once."""

    position: dict[str, Any]  # JSON: where to go on after the last document
    bytes_read: int  # of `Source.bytes_total`, for progress

    def __iter__(self) -> Iterator[Document]: ...


class Source(Protocol):
    """An entry of data.dataset. `parts` are its files where it has several, so that a sample can
    come from all over it."""

    entry: str
    name: str
    fields: tuple[str, ...]  # whose texts are joined; () is `text`, else `content`
    bytes_total: int  # as it lies, compressed or not; 0: unknown
    fingerprint: str  # changes when the documents may have changed
    former_fingerprint: str  # of the same documents, as it was before
    parts: int
    split_documents: str  # how its text files become documents
    description: (
        str  # what of a folder is read and what is left out; "" where nothing was chosen from
    )

    def documents(self, position: dict[str, Any] | None = None) -> Documents: ...

    def part(self, number: int) -> Iterator[Document]: ...

    def changed(self, first: int, stop: int) -> str: ...

    def identities(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class FileSource:
    """Files, sorted by their path relative to `root`.

    description: what of a folder or a glob is read and what is left out; folder: where hashes of files are
    remembered (data.folder);
    note: who is told that hashing will take long.
    """

    entry: str
    root: Path
    files: tuple[Path, ...]
    fields: tuple[str, ...] = ()
    split_documents: str = ""  # of text files (settings.Data)
    description: str = ""
    folder: str = ""
    note: fingerprints.Note | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return short_name(self.entry)

    def name_of(self, file: Path) -> str:
        """How the file is called in the identities of its documents: the same wherever the folder
        lies."""
        return relative(file, self.root)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(file.stat().st_size for file in self.files)

    @property
    def bytes_total(self) -> int:
        """Bytes as the files lie."""
        return sum(self.sizes)

    @cached_property
    def contents(self) -> list[Content]:
        """What each file held when it was first asked for, in this order."""
        return fingerprints.contents_of(self.files, self.folder, self.note)

    @cached_property
    def fingerprint(self) -> str:
        """Of the sorted relative names, sizes and contents."""
        return self.fingerprint_of([content.digest for content in self.contents])

    @property
    def former_fingerprint(self) -> str:
        """As it was before large files were hashed whole: where the stores of then are found."""
        files = list(zip(self.files, self.contents))
        return self.fingerprint_of(
            [fingerprints.former_digest(file, content) for file, content in files]
        )

    def fingerprint_of(self, digests: list[str]) -> str:
        lines = []
        for file, content, digest in zip(self.files, self.contents, digests):
            lines.append(
                os.fsencode(relative(file, self.root))
                + f"\0{content.stamp.size}\0{digest}\n".encode()
            )
        return checksum(*lines)

    def changed(self, first: int, stop: int) -> str:
        """Which of the files [first, stop) holds something else than when its fingerprint was
        taken; "" if none does. A file that was only touched does not."""
        for number in range(first, min(stop, len(self.files))):
            file, before = self.files[number], self.contents[number]
            now = fingerprints.stamp_of(file)
            if now != before.stamp:
                if now.size != before.stamp.size:
                    return f"{file}: it has {now.size:,} bytes, and had {before.stamp.size:,} when preparation began"
                if fingerprints.content_of(file).digest != before.digest:
                    return f"{file}: it does not hold what it did when preparation began"
                self.contents[number] = Content(before.digest, now)
        return ""

    def documents(self, position: dict[str, Any] | None = None) -> Documents:
        return FileDocuments(self, position or {})

    def identities(self) -> Iterator[str]:
        """Of its documents that are not empty, in order; where a file is a document it is not
        read."""
        if not self.split_documents and all(
            formats.format_of(file) in formats.TEXT_FORMATS for file in self.files
        ):
            yield from (self.name_of(file) for file, size in zip(self.files, self.sizes) if size)
        else:
            yield from (document.identity for document in self.documents() if document.text)

    @property
    def parts(self) -> int:
        return len(self.files)

    def part(self, number: int) -> Iterator[Document]:
        """The documents of one file."""
        return iter(replace(self, files=self.files[number : number + 1]).documents())


class FileDocuments:
    def __init__(self, source: FileSource, position: dict[str, Any]) -> None:
        self.source = source
        self.position = {"file": 0, "row": 0, "offset": 0, **position}
        self.bytes_read = sum(source.sizes[: self.position["file"]])

    def __iter__(self) -> Iterator[Document]:
        source = self.source
        before = sum(source.sizes[: self.position["file"]])
        for number in range(self.position["file"], len(source.files)):
            file = source.files[number]
            name = source.name_of(file)
            is_whole = (
                formats.format_of(file) in formats.TEXT_FORMATS and not source.split_documents
            )
            row, offset = self.position["row"], self.position["offset"]
            for record in formats.read(file, source.fields, row, offset, source.split_documents):
                self.position = {"file": number, "row": record.row, "offset": record.offset}
                self.bytes_read = before + int(source.sizes[number] * record.done)
                place = "" if is_whole else f":{record.row}"
                yield Document(name + place, f"{file}{place}", record.text, record.problem)
            before += source.sizes[number]
            self.position = {"file": number + 1, "row": 0, "offset": 0}


def sources(data: settings.Data, note: fingerprints.Note | None = None) -> tuple[Source, ...]:
    """The sources that the settings name. note: who is told that hashing will take long.

    Raises SettingsError and DataError naming the entry and the fix."""
    count = len(data.dataset)
    if not count:
        raise SettingsError(
            "data.dataset is empty: name files, folders, globs, datasets of the hub, or `embedded`"
        )
    keys = ("dataset_name", "dataset_split", "data_dir", "data_files", "text_field")
    own = {key: _one_each(key, getattr(data, key), count) for key in keys}
    return tuple(
        _source(entry, data, {key: own[key][i] for key in keys}, note)
        for i, entry in enumerate(data.dataset)
    )


def validation_of(data: settings.Data) -> settings.Data:
    """The settings that name data.validation as the dataset, of which nothing is held out."""
    is_here = [
        bool(glob.has_magic(entry) or Path(entry).expanduser().exists())
        for entry in data.validation
    ]
    one_for_all = data.text_field if len(set(data.text_field)) == 1 else ()
    return replace(
        data,
        dataset=data.validation,
        dataset_name=(),
        dataset_split=tuple(
            "" if here or entry == "embedded" else data.validation_split
            for entry, here in zip(data.validation, is_here)
        ),
        data_dir=(),
        data_files=(),
        data_probs=(),
        text_field=one_for_all[:1],
        validation=(),
        validation_fraction=0.0,
        streaming=False,
    )


def in_both(unseen: Source, trained: Source) -> str:
    """What of a source stands in another one too: a file of both, or the whole source, by content,
    whatever it is called; "" if they have nothing in common."""
    if not (isinstance(unseen, FileSource) and isinstance(trained, FileSource)):
        return (
            unseen.entry if unseen.fingerprint and unseen.fingerprint == trained.fingerprint else ""
        )
    files = [
        (file, content.digest)
        for file, content, size in zip(unseen.files, unseen.contents, unseen.sizes)
        if size
    ]
    paths = {file.resolve() for file in trained.files}
    for file, _ in files:
        if file.resolve() in paths:
            return str(file)
    trained_on = {content.digest for content in trained.contents}
    same = bool(files) and all(digest in trained_on for _, digest in files)
    return unseen.entry if same else ""


def shares(data: settings.Data) -> tuple[float, ...]:
    """Each source's share of the tokens; they sum to 1."""
    probabilities = data.data_probs or (1.0,) * len(data.dataset)
    if len(probabilities) != len(data.dataset) or not all(
        0 < p < float("inf") for p in probabilities
    ):
        raise SettingsError(
            f"data.data_probs = {list(probabilities)}: give one positive number for each of the "
            f"{len(data.dataset)} sources in data.dataset"
        )
    return tuple(p / sum(probabilities) for p in probabilities)


def _one_each(key: str, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    if len(values) not in (0, 1, count):
        raise SettingsError(
            f"data.{key} has {len(values)} entries for {count} sources: give one for all, or one for each "
            f"(an entry may be empty: `a,,b`)"
        )
    return values if len(values) == count else (values or ("",)) * count


def _source(
    entry: str, data: settings.Data, own: dict[str, str], note: fingerprints.Note | None
) -> Source:
    if entry == "embedded":
        return _library()
    fields = _fields(own["text_field"])
    path = Path(entry).expanduser()
    if path.is_file():
        if own["data_dir"] or own["data_files"]:
            raise DataError(
                f"{entry}: data_dir and data_files choose inside a folder, and this is a file; leave them empty"
            )
        chosen = folders.in_file(path)
    elif path.is_dir():
        chosen = folders.in_folder(entry, path, own)
    elif glob.has_magic(entry):
        chosen = folders.in_glob(entry, own)
    else:
        folders.refuse_dangling([path])
        return _on_hub(entry, data, own, fields)
    told = "" if path.is_file() else chosen.describe()
    return FileSource(
        entry, chosen.root, chosen.files, fields, data.split_documents, told, data.folder, note
    )


def _fields(text_field: str) -> tuple[str, ...]:
    if set(text_field) & set("[],<"):
        raise SettingsError(
            f"data.text_field = {text_field!r}: one field, or several joined by `+`; loss masks in brackets and special "
            f"words in fields are not supported"
        )
    return tuple(text_field.split("+")) if text_field else ()


def _library() -> FileSource:
    """`embedded`: the source and the documentation that ship with the running Python, without what
    NOT_LIBRARY names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (
        f
        for f in folders.walk(root, NOT_LIBRARY)
        if f.suffix in (".py", ".txt", ".rst") and not f.is_symlink()
    )
    files = tuple(file for file in found if file.stat().st_size)
    if not files:
        raise DataError(
            f"data.dataset = embedded: no library source in {root}; name files of your own"
        )
    return FileSource("embedded", root, files)


def _on_hub(
    entry: str, data: settings.Data, own: dict[str, str], fields: tuple[str, ...]
) -> Source:
    """`owner/name`, `owner/name/folder/inside` or `name`, unless it is plainly a path."""
    parts = entry.split("/")
    if (
        entry.startswith((".", "/", "~"))
        or formats.format_of(Path(entry))
        or not re.fullmatch(r"[\w.-]+(/[\w. -]+)*", entry)
    ):
        raise DataError(f"data.dataset: no such file or folder: {entry!r}")
    folder = "/".join(parts[2:])
    if folder and own["data_dir"]:
        raise DataError(
            f"{entry}: {folder!r} is already a folder inside the dataset; leave data.data_dir empty"
        )
    own = {**own, "data_dir": folder or own["data_dir"]}
    from longfire.data.hub import (
        HubSource,
    )  # two seconds of imports: only those who read from the hub pay them

    return HubSource(
        "/".join(parts[:2]),
        data.streaming,
        data.trust_remote_code,
        fields,
        *(own[k] for k in HubSource.CHOICES),
    )


def short_name(entry: str) -> str:
    """What a source is called in folders, records and messages: the last part of its path; of a
    glob the last two."""
    parts = [part for part in Path(entry).parts if part.strip("/.~")]
    words = [
        re.sub(r"[^\w.]+", "-", part).strip("-")
        for part in parts[-2 if glob.has_magic(entry) else -1 :]
    ]
    return "-".join(word for word in words if word) or "source"
