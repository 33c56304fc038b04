"""Where documents come from: files and folders, datasets of the hub, Python's own library; each in one fixed order.

sources(data)          what settings.Data names, found and checked
source.documents(at)   the documents from a position on; `.position` of what it returns is where to go on
source.fingerprint     changes when the documents may have changed
"""

import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from longfire import settings
from longfire.data import formats
from longfire.data.formats import Document
from longfire.data.tokens import checksum
from longfire.errors import DataError, SettingsError

HASHED_WHOLE = 16 * 2**20  # bytes; of a larger file: size, time of change, first and last MiB
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval"},
}
# Left out of the embedded corpus: tests, what was installed, and the tables of character sets, which are numbers, not language.
NOT_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
    "encodings",
}
ABOUT_DATA = re.compile(
    r"(^|/)(\.|(dataset_infos?|dataset_dict|state)\.json$|cache-[0-9a-f]+\.arrow$)"
)  # of `datasets`
BESIDE_DATA = re.compile(
    r"(^|/)(README|LICENSE)[^/]*$|\.py$"
)  # text files that are no documents where there are data files


class Documents(Protocol):
    """The documents of a source from a position on; iterated once."""

    position: dict[str, Any]  # JSON: where to go on after the last document
    bytes_read: int  # of `Source.bytes_total`, for progress

    def __iter__(self) -> Iterator[Document]: ...


class Source(Protocol):
    """An entry of data.dataset. `parts` are its files where it has several, so that a sample can come from all over it."""

    entry: str
    name: str
    fields: tuple[str, ...]  # whose texts are joined; () is `text`, else `content`
    bytes_total: int  # as it lies, compressed or not; 0: unknown
    fingerprint: str  # changes when the documents may have changed
    parts: int
    split_documents: str  # how its text files become documents

    def documents(self, position: dict[str, Any] | None = None) -> Documents: ...

    def part(self, number: int) -> Iterator[Document]: ...

    def identities(self) -> Iterator[str]: ...


@dataclass(frozen=True)
class FileSource:
    """Files, sorted by their path relative to `root`."""

    entry: str
    root: Path
    files: tuple[Path, ...]
    fields: tuple[str, ...] = ()
    split_documents: str = ""  # of text files (settings.Data)

    @property
    def name(self) -> str:
        return short_name(self.entry)

    def name_of(self, file: Path) -> str:
        """How the file is called in the identities of its documents: the same wherever the folder lies."""
        return relative(file, self.root)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(file.stat().st_size for file in self.files)

    @property
    def bytes_total(self) -> int:
        """Bytes as the files lie."""
        return sum(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """Of the sorted relative names, sizes and contents; of a file over 16 MiB not the whole content, but the time of its
        last change and its first and last MiB."""
        return checksum(
            *(
                f"{relative(file, self.root)}\0{size}\0{_content(file, size)}\n".encode()
                for file, size in zip(self.files, self.sizes)
            )
        )

    def documents(self, position: dict[str, Any] | None = None) -> Documents:
        return FileDocuments(self, position or {})

    def identities(self) -> Iterator[str]:
        """Of its documents that are not empty, in order; where a file is a document it is not read."""
        if not self.split_documents and all(formats.format_of(file) in formats.TEXT_FORMATS for file in self.files):
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
        for number in range(self.position["file"], len(source.files)):
            file, before = source.files[number], sum(source.sizes[:number])
            name = source.name_of(file)
            is_whole = formats.format_of(file) in formats.TEXT_FORMATS and not source.split_documents
            row, offset = self.position["row"], self.position["offset"]
            for record in formats.read(file, source.fields, row, offset, source.split_documents):
                self.position = {"file": number, "row": record.row, "offset": record.offset}
                self.bytes_read = before + int(source.sizes[number] * record.done)
                place = "" if is_whole else f":{record.row}"
                yield Document(name + place, f"{file}{place}", record.text, record.problem)
            self.position = {"file": number + 1, "row": 0, "offset": 0}


def sources(data: settings.Data) -> tuple[Source, ...]:
    """The sources that the settings name. Raises SettingsError and DataError naming the entry and the mend."""
    count = len(data.dataset)
    if not count:
        raise SettingsError("data.dataset is empty: name files, folders, globs, datasets of the hub, or `embedded`")
    keys = ("dataset_name", "dataset_split", "data_dir", "data_files", "text_field")
    own = {key: _one_each(key, getattr(data, key), count) for key in keys}
    return tuple(_source(entry, data, {key: own[key][i] for key in keys}) for i, entry in enumerate(data.dataset))


def validation_of(data: settings.Data) -> settings.Data:
    """The settings that name data.validation as the dataset, of which nothing is held out."""
    is_here = [bool(glob.has_magic(entry) or Path(entry).expanduser().exists()) for entry in data.validation]
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
        heldout_fraction=0.0,
        streaming=False,
    )


