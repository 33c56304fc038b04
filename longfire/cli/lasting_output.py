"""Output of a command that must not end because its reader has: `longfire train | tee log` goes on
when tee is gone."""

import io
import os
import sys


class LastingFile(io.FileIO):
    """A file descriptor to write to. When it cannot be written any more (its reader has ended, the
    disk is full), what follows goes nowhere, and one warning is written to `other`."""

    def __init__(self, descriptor: int, name: str, other: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.shown_name = name
        self.other = other

    def write(self, content: object, /) -> int:
        assert isinstance(content, bytes | memoryview), "a BufferedWriter writes nothing else"
        try:
            return super().write(content)
        except BlockingIOError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            warn(self.other, f"{self.shown_name} cannot be written any more ({error.strerror})")
            return super().write(content)


def warn(descriptor: int, what: str) -> None:
    """One line on a file descriptor, if it can be written."""
    line = f"warning: {what}: the run goes on, its lines are in metrics.jsonl only\n"
    try:
        os.write(descriptor, line.encode())
    except OSError:
        return


def let_output_end() -> None:
    """From now on the readers of stdout and stderr may end without ending this process. Streams
    that are no file descriptors (in a notebook, in a test) stay as they are."""
    stdout, stderr = sys.stdout, sys.stderr
    if stdout is sys.__stdout__ and isinstance(stdout, io.TextIOWrapper):
        sys.stdout = lasting(stdout, "stdout", stderr.fileno())
    if stderr is sys.__stderr__ and isinstance(stderr, io.TextIOWrapper):
        sys.stderr = lasting(stderr, "stderr", stdout.fileno())


def lasting(stream: io.TextIOWrapper, name: str, other: int) -> io.TextIOWrapper:
    """A stream on the same descriptor that lasts. other: the descriptor for its warning."""
    stream.flush()
    file = LastingFile(stream.fileno(), name, other)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
