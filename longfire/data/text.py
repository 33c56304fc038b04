"""The sources that the settings name: files and folders, datasets of the hub, Python's own library.

sources(data)                finds and checks what settings.Data names
source.documents(position)   the documents after a position, always in the same order
source.fingerprint           of the content alone
"""

import glob
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from longfire.config import settings
from longfire.data import file_checks, folders, formats
from longfire.data.documents import Source
from longfire.data.files import FileSource
from longfire.data.record_format import RecordFormat
from longfire.data.record_formats import record_format_of
from longfire.errors import DataError, SettingsError
from longfire.listing import is_file, is_folder

EMBEDDED = "embedded"  # the source that names Python's own library
# Left out of it: tests, installed packages, and the tables of character sets, which are numbers
# and not language.
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
LIBRARY_SUFFIXES = (".py", ".txt", ".rst")


def sources(data: settings.Data) -> tuple[Source, ...]:
    """The sources that the settings name. A message says when hashing will take long.

    Raises SettingsError and DataError naming the entry and the fix."""
    count = len(data.dataset)
    if not count:
        raise SettingsError(
            "data.dataset is empty: name files, folders, globs, datasets of the hub, or `embedded`"
        )
    choices = {
        "dataset_name": one_for_each("dataset_name", data.dataset_name, count),
        "dataset_split": one_for_each("dataset_split", data.dataset_split, count),
        "data_dir": one_for_each("data_dir", data.data_dir, count),
        "data_files": one_for_each("data_files", data.data_files, count),
        "text_field": one_for_each("text_field", data.text_field, count),
        "record_format": one_for_each("record_format", data.record_format, count),
    }
    found = []
    for i, entry in enumerate(data.dataset):
        own = {key: values[i] for key, values in choices.items()}
        found.append(source_of(entry, data, own))
    return tuple(found)


def one_for_each(key: str, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The values of a setting that may be given once for all sources, or once for each."""
    if len(values) not in (0, 1, count):
        raise SettingsError(
            f"data.{key} has {len(values)} entries for {count} sources: give one for all, or one "
            "for each (an entry may be empty: `a,,b`)"
        )
    if len(values) == count:
        return values
    return (values or ("",)) * count


def same_for_all(values: tuple[str, ...]) -> tuple[str, ...]:
    """A value that all sources of data.dataset have holds for other texts too; else none does."""
    return values[:1] if len(set(values)) == 1 else ()


def validation_of(data: settings.Data) -> settings.Data:
    """The settings that name data.validation as the dataset, of which no part is kept for
    validation."""
    splits = []
    for entry in data.validation:
        is_local = entry == EMBEDDED or glob.has_magic(entry) or Path(entry).expanduser().exists()
        splits.append("" if is_local else data.validation_split)
    return replace(
        data,
        dataset=data.validation,
        dataset_name=(),
        dataset_split=tuple(splits),
        data_dir=(),
        data_files=(),
        data_probs=(),
        text_field=same_for_all(data.text_field),
        record_format=same_for_all(data.record_format),
        validation=(),
        validation_fraction=0.0,
        streaming=False,
    )


def in_both(validation: Source, trained: Source) -> str:
    """What of a source is in another one too: a file of both, or the whole source, by content and
    under any name; "" if they have nothing in common."""
    if not (isinstance(validation, FileSource) and isinstance(trained, FileSource)):
        if validation.fingerprint and validation.fingerprint == trained.fingerprint:
            return validation.entry
        return ""
    paths = {file.resolve() for file in trained.files}
    digests = []
    for file, content, size in zip(validation.files, validation.contents, validation.sizes):
        if not size:
            continue
        if file.resolve() in paths:
            return str(file)
        digests.append(content.digest)
    trained_digests = {content.digest for content in trained.contents}
    if digests and trained_digests.issuperset(digests):
        return validation.entry
    return ""


def shares(data: settings.Data) -> tuple[float, ...]:
    """Each source's share of the tokens; they sum to 1. Raises SettingsError."""
    probabilities = data.data_probs or (1.0,) * len(data.dataset)
    all_positive = all(0 < probability < float("inf") for probability in probabilities)
    if len(probabilities) != len(data.dataset) or not all_positive:
        raise SettingsError(
            f"data.data_probs = {list(probabilities)}: give one positive number for each of the "
            f"{len(data.dataset)} sources in data.dataset"
        )
    total = sum(probabilities)
    return tuple(probability / total for probability in probabilities)


def source_of(entry: str, data: settings.Data, own: Mapping[str, str]) -> Source:
    """The source of an entry of data.dataset. own: the settings of this entry. Raises DataError."""
    if entry == EMBEDDED:
        return library()
    record_format = record_format_of(data, own["record_format"], own["text_field"])
    path = Path(entry).expanduser()
    if is_file(path):
        if own["data_dir"] or own["data_files"]:
            raise DataError(
                f"{entry}: data_dir and data_files choose inside a folder, and this is a file; "
                "leave them empty"
            )
        chosen = folders.in_file(path)
        description = ""
    elif is_folder(path):
        chosen = folders.in_folder(entry, path, own)
        description = chosen.describe()
    elif glob.has_magic(entry):
        chosen = folders.in_glob(entry, own)
        description = chosen.describe()
    else:
        file_checks.check_links([path])
        return hub_source(entry, data, own, record_format)
    return FileSource(
        entry=entry,
        root=chosen.root,
        files=chosen.files,
        record_format=record_format,
        split_documents=data.split_documents,
        description=description,
        folder=data.folder,
    )


def library() -> FileSource:
    """`embedded`: the source and the documentation that ship with the running Python, without what
    NOT_LIBRARY names. Raises DataError."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in folders.all_files(root, NOT_LIBRARY):
        if file.suffix in LIBRARY_SUFFIXES and not file.is_symlink() and file.stat().st_size:
            files.append(file)
    if not files:
        raise DataError(
            f"data.dataset = embedded: no library source in {root}; name files of your own"
        )
    return FileSource(EMBEDDED, root, tuple(files))


def hub_source(
    entry: str, data: settings.Data, own: Mapping[str, str], record_format: RecordFormat
) -> Source:
    """`owner/name`, `owner/name/folder/inside` or `name`, unless it is clearly a path. Raises
    DataError."""
    is_path = entry.startswith((".", "/", "~")) or formats.format_of(Path(entry))
    if is_path or not re.fullmatch(r"[\w.-]+(/[\w. -]+)*", entry):
        raise DataError(f"data.dataset: no such file or folder: {entry!r}")
    parts = entry.split("/")
    folder = "/".join(parts[2:])
    if folder and own["data_dir"]:
        raise DataError(
            f"{entry}: {folder!r} is already a folder inside the dataset; leave data.data_dir empty"
        )
    # Two seconds of imports: only those who read from the hub pay them.
    from longfire.data.hub import HubSource

    return HubSource(
        repository="/".join(parts[:2]),
        streaming=data.streaming,
        trust_remote_code=data.trust_remote_code,
        record_format=record_format,
        dataset_name=own["dataset_name"],
        dataset_split=own["dataset_split"],
        data_dir=folder or own["data_dir"],
        data_files=own["data_files"],
    )