def in_both(unseen: Source, trained: Source) -> str:
    """What of a source stands in another one too: a file of both, or the whole source, by content, whatever it is called; ""
    if they have nothing in common. (Of files over HASHED_WHOLE a copy is not found.)"""
    if not (isinstance(unseen, FileSource) and isinstance(trained, FileSource)):
        return unseen.entry if unseen.fingerprint and unseen.fingerprint == trained.fingerprint else ""
    files = [(file, size) for file, size in zip(unseen.files, unseen.sizes) if size]
    sizes = {size for _, size in files}
    alike = [(file, size) for file, size in zip(trained.files, trained.sizes) if size in sizes]
    paths = {file.resolve() for file, _ in alike}
    for file, _ in files:
        if file.resolve() in paths:
            return str(file)
    contents = {_content(file, size) for file, size in alike}
    same = bool(files) and all(_content(file, size) in contents for file, size in files)
    return unseen.entry if same else ""


def shares(data: settings.Data) -> tuple[float, ...]:
    """Each source's share of the tokens; they sum to 1."""
    probabilities = data.data_probs or (1.0,) * len(data.dataset)
    if len(probabilities) != len(data.dataset) or not all(0 < p < float("inf") for p in probabilities):
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


def _source(entry: str, data: settings.Data, own: dict[str, str]) -> Source:
    if entry == "embedded":
        return _library()
    fields = _fields(own["text_field"])
    path = Path(entry).expanduser()
    if glob.has_magic(entry) and not path.exists():
        return FileSource(entry, *_globbed(entry, own), fields, data.split_documents)
    if path.is_file():
        if own["data_dir"] or own["data_files"]:
            raise DataError(
                f"{entry}: data_dir and data_files choose inside a folder, and this is a file; leave them empty"
            )
        return FileSource(entry, path.parent, _readable([path]), fields, data.split_documents)
    if path.is_dir():
        return FileSource(entry, path, _in_folder(entry, path, own), fields, data.split_documents)
    return _on_hub(entry, data, own, fields)


def _fields(text_field: str) -> tuple[str, ...]:
    if set(text_field) & set("[],<"):
        raise SettingsError(
            f"data.text_field = {text_field!r}: one field, or several joined by `+`; loss masks in brackets and special "
            f"words in fields are not supported"
        )
    return tuple(text_field.split("+")) if text_field else ()


def _library() -> FileSource:
    """`embedded`: the source and the documentation that ship with the running Python, without what NOT_LIBRARY names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (f for f in _walk(root, NOT_LIBRARY) if f.suffix in (".py", ".txt", ".rst") and not f.is_symlink())
    files = tuple(file for file in found if file.stat().st_size)
    if not files:
        raise DataError(f"data.dataset = embedded: no library source in {root}; name files of your own")
    return FileSource("embedded", root, files)


def _walk(root: Path, without: set[str] = frozenset()) -> list[Path]:
    """All files below root in the order of their relative paths; a linked folder is one of them, and is not entered."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - without
        found += [Path(folder, name) for name in files]
        found += [link for name in folders if (link := Path(folder, name)).is_symlink()]
    return sorted(found, key=lambda file: relative(file, root))


def _inside(path: Path, root: Path) -> Path:
    """The path, unless a link leads it out of the source's folder (the hub's own cache links inside its repository)."""
    boundary = root.resolve()
    if boundary.parent.name == "snapshots":
        boundary = boundary.parent.parent
    if not path.resolve().is_relative_to(boundary):
        raise DataError(f"{path}: a link to {path.resolve()}, outside of {root}; name that place as a source itself")
    return path


def _in_folder(entry: str, root: Path, own: dict[str, str]) -> tuple[Path, ...]:
    """The files of a folder that the settings choose, in the order of their relative paths."""
    _local_only(entry, own)
    top = root
    for key in ("data_dir", "data_files"):
        if Path(own[key]).is_absolute() or ".." in Path(own[key]).parts:
            raise DataError(f"data.{key} = {own[key]!r} leads out of {root}; give a path inside it")
    if own["data_dir"]:
        top = _inside(root / own["data_dir"], root)
        if not top.is_dir():
            raise DataError(f"data.data_dir = {own['data_dir']!r}: no such folder in {root}")
    if own["data_files"]:
        names = sorted(glob.glob(own["data_files"], root_dir=top, recursive=True))
        files = [top / name for name in names if (top / name).is_file()]
        if not files:
            raise DataError(f"data.data_files = {own['data_files']!r}: no such file in {top}")
        chosen = _readable(files)
    else:
        chosen = _data_files(top)
    return tuple(_inside(file, root) for file in _of_split(entry, chosen, root, own))


