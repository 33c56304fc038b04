"""What is in a folder. A folder that cannot be read is an error here: Path.glob, glob.glob, os.walk
and, from Python 3.14 on, Path.exists leave out what they may not see. A run would train on a part
of its data, or begin anew beside checkpoints that are there.

A folder that does not exist has nothing in it. Every list is sorted.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from operator import attrgetter
from pathlib import Path

# What a file system keeps for itself, and nobody else may read
OF_FILE_SYSTEM = "lost+found"
# Nothing is there: no such name, a part of the path is a file, links that lead to each other, or a
# name that is too long for any file
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def names_in(folder: Path) -> list[str]:
    """The names in a folder. Raises OSError."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise
    except ValueError:  # a name with a null byte, which no folder has
        return []


def paths_in(folder: Path, pattern: str = "*") -> list[Path]:
    """What is in a folder under names of this pattern, those that begin with a dot too. Raises
    OSError."""
    return [folder / name for name in names_in(folder) if fnmatchcase(name, pattern)]


def hints_in(folder: Path, pattern: str = "*") -> list[Path]:
    """As `paths_in`, for the names that a message proposes: none where the folder cannot be
    read."""
    try:
        return paths_in(folder, pattern)
    except OSError:
        return []


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    """The files at any depth under names of this pattern. Every link is one of them: to a folder,
    which is not entered, and to nothing, so that its reader reports it. Raises OSError."""
    found = []
    for parent, folders, files in walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in files + links if fnmatchcase(name, pattern)]
    return in_order(found)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted as Path compares, but without its comparison, which is slow on Python 3.11."""
    return sorted(paths, key=attrgetter("parts"))


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk: each folder, and the names of the folders and files in it, from the top down. A
    hidden folder and lost+found that cannot be read are left out. Raises OSError for others."""

    def raise_unless_left_out(error: OSError) -> None:
        if error.errno in ABSENT:
            return
        parts = Path(os.path.relpath(error.filename or folder, folder)).parts
        is_hidden = any(part.startswith(".") and part != ".." for part in parts)
        if not is_hidden and OF_FILE_SYSTEM not in parts:
            raise error

    return os.walk(folder, onerror=raise_unless_left_out)


def matches(folder: Path, pattern: str) -> list[Path]:
    """What a pattern means in a folder, as glob.glob(pattern, root_dir=folder, recursive=True) has
    it: `**` is any number of folders, and a name that begins with a dot is matched by such a
    pattern only. lost+found is matched by its whole name only. Raises OSError."""
    return in_order(set(each_match(folder, pattern)))


def has_match(folder: Path, pattern: str) -> bool:
    """Whether there is anything that a pattern means in a folder. Raises OSError."""
    return any(True for _ in each_match(folder, pattern))


def each_match(folder: Path, pattern: str) -> Iterator[Path]:
    """What a pattern means in a folder, some of it twice. Raises OSError."""
    for path in matches_of_parts(folder, Path(pattern).parts):
        if not pattern.endswith("/") or is_folder(path):
            yield path


def matches_of_parts(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """What the parts of a pattern mean in a folder, some of it twice. Raises OSError."""
    if not parts:
        yield folder
        return
    is_last = len(parts) == 1
    for path in matches_of_part(folder, parts[0], is_last):
        if is_last:
            yield path
        else:
            yield from matches_of_parts(path, parts[1:])


def matches_of_part(folder: Path, part: str, is_last: bool) -> Iterator[Path]:
    """What one part of a pattern means in a folder. Raises OSError."""
    if part == "**":
        if is_folder(folder):
            yield folder
            yield from visible_below(folder, with_files=is_last)
    elif not has_magic(part):
        if exists(folder / part, follow_links=False):
            yield folder / part
    else:
        for path in paths_in(folder, part):
            if part.startswith(".") or is_visible(path.name):
                yield path


def visible_below(folder: Path, with_files: bool) -> Iterator[Path]:
    """The folders, and files, at any depth whose names do not begin with a dot; linked folders are
    entered, but none twice on one way down. Raises OSError."""
    for entry in entries_in(folder):
        if not is_visible(entry.name):
            continue
        path = folder / entry.name
        # An entry knows its kind, which spares a network file system a request for each file
        is_link = entry.is_symlink()
        is_inner = is_folder(path) if is_link else entry.is_dir(follow_symlinks=False)
        if is_inner or with_files:
            yield path
        if is_inner and not (is_link and is_above(path)):
            yield from visible_below(path, with_files)


def entries_in(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, with its kinds. Raises OSError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=attrgetter("name"))
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise


def is_visible(name: str) -> bool:
    """Whether a pattern matches this name, without naming it."""
    return not name.startswith(".") and name != OF_FILE_SYSTEM


def is_above(link: Path) -> bool:
    """Whether a link leads to one of the folders that it is in."""
    return any(link.samefile(parent) for parent in link.parents)


def is_file(path: Path) -> bool:
    """Whether a regular file, or a link to one, is there. Raises OSError where that cannot be
    found out."""
    return has_mode(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """Whether a folder, or a link to one, is there. Raises OSError as `is_file`."""
    return has_mode(path, stat.S_ISDIR)


def exists(path: Path, follow_links: bool = True) -> bool:
    """Whether something is there, with follow_links=False also a link that leads nowhere. Raises
    OSError as `is_file`."""
    return has_mode(path, lambda mode: True, follow_links)


def has_mode(
    path: Path,
    is_kind: Callable[[int], bool],
    follow_links: bool = True,
) -> bool:
    """Whether something is there whose mode is of this kind. Raises OSError."""
    try:
        return is_kind(os.stat(path, follow_symlinks=follow_links).st_mode)
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise
    except ValueError:  # a name with a null byte, which no file has
        return False
