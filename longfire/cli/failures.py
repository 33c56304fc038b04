"""What a command says of an error that is not of longfire's own classes: the machine refused
something (rights, disk, memory, threads), or longfire is at fault. Free of torch."""

import errno
import os
import tempfile
import traceback
from dataclasses import dataclass

from longfire.errors import MachineError, first_line

FAULT_EXIT_CODE = 1  # as Python's own for an error that nobody caught

# What to do, by the number of an error of the operating system.
ADVICE = {
    errno.EACCES: "check the rights of this file and of the folders above it",
    errno.EPERM: "check the rights of this file and of the folders above it",
    errno.EROFS: "this file system can only be read: name another folder",
    errno.ENOSPC: "the disk is full: free some space or name another folder",
    errno.EDQUOT: "your share of this disk is used up: free some space or name another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
    errno.ENOTDIR: "a part of this path is a file: name another folder",
    errno.EISDIR: "this is a folder: name a file",
    errno.ENOENT: "it is not there, or was removed in the meantime",
    errno.ELOOP: "its symbolic links lead in a circle: name the file itself",
    errno.EIO: "the device reports an error: check the disk and the kernel's log",
    errno.EMFILE: "raise the limit of open files (`ulimit -n` shows it)",
    errno.ENFILE: "this machine has too many open files: end other programs",
    errno.EPIPE: "another program, to which longfire was writing, has ended",
    errno.EAGAIN: "raise the limit of processes and threads (`ulimit -u` shows it), or set smaller "
    "training.threads and data.num_workers",
    errno.ENOMEM: "end other programs, or choose smaller sizes (`longfire plan` forecasts memory)",
}
# How errors of torch and of Rust's libraries end that are of the operating system
NUMBERED = ("{} ({})", "{} (os error {})")
# Beginnings or parts of errors of Python and torch that have no number.
NO_THREADS = ("can't start new thread",)
NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")


@dataclass(frozen=True)
class Failure:
    """A message without the name of the program, and the exit code."""

    message: str
    exit_code: int


def failure_of(error: Exception) -> Failure:
    """How a command ends that raised this error. Where longfire is at fault, the traceback is
    written to a file of its own, which the message names."""
    refusal = refusal_of(error)
    if refusal:
        return Failure(refusal, MachineError.exit_code)
    message = (
        f"this is a fault of longfire: {type(error).__name__}: {first_line(error)} "
        f"({place_of(error)}). Please report it with the command and its traceback"
    )
    kept = keep_traceback(error)
    hint = f", which is in {kept}" if kept else ", which --traceback shows"
    return Failure(message + hint, FAULT_EXIT_CODE)


def refusal_of(error: Exception) -> str:
    """What the machine refused, and what to do; empty where it did not refuse anything."""
    if isinstance(error, OSError) and error.errno:
        named = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        advice = ADVICE.get(error.errno, "")
        return f"{named}{os.strerror(error.errno)}" + (f": {advice}" if advice else "")
    text = str(error)
    for number, advice in ADVICE.items():
        if any(form.format(os.strerror(number), number) in text for form in NUMBERED):
            return f"{first_line(error)}: {advice}"
    if isinstance(error, MemoryError) or any(part in text for part in NO_MEMORY):
        return f"not enough memory ({first_line(error)}): {ADVICE[errno.ENOMEM]}"
    if any(part in text for part in NO_THREADS):
        return f"no more threads can be started: {ADVICE[errno.EAGAIN]}"
    return ""


def place_of(error: Exception) -> str:
    """Where in the code the error arose: its last place in longfire, else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}longfire{os.sep}" in frame.filename]
    if not frames:
        return "no place is known"
    last = (own or frames)[-1]
    return f"{os.path.basename(last.filename)}, line {last.lineno}, in {last.name}"


def keep_traceback(error: Exception) -> str:
    """Write the traceback to a new file among the temporary ones; its name, empty where none
    could be written."""
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, name = tempfile.mkstemp(".txt", "longfire-traceback-")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return ""
    return name
