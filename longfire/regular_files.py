"""Opening files that others have named or brought: only regular ones, and at once.

Opening a FIFO waits for somebody who writes into it, a device may never end, and a link may lead
anywhere: what is opened here can be none of them.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal, cast

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
WITHOUT_WAITING = os.O_NONBLOCK | os.O_CLOEXEC


class IrregularFileError(OSError):
    """A folder, a FIFO, a device or a socket where a regular file is expected."""


def refuse_irregular(file: Path) -> None:
    """Raises IrregularFileError for a folder, a FIFO, a socket or a device, without opening it, and
    FileNotFoundError."""
    refuse_kind(os.stat(file).st_mode, file)


def refuse_kind(mode: int, file: Path) -> None:
    """Raises IrregularFileError where the mode of a file is not that of a regular one."""
    if stat.S_ISDIR(mode):
        raise IrregularFileError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        reason = f"it is {kind}, and a regular file is expected"
        raise IrregularFileError(errno.EINVAL, reason, str(file))


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for others."""
    refuse_irregular(file)
    descriptor = os.open(file, os.O_RDONLY | WITHOUT_WAITING)
    return checked(descriptor, file, "rb")


def read_regular(file: Path) -> bytes:
    """The bytes of a regular file. Raises OSError for others."""
    with open_regular(file) as opened:
        return opened.read()


def open_without_link(file: Path, mode: Literal["ab", "a+b", "r+b"]) -> BinaryIO:
    """Open a file of our own for writing, one that is no link: a folder that was brought along
    could have one that leads to another file of the user. `ab` and `a+b` make a file that is
    missing. Raises OSError."""
    access = os.O_WRONLY if mode == "ab" else os.O_RDWR
    if mode != "r+b":
        access |= os.O_CREAT | os.O_APPEND
    try:
        descriptor = os.open(file, access | os.O_NOFOLLOW | WITHOUT_WAITING, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "it is a symbolic link, and is not written through"
            raise OSError(errno.ELOOP, reason, str(file)) from error
        raise
    return checked(descriptor, file, mode)


def refuse_link(folder: Path) -> None:
    """Raises OSError for a folder that is a link: one that was brought along could lead
    anywhere."""
    if folder.is_symlink():
        reason = "it is a symbolic link, and is not written through"
        raise OSError(errno.ELOOP, reason, str(folder))


def checked(
    descriptor: int,
    file: Path,
    mode: Literal["rb", "ab", "a+b", "r+b"],
) -> BinaryIO:
    """The open file of a descriptor. Raises OSError, and closes it, where it is not regular."""
    try:
        refuse_kind(os.fstat(descriptor).st_mode, file)
    except OSError:
        os.close(descriptor)
        raise
    return cast(BinaryIO, open(descriptor, mode))
