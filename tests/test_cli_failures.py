"""cli/failures.py: what the machine refuses and what is our fault are messages too."""

import errno
from pathlib import Path

import pytest

from longfire.cli import main
from longfire.cli.commands import COMMANDS
from longfire.cli.failures import ADVICE, FAULT_EXIT_CODE, failure_of
from longfire.errors import MachineError


def raised(error: Exception) -> Exception:
    """The error with the traceback of having been raised here."""
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "x", "data.txt"), "data.txt: Permission denied: check the"),
        (OSError(errno.ENOSPC, "x", "a/metrics.jsonl"), "a/metrics.jsonl: No space left on device"),
        (OSError(errno.ENAMETOOLONG, "x", "aaa"), "aaa: File name too long: the name is too long"),
        (OSError(errno.EMFILE, "x"), "Too many open files: raise the limit"),
        (BlockingIOError(errno.EAGAIN, "x"), "Resource temporarily unavailable: raise the limit"),
        (OSError(errno.EBUSY, "x", b"raw"), "raw: Device or resource busy"),
        (MemoryError(), "not enough memory (MemoryError)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory (CUDA"),
        (
            RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"),
            "unable to open file <a> in read-only mode: Too many open files (24): raise the limit",
        ),
        (Exception("Permission denied (os error 13)"), "Permission denied (os error 13): check"),
        (RuntimeError("can't start new thread"), "no more threads can be started"),
    ],
)
def test_what_the_machine_refuses_is_said_with_what_to_do(error, message):
    failure = failure_of(raised(error))
    assert failure.exit_code == MachineError.exit_code == 6
    assert failure.message.startswith(message)


def test_every_number_has_advice():
    assert all(len(advice) > 20 for advice in ADVICE.values())


def test_a_fault_of_longfire_says_so_and_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    def faulty(words: list[str]) -> int:
        raise KeyError("hidden")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(COMMANDS, "train", faulty)
    assert main(["train"]) == FAULT_EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("longfire: this is a fault of longfire: KeyError: 'hidden' (")
    assert "Traceback" not in error and error.count("\n") == 1
    (kept,) = tmp_path.iterdir()
    assert str(kept) in error
    assert "Traceback (most recent call last)" in kept.read_text()
    with pytest.raises(KeyError):
        main(["train", "--traceback"])


def test_without_a_place_for_the_traceback_the_message_says_how_to_see_it(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(Path("/dev/null/none")))
    assert failure_of(raised(KeyError("x"))).message.endswith("which --traceback shows")
