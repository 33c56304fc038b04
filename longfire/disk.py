"""Files and folders that are complete or absent, and those that one process holds: what everyone
who writes relies on."""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from longfire.aside import file_aside
from longfire.listing import exists
from longfire.regular_files import open_without_link


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file so that after a kill at any moment it is the old one or the new one, never a
    part. Text as UTF-8. A link that has the name is replaced, and its target stays as it is."""
    with file_aside(file) as (aside, opened):
        opened.write(content.encode() if isinstance(content, str) else content)
        opened.flush()
        os.fsync(opened.fileno())
        os.rename(aside, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """A file, or the names in a folder, reach the disk and not only its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(aside: Path, place: Path) -> None:
    """A folder that was written aside takes its place by one rename. One that is there steps aside
    first, as `<place>.before`, where a kill in between leaves it."""
    before = place.with_name(f"{place.name}.before")
    if place.is_symlink():
        place.unlink()  # its target stays
    elif exists(place):
        shutil.rmtree(before, ignore_errors=True)
        place.rename(before)
    aside.rename(place)
    sync(place.parent)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def held(lock: Path, taken: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file. While another process holds it, `taken` is given its name; unless that
    raises, we wait.

    The lock belongs to the open file (flock): the kernel takes it from a process that dies, so it
    is never stale.
    """
    with open_without_link(lock, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            taken(file.read().decode(errors="replace") or "another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield
        file.truncate(0)
