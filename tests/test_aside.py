"""aside.py: what a killed process has written aside is removed by a later one, and nothing else is."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from longfire.aside import folder_aside, held_file, remove_abandoned, remove_all_abandoned
from longfire.disk import held, put_in_place, write_whole

KILLED = """
import os, sys
from pathlib import Path
from longfire.aside import file_aside, folder_aside
place = Path(sys.argv[1])
with folder_aside(place) as aside, file_aside(place.with_name("file")) as (path, opened):
    (aside / "weights").write_text("half")
    opened.write(b"half")
    opened.flush()
    print("written", flush=True)
    sys.stdin.read()
"""


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_leaves_is_removed_by_the_next_start(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "place")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "written\n"
    remove_abandoned(tmp_path)
    assert len(names(tmp_path)) == 3  # the owner lives
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert len(names(tmp_path)) == 3
    with folder_aside(tmp_path / "place") as aside:
        (aside / "weights").write_text("whole")
        put_in_place(aside, tmp_path / "place")
    write_whole(tmp_path / "file", "whole")
    assert names(tmp_path) == ["file", "place"]
    assert (tmp_path / "place/weights").read_text() == "whole"


def test_names_of_others_stay(tmp_path):
    for name in (".place.aside", ".place.12345678.txt", ".place.nohexnum.aside", "place.new"):
        (tmp_path / name).write_text("theirs")
    before = names(tmp_path)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == before


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), folder_aside(tmp_path / "place"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_long_name_has_room(tmp_path):
    place = tmp_path / ("n" * 250)
    write_whole(place, "x")
    assert names(tmp_path) == [place.name]


def test_links_are_replaced_and_never_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for name in ("file", "lock"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    write_whole(tmp_path / "file", "ours")
    with pytest.raises(OSError, match="symbolic link"), held(tmp_path / "lock", print):
        pytest.fail("held through a link")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "file").is_symlink()
    (tmp_path / "place").symlink_to(tmp_path)
    with folder_aside(tmp_path / "place") as aside:
        put_in_place(aside, tmp_path / "place")
    assert not (tmp_path / "place").is_symlink()
    assert (tmp_path / "theirs").exists()


def test_a_folder_that_cannot_be_removed_now_is_removed_by_a_later_start(tmp_path, monkeypatch):
    place = tmp_path / "export"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(OSError, match="the disk"), folder_aside(place):
            raise OSError("the disk")
    assert [name.endswith(".aside.lock") for name in names(tmp_path)] == [False, True]
    remove_abandoned(tmp_path)
    assert names(tmp_path) == []


def test_what_cannot_be_removed_is_no_error_and_goes_with_the_next_start(tmp_path, monkeypatch):
    place = tmp_path / "code/step-0"
    with monkeypatch.context() as hurt:
        hurt.setattr(os, "unlink", cannot_be_removed)
        with folder_aside(place) as aside:
            put_in_place(aside, place)
        write_whole(tmp_path / "file", "whole")
    assert len(names(tmp_path / "code")) == 2  # the lock file stayed
    remove_all_abandoned(tmp_path)
    assert names(tmp_path / "code") == ["step-0"]
    assert names(tmp_path) == ["code", "file"]


def test_a_new_file_that_another_process_takes_for_abandoned_is_given_up(tmp_path, monkeypatch):
    """It holds the file already, and will remove it."""
    calls = []
    whole = fcntl.flock

    def taken_once(file, operation):
        calls.append(file)
        if len(calls) == 1:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        whole(file, operation)

    monkeypatch.setattr(fcntl, "flock", taken_once)
    path, opened = held_file(tmp_path / "file", "")
    opened.close()
    assert len(calls) == 2
    assert len(names(tmp_path)) == 2 and path.name in names(tmp_path)


def cannot_be_removed(path, **options):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_nothing_is_removed_behind_a_link(tmp_path):
    left = tmp_path / "elsewhere/.file.12345678.aside"
    left.parent.mkdir()
    left.write_text("of another run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/code").symlink_to("../elsewhere")
    remove_all_abandoned(tmp_path / "run")
    assert left.exists()
