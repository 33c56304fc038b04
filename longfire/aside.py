"""Files and folders that are written aside, before they take their place: their names, their owner,
and the removal of those whose owner is gone.

    .NAME.0a1b2c3d.aside        the file or folder that will be NAME
    .NAME.0a1b2c3d.aside.lock   of a folder: held by who writes it

The owner holds a lock (flock) on the file itself, or on the lock file of a folder. The kernel takes
it from a process that dies, on whatever machine, so nothing depends on process numbers. On a file
system without locks nothing is removed.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from longfire.listing import exists, is_folder, paths_in
from longfire.regular_files import open_without_link

SUFFIX = ".aside"
LOCK = ".lock"
NAME = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{8}\.aside(?P<lock>\.lock)?$", re.DOTALL)
LONGEST_NAME = 200  # bytes of NAME, of the 255 that file systems allow


def new_path(place: Path) -> Path:
    """A path beside `place` that nobody has."""
    return place.with_name(f".{short(place.name)}.{secrets.token_hex(4)}{SUFFIX}")


def short(name: str) -> str:
    """The beginning of a name that leaves room for what is put around it."""
    return os.fsdecode(os.fsencode(name)[:LONGEST_NAME])


@contextmanager
def file_aside(place: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `place`, held and open for writing. One that has not taken its place at the
    end is removed, by a later start where that fails. Raises OSError."""
    remove_abandoned(place.parent, place.name)
    path, opened = held_file(place, "")
    try:
        with opened:
            yield path, opened
    finally:
        with suppress(OSError):
            path.unlink()


@contextmanager
def folder_aside(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, held. One that has not taken its place at the end is removed, by
    a later start where that fails. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(place.parent, place.name)
    lock, opened = held_file(place, LOCK)
    path = lock.with_name(lock.name.removesuffix(LOCK))
    try:
        with opened:
            path.mkdir()
            yield path
            shutil.rmtree(path, ignore_errors=True)
    finally:
        remove_with_lock(path, lock)


def remove_with_lock(folder: Path, lock: Path) -> None:
    """Remove a folder and then its lock file, by which a later start finds a folder that could not
    be removed now. What cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        if not exists(folder):
            lock.unlink()


def held_file(place: Path, suffix: str) -> tuple[Path, BinaryIO]:
    """A new file beside `place`, with a suffix to its name, that this process holds. Raises
    OSError."""
    while True:
        path = new_path(place)
        path = path.with_name(path.name + suffix)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        opened = open(descriptor, "w+b")  # noqa: SIM115 (the caller closes it)
        is_taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_taken = True
        except OSError:  # a file system without locks
            pass
        if not is_taken and is_at(descriptor, path):
            return path, opened
        opened.close()  # another process took it for abandoned before we held it


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove what was written aside in a folder by processes that are gone: of this name, or of
    all. What cannot be removed stays."""
    with suppress(OSError):
        for path in paths_in(folder):
            found = NAME.match(path.name)
            if (found and name in ("", found["name"])) or (found and found["name"] == short(name)):
                remove_if_abandoned(path, is_lock=bool(found["lock"]))


def remove_all_abandoned(folder: Path) -> None:
    """The same of all names in a folder and in the folders in it, but not behind links."""
    remove_abandoned(folder)
    with suppress(OSError):
        for path in paths_in(folder):
            if is_folder(path) and not path.is_symlink():
                remove_abandoned(path)


def remove_if_abandoned(path: Path, is_lock: bool) -> None:
    """Remove a file that nobody holds, and the folder whose lock it is."""
    with suppress(OSError), open_without_link(path, "r+b") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_lock:
            remove_with_lock(path.with_name(path.name.removesuffix(LOCK)), path)
        else:
            path.unlink()
