"""What is in a folder. A folder that cannot be read is an error here: Path.glob, glob.glob, os.walk
and, from Python 3.14 on, Path.exists leave out what they may not see. A run would train on a part
of its data, or begin anew beside checkpoints that are there.

A folder that does not exist has nothing in it. Every list is sorted.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

# What a file system keeps for itself, and nobody else may read
OF_FILE_SYSTEM = "lost+found"
# Nothing is there: no such name, a part of the path is a file, or links that lead to each other
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def names_in(folder: Path) -> list[str]:
    """The names in a folder. Raises OSError."""
    if not is_folder(folder):
        return []
    return sorted(os.listdir(folder))


def paths_in(folder: Path, pattern: str = "*") -> list[Path]:
    """What is in a folder under names of this pattern, those that begin with a dot too. Raises
    OSError."""
    return [folder / name for name in names_in(folder) if fnmatchcase(name, pattern)]


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    """The files at any depth under names of this pattern. A linked folder is not entered. Raises
    OSError."""
    found = []
    for parent, _, names in walk(folder):
        found += [Path(parent, name) for name in names if fnmatchcase(name, pattern)]
    return sorted(path for path in found if is_file(path))


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk: each folder, and the names of the folders and files in it, from the top down. A
    hidden folder and lost+found that cannot be read are left out. Raises OSError for others."""

    def raise_unless_hidden(error: OSError) -> None:
        relative = os.path.relpath(error.filename, folder)
        parts = Path(relative).parts
        is_hidden = any(part.startswith(".") and part != ".." for part in parts)
        if not is_hidden and OF_FILE_SYSTEM not in parts:
            raise error

    return os.walk(folder, onerror=raise_unless_hidden)


def matches(folder: Path, pattern: str) -> list[Path]:
    """What a pattern means in a folder, as glob.glob(pattern, root_dir=folder, recursive=True) has
    it: `**` is any number of folders, and a name that begins with a dot is matched by such a
    pattern only. Raises OSError."""
    parts = Path(pattern).parts
    found = [folder]
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        following = []
        for path in found:
            following += matches_of_part(path, part, is_last)
        found = following
    return sorted(set(found))


def matches_of_part(folder: Path, part: str, is_last: bool) -> list[Path]:
    """What one part of a pattern means in a folder. Raises OSError."""
    if part == "**":
        below = visible_below(folder, with_files=is_last)
        return [folder, *below] if is_folder(folder) else []
    if not has_magic(part):
        return [folder / part] if exists(folder / part, follow_links=False) else []
    found = paths_in(folder, part)
    if part.startswith("."):
        return found
    return [path for path in found if not path.name.startswith(".")]


def visible_below(folder: Path, with_files: bool) -> list[Path]:
    """The folders, and files, at any depth whose names do not begin with a dot; linked folders are
    entered, but none twice on one way down. Raises OSError."""
    found: list[Path] = []
    for path in paths_in(folder):
        if path.name.startswith(".") or path.name == OF_FILE_SYSTEM:
            continue
        is_inner = is_folder(path)
        if is_inner or with_files:
            found.append(path)
        if is_inner and not is_above(path):
            found += visible_below(path, with_files)
    return found


def is_above(path: Path) -> bool:
    """Whether a link leads to one of the folders that it is in."""
    return path.is_symlink() and any(path.samefile(parent) for parent in path.parents)


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
