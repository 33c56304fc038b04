"""Where documents come from: files and folders, datasets of the hub, and Python's own library, as one stream in a fixed order.

sources(data)            what settings.Data names, checked; nothing is read yet
source.documents(at)     the documents from a position on; `.position` says how to go on from here
source.fingerprint()     changes when the documents may have changed
"""

import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from longfire import settings
from longfire.data import formats
from longfire.data.tokens import checksum
from longfire.errors import DataError, SettingsError

HASHED_WHOLE = 16 * 2**20  # larger files: size, time of change, first and last MiB
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
NOT_DOCUMENTS = re.compile(r"(^|/)([._]|README|LICENSE|dataset_infos?\.json$|dataset_dict\.json$|state\.json$)")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class Document(NamedTuple):
    """identity: what decides whether it is held out (relative path and row: the same wherever the folder lies);
    where: file and row for messages; problem: why it has no text, "" if it has one."""

    identity: str
    where: str
    text: str
    problem: str


@dataclass(frozen=True)
class Source:
    """One entry of data.dataset. `files` are sorted by their path relative to `root`."""

    entry: str
    root: Path
    files: tuple[Path, ...]
    fields: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return short_name(self.entry)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(file.stat().st_size for file in self.files)

    def relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def documents(self, position: dict[str, Any] | None = None) -> "Documents":
        return Documents(self, position or {})

    def fingerprint(self) -> str:
        """Of sorted relative names, sizes and contents; for files over 16 MiB instead of the whole content: time of change and
        the first and last MiB."""
        return checksum(
            *(
                f"{self.relative(file)}\0{size}\0{_content(file, size)}\n".encode()
                for file, size in zip(self.files, self.sizes)
            )
        )


def _content(file: Path, size: int) -> str:
    digest = blake2b(digest_size=16)
    with open(file, "rb") as f:
        if size <= HASHED_WHOLE:
            digest.update(f.read())
        else:
            digest.update(f"{file.stat().st_mtime_ns}".encode() + f.read(2**20))
            f.seek(size - 2**20)
            digest.update(f.read())
    return digest.hexdigest()


class Documents:
    """The documents of a source from a position on; iterate once. `position` (JSON) is where to go on after the last one."""

    def __init__(self, source: Source, position: dict[str, Any]) -> None:
        self.source = source
        self.position = {"file": 0, "row": 0, "offset": 0, **position}
        self.bytes_total = sum(source.sizes)
        self.bytes_read = sum(source.sizes[: self.position["file"]])  # of the files as they lie, for progress

    def __iter__(self) -> Iterator[Document]:
        source = self.source
        while self.position["file"] < len(source.files):
            number = self.position["file"]
            file, size = source.files[number], source.sizes[number]
            relative = source.relative(file)
            whole = formats.format_of(file) in formats.TEXT_FORMATS
            before = sum(source.sizes[:number])
            for record in formats.read(file, source.fields, self.position["row"], self.position["offset"]):
                self.position = {"file": number, "row": record.row, "offset": record.offset}
                self.bytes_read = before + int(size * record.done)
                place = "" if whole else f":{record.row}"
                yield Document(relative + place, f"{file}{place}", record.text, record.problem)
            self.position = {"file": number + 1, "row": 0, "offset": 0}


def sources(data: settings.Data) -> tuple[Source, ...]:
    """The sources that the settings name, their files found. Raises SettingsError and DataError naming entry and mend."""
    count = len(data.dataset)
    if not count:
        raise SettingsError("data.dataset is empty: name files, folders, globs, a dataset of the hub, or `embedded`")
    per_source = {
        name: _one_each(name, getattr(data, name), count)
        for name in ("dataset_name", "dataset_split", "data_dir", "data_files", "text_field")
    }
    return tuple(
        _source(entry, data, {name: values[i] for name, values in per_source.items()})
        for i, entry in enumerate(data.dataset)
    )


def shares(data: settings.Data) -> tuple[float, ...]:
    """Each source's share of the tokens, summing to 1."""
    probabilities = data.data_probs or (1.0,) * len(data.dataset)
    if len(probabilities) != len(data.dataset) or not all(0 < p < float("inf") for p in probabilities):
        raise SettingsError(
            f"data.data_probs = {list(probabilities)}: give one positive number for each of the "
            f"{len(data.dataset)} sources in data.dataset"
        )
    return tuple(p / sum(probabilities) for p in probabilities)


def _one_each(name: str, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    if len(values) not in (0, 1, count):
        raise SettingsError(
            f"data.{name} has {len(values)} entries for {count} sources: give one, or one for each (empty "
            f"entries are allowed: `a,,b`)"
        )
    return (values or ("",)) * (count if len(values) < 2 else 1)


def _source(entry: str, data: settings.Data, own: dict[str, str]) -> Source:
    fields = tuple(own["text_field"].split("+")) if own["text_field"] else ()
    if entry == "embedded":
        return Source(entry, *_library(), ())
    path = Path(entry).expanduser()
    if path.is_file():
        _readable(path)
        return Source(entry, path.parent, (path,), fields)
    if path.is_dir():
        return Source(entry, *_folder(entry, path, own), fields)
    raise DataError(f"data.dataset: {entry!r} is no file or folder here")


def _library() -> tuple[Path, tuple[Path, ...]]:
    """Python's own library: its source and the documentation that ships with it, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        f
        for suffix in (".py", ".txt", ".rst")
        for f in root.rglob(f"*{suffix}")
        if not NOT_LIBRARY & set(f.relative_to(root).parts) and not f.is_symlink()
    ]
    if not files:
        raise DataError(f"data.dataset: this Python has no library source in {root}; name files of your own")
    return root, tuple(sorted(files, key=lambda f: f.relative_to(root).as_posix()))


def _folder(entry: str, root: Path, own: dict[str, str]) -> tuple[Path, tuple[Path, ...]]:
    files = [f for f in root.rglob("*") if f.is_file() and formats.format_of(f)]
    files = [f for f in files if not NOT_DOCUMENTS.search(f.relative_to(root).as_posix())]
    if not files:
        raise DataError(f"{root}: no file that we read ({', '.join(formats.FORMATS)}, .gz and .zst of the text ones)")
    return root, tuple(sorted(files, key=lambda f: f.relative_to(root).as_posix()))


def _readable(file: Path) -> None:
    if not formats.format_of(file):
        raise DataError(
            f"{file}: we do not read this kind of file; we read {', '.join(formats.FORMATS)}, "
            f"and .gz and .zst of the text ones"
        )


def short_name(entry: str) -> str:
    """What a source is called in folders, records and messages: the last two parts of its entry."""
    parts = [
        re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in Path(entry).parts if part not in ("/", "~", ".", "..")
    ]
    return "-".join(p for p in parts[-2:] if p) or "source"