def _globbed(entry: str, own: dict[str, str]) -> tuple[Path, tuple[Path, ...]]:
    _local_only(entry, own)
    parts = Path(entry).expanduser().parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    found = (root / name for name in glob.glob(str(Path(*parts[plain:])), root_dir=root, recursive=True))
    files = sorted((file for file in found if file.is_file()), key=lambda file: relative(file, root))
    if not files:
        raise DataError(f"data.dataset: no file matches {entry!r}")
    chosen = _of_split(entry, _readable(files), root, {**own, "data_files": "*"})
    return root, tuple(_inside(file, root) for file in chosen)


def _local_only(entry: str, own: dict[str, str]) -> None:
    if own["dataset_name"]:
        raise DataError(
            f"data.dataset_name = {own['dataset_name']!r} is for datasets of the hub, and {entry} lies here; choose "
            f"files with data_dir or data_files"
        )


def _data_files(folder: Path) -> tuple[Path, ...]:
    """All that we read in a folder, without what describes or accompanies the data."""
    found = [_inside(path, folder) if path.is_dir() else path for path in _walk(folder)]
    files = [f for f in found if f.is_file() and formats.format_of(f) and not ABOUT_DATA.search(relative(f, folder))]
    if any(formats.format_of(file) not in formats.TEXT_FORMATS for file in files):
        files = [file for file in files if not BESIDE_DATA.search(relative(file, folder))]
    if not files:
        raise DataError(f"{folder}: no file in it that we read ({_known()})")
    return tuple(files)


def _of_split(entry: str, files: tuple[Path, ...], root: Path, own: dict[str, str]) -> tuple[Path, ...]:
    """The files of data.dataset_split, by the words of their relative paths (`train-00000.parquet`, `test/a.jsonl`).

    Without the setting: those of `train` where data files are named by splits and were not named one by one, else all.
    Text files are documents, whatever they are called.
    """
    wanted = own["dataset_split"]
    listed = root / "dataset_dict.json"  # what `datasets` saves beside a folder for each split
    if listed.is_file() and not own["data_dir"] and not own["data_files"]:
        names = json.loads(listed.read_text())["splits"]
        return _some(entry, wanted, names, [f for f in files if relative(f, root).split("/")[0] == (wanted or "train")])
    words = {file: set(re.split(r"[^a-z0-9]+", relative(file, root).lower())) for file in files}
    data = [file for file in files if formats.format_of(file) not in formats.TEXT_FORMATS]
    named = [split for split, marks in SPLITS.items() if any(marks & words[file] for file in data)]
    if wanted in ("", "train") and (own["data_files"] or not named):
        return files
    marks = SPLITS.get(wanted or "train", {wanted.lower()})
    return _some(
        entry, wanted, named, [file for file in files if marks & words[file] or (not wanted and file not in data)]
    )


def _some(entry: str, wanted: str, there: list[str], chosen: list[Path]) -> tuple[Path, ...]:
    if not chosen:
        raise DataError(
            f"{entry}: no files of split {wanted or 'train'!r} (splits there: {', '.join(there) or 'none'}); set "
            f"data.dataset_split or data.data_files"
        )
    return tuple(chosen)


def _readable(files: list[Path]) -> tuple[Path, ...]:
    for file in files:
        if not formats.format_of(file):
            raise DataError(f"{file}: not a kind of file that we read ({_known()})")
    return tuple(files)


def _known() -> str:
    return f"{', '.join(formats.FORMATS)}; the text ones also as .gz and .zst"


def _on_hub(entry: str, data: settings.Data, own: dict[str, str], fields: tuple[str, ...]) -> Source:
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
        raise DataError(f"{entry}: {folder!r} is already a folder inside the dataset; leave data.data_dir empty")
    own = {**own, "data_dir": folder or own["data_dir"]}
    from longfire.data.hub import HubSource  # two seconds of imports: only those who read from the hub pay them

    return HubSource(
        "/".join(parts[:2]), data.streaming, data.trust_remote_code, fields, *(own[k] for k in HubSource.CHOICES)
    )


def _content(file: Path, size: int) -> str:
    digest = blake2b(digest_size=16)
    with open(file, "rb") as opened:
        if size <= HASHED_WHOLE:
            digest.update(opened.read())
        else:
            digest.update(f"{file.stat().st_mtime_ns}".encode() + opened.read(2**20))
            opened.seek(size - 2**20)
            digest.update(opened.read())
    return digest.hexdigest()


def relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def short_name(entry: str) -> str:
    """What a source is called in folders, records and messages: the last part of its path; of a glob the last two."""
    parts = [part for part in Path(entry).parts if part.strip("/.~")]
    words = [re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts[-2 if glob.has_magic(entry) else -1 :]]
    return "-".join(word for word in words if word) or "source"
