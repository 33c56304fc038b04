"""disk.py: files and folders are the old or the new ones, whatever fails in between; a lock says who holds it."""

import os
import subprocess
import sys

import pytest

from longfire.disk import held, put_in_place, write_whole


def fails(*_: object) -> None:
    raise OSError("full")


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    write_whole(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"


def test_text_is_utf_8(tmp_path):
    write_whole(tmp_path / "f", "Größe 三")
    assert (tmp_path / "f").read_bytes() == "Größe 三".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def folder(path, content: str):
    path.mkdir()
    (path / "f").write_text(content)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path):
    place = folder(tmp_path / "place", "old")
    put_in_place(folder(tmp_path / "aside", "new"), place)
    assert (place / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_folder_that_stepped_aside_is_not_lost(tmp_path, monkeypatch):
    place, aside = folder(tmp_path / "place", "old"), folder(tmp_path / "aside", "new")
    real = type(aside).rename
    monkeypatch.setattr(
        type(aside), "rename", lambda path, to: fails() if path == aside else real(path, to)
    )
    with pytest.raises(OSError, match="full"):
        put_in_place(aside, place)
    assert (tmp_path / "place.before" / "f").read_text() == "old"


HOLD = """
import sys
from pathlib import Path
from longfire.disk import held
with held(Path(sys.argv[1]), print):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_lock_says_who_holds_it_and_who_will_not_wait_raises(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"

    def refuse(holder: str) -> None:
        raise RuntimeError(holder)

    with (
        pytest.raises(RuntimeError, match=f"^process {other.pid} on "),
        held(tmp_path / "lock", refuse),
    ):
        pytest.fail("held twice")
    other.communicate()
    with held(tmp_path / "lock", refuse):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    assert (tmp_path / "lock").read_text() == ""
