"""Checks of the files of a source before they are read. Each raises DataError with the fix."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from longfire.data import formats
from longfire.data.chosen_files import ChosenFiles, some
from longfire.errors import DataError
from longfire.listing import exists, paths_in
from longfire.regular_files import open_regular, refuse_irregular

NUMBERED = re.compile(r"^(?P<before>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<after>.*)$")
# The hash of a part, which `push_to_hub` once put behind -of-00003.
HASH = re.compile(r"^-[0-9a-f]{8,}(?=\.)")
POINTERS = (b"version https://git-lfs.github.com/spec/", b"# xet version", b"/annex/objects/")
POINTER_BYTES = 1024  # a pointer is no larger
MAX_PARTS = 10**6  # of a numbered series; a larger number is no count of files


def readable_formats() -> str:
    """For messages."""
    return f"{', '.join(formats.FORMATS)}; the text ones also as .gz, .bz2, .xz and .zst"


def check_files(chosen: ChosenFiles, is_folder: bool) -> ChosenFiles:
    """Check the files, and keep each only once where links name it again.

    is_folder: a folder was named, so a missing part of a numbered series is an error.
    """
    for file in chosen.files:
        check_inside(file, chosen.root)
    originals = {file.resolve() for file in chosen.files if not file.is_symlink()}
    chosen.keep_where(
        lambda file: not (file.is_symlink() and file.resolve() in originals),
        "links to files that are read",
    )
    check_pointers(chosen.files)
    missing = missing_parts(chosen.files)
    if missing and is_folder:
        raise DataError(
            f"{chosen.root}: parts of a numbered series are missing: {some(missing)}; fetch them, "
            "or choose the parts that you want with data.data_files, as data.data_files = "
            f'"**/*{chosen.files[0].suffix}"'
        )
    if missing:
        reason = "numbered parts that are not there or not chosen"
        chosen.left_out.setdefault(reason, []).extend(missing)
    return chosen


def missing_parts(files: Iterable[Path]) -> list[str]:
    """Names of the parts of `...-00001-of-00003...` that are missing. The first part has number 0
    or 1."""
    series: dict[tuple[Path, str, str, str], set[int]] = {}
    digits: Counter[tuple[Path, str, str, str]] = Counter()
    for file in files:
        found = NUMBERED.match(file.name)
        if found and int(found["number"]) <= int(found["count"]) <= MAX_PARTS:
            key = (file.parent, found["before"], found["count"], HASH.sub("", found["after"]))
            series.setdefault(key, set()).add(int(found["number"]))
            digits[key] = len(found["number"])
    missing = []
    for key, numbers in series.items():
        folder, before, count, after = key
        first = 1 if int(count) in numbers and 0 not in numbers else 0
        expected = set(range(first, first + int(count)))
        for number in sorted(expected - numbers):
            missing.append(str(folder / f"{before}{number:0{digits[key]}d}-of-{count}{after}"))
    return missing


def check_formats(files: Iterable[Path]) -> None:
    """Files that were named must be of a kind that can be read."""
    for file in files:
        if not formats.format_of(file):
            raise DataError(f"{file}: not a kind of file that we read ({readable_formats()})")


def check_links(files: Iterable[Path]) -> None:
    """No link may be without its file, as in a cache of the hub, git-annex or DVC whose content was
    not fetched, or was removed."""
    for file in files:
        if file.is_symlink() and not exists(file):
            raise DataError(
                f"{file}: a link to {os.readlink(file)}, which is not there; fetch its content "
                "(git annex get, dvc pull, hf download), or remove the link"
            )


def check_hub_cache(root: Path) -> None:
    """The hub's cache of a dataset has a folder for each revision, with a card in each: one of them
    must be chosen."""
    if not ((root / "snapshots").is_dir() and (root / "blobs").is_dir()):
        return
    revisions = [folder for folder in paths_in(root / "snapshots") if folder.is_dir()]
    raise DataError(
        f"{root}: the hub's cache of a dataset, which keeps each revision in a folder of its own; "
        f"name one: {some([str(folder) for folder in revisions])}"
    )


def check_pointers(files: Iterable[Path]) -> None:
    """No file may be a small text that stands for a large file which was not fetched."""
    for file in files:
        try:
            refuse_irregular(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        if file.stat().st_size > POINTER_BYTES:
            continue
        with open_regular(file) as opened:
            content = opened.read(POINTER_BYTES)
        if content.startswith(POINTERS):
            raise DataError(
                f"{file}: a pointer of git-LFS (or git-annex), not the file that it stands for; "
                "fetch it with `git lfs pull`"
            )


def leads_out(path: str) -> bool:
    """Whether a path or pattern of the settings or of a card is not below its folder."""
    return Path(path).is_absolute() or ".." in Path(path).parts


def check_inside(path: Path, root: Path) -> Path:
    """The path, which no link may lead out of the source's folder.

    Two stores of content, which tools keep apart from the links to it, count as part of the folder:
    the blobs of the hub's cache, and the objects of git-annex.
    """
    target = path.resolve()
    allowed = [root.resolve(), *content_stores(root.resolve())]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise DataError(
            f"{path}: a link to {target}, outside of {root}; name that place as a source itself"
        )
    return path


def content_stores(root: Path) -> list[Path]:
    """<repository>/blobs of <repository>/snapshots/<commit>/..., and <clone>/.git/annex/objects of
    <clone>/..."""
    stores = []
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            stores.append(folder.parent / "blobs")
        if (folder / ".git" / "annex" / "objects").is_dir():
            stores.append(folder / ".git" / "annex" / "objects")
    return stores
