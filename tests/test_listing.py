"""listing.py: the same as glob and pathlib find, but what cannot be read is an error."""

import errno
import glob
import os
import random
from pathlib import Path

import pytest

from longfire import listing
from longfire.checkpoint.folder import clean, files_of, recover
from longfire.data.folders import all_files, matching
from longfire.listing import (
    exists,
    files_below,
    has_match,
    hints_in,
    is_file,
    is_folder,
    matches,
    names_in,
    paths_in,
)

NAMES = ("a", "b.txt", "c.parquet", ".hidden", ".d.txt", "step-1")
PATTERNS = (
    "*",
    "*.txt",
    "**",
    "**/*",
    "**/*.txt",
    "a/**",
    "a/*/b.txt",
    "?.txt",
    ".*",
    "[ab]*",
    "**/a/**/*.txt",
    "a/b.txt",
    "../*/*.txt",
    "*/",
    "**/",
    "missing/*",
    "b.txt/*",
)


def grow(folder: Path, chance: random.Random, depth: int = 3) -> None:
    """Files, folders, links to both and links to nothing, at random."""
    for name in NAMES:
        path = folder / name
        kind = chance.choice(("none", "file", "folder", "link", "broken"))
        if kind == "file":
            path.write_text("text")
        elif kind == "folder" and depth:
            path.mkdir()
            grow(path, chance, depth - 1)
        elif kind == "link":
            there = [other for other in sorted(folder.iterdir()) if not other.is_symlink()]
            if there:
                path.symlink_to(chance.choice(there).name)
        elif kind == "broken":
            path.symlink_to("nowhere")


def paths_of_glob(folder: Path, pattern: str) -> list[Path]:
    """What glob finds. For `a/**` it names `a/`, on some versions of Python also where `a` is no
    folder."""
    found = glob.glob(pattern, root_dir=folder, recursive=True)
    return sorted({folder / name for name in found if name[-1:] != "/" or (folder / name).is_dir()})


@pytest.mark.parametrize("seed", range(12))
def test_patterns_mean_what_glob_has_them_mean(tmp_path, seed):
    root = tmp_path / "root"
    root.mkdir()
    grow(root, random.Random(seed))
    for pattern in PATTERNS:
        expected = paths_of_glob(root, pattern)
        found = [path for path in matches(root, pattern) if path != root]
        assert found == [path for path in expected if path != root], pattern
        assert has_match(root, pattern) == bool(matches(root, pattern)), pattern


@pytest.mark.parametrize("seed", range(12))
def test_lists_are_those_of_pathlib(tmp_path, seed):
    grow(tmp_path, random.Random(seed))
    assert paths_in(tmp_path, "*.txt") == sorted(tmp_path.glob("*.txt"))
    found = tmp_path.rglob("*.txt")
    expected = sorted(path for path in found if path.is_symlink() or not path.is_dir())
    assert files_below(tmp_path, "*.txt") == expected
    for path in tmp_path.rglob("*"):
        assert is_file(path) == path.is_file()
        assert is_folder(path) == path.is_dir()
        assert exists(path) == path.exists()
        assert exists(path, follow_links=False)


def test_an_absolute_pattern_needs_no_folder(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert matches(Path(), str(tmp_path / "*.txt")) == [tmp_path / "a.txt"]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a.txt").write_text("text")
    (tmp_path / "inner/up").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    found = {path.resolve() for path in matches(tmp_path, "**/*.txt")}
    assert found == {tmp_path / "inner/a.txt"}
    assert not exists(tmp_path / "self")


def test_what_no_file_can_be_named_is_not_there(tmp_path):
    assert names_in(tmp_path / "missing") == []
    assert not exists(Path("a\0b"))
    assert names_in(Path("a\0b")) == []
    assert not exists(tmp_path / ("a" * 300))
    assert names_in(tmp_path / ("a" * 300)) == []
    assert matches(tmp_path, "a" * 300 + "/*") == []


def test_what_is_removed_while_it_is_listed_is_not_there(tmp_path, monkeypatch):
    """Other processes may write to the folder."""
    (tmp_path / "inner/deep").mkdir(parents=True)

    def vanishing(path="."):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(os, "listdir", vanishing)
    monkeypatch.setattr(os, "scandir", vanishing)
    assert names_in(tmp_path / "inner") == []
    assert files_below(tmp_path) == []
    assert matches(tmp_path, "**/*.txt") == []


def test_names_that_are_no_utf_8_are_found(tmp_path):
    name = os.fsdecode(b"\xff.txt")
    (tmp_path / name).write_text("text")
    for pattern in ("*.txt", "**/*.txt", name):
        assert matches(tmp_path, pattern) == [tmp_path / name]
    assert files_below(tmp_path) == [tmp_path / name]


def test_links_count_as_files_so_that_their_reader_reports_them(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, target in (("a.txt", "nowhere"), ("b.txt", "folder"), ("c.txt", "c.txt")):
        (tmp_path / name).symlink_to(target)
    assert [path.name for path in files_below(tmp_path, "*.txt")] == ["a.txt", "b.txt", "c.txt"]


@pytest.fixture
def unreadable(monkeypatch):
    """Call it with a name: folders of this name cannot be listed then. The tests may run as a user
    whom no right is denied."""

    def deny(name: str) -> None:
        def denying(call):
            def instead(path=".", *arguments):
                if Path(os.fspath(path)).name == name:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return call(path, *arguments)

            return instead

        monkeypatch.setattr(os, "listdir", denying(os.listdir))
        monkeypatch.setattr(os, "scandir", denying(os.scandir))

    return deny


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, unreadable):
    (tmp_path / "closed").mkdir()
    unreadable("closed")
    for find in (
        lambda: names_in(tmp_path / "closed"),
        lambda: paths_in(tmp_path / "closed", "*.txt"),
        lambda: files_below(tmp_path),
        lambda: matches(tmp_path, "**/*.txt"),
        lambda: matches(tmp_path, "*/*.txt"),
        lambda: list(listing.walk(tmp_path)),
    ):
        with pytest.raises(PermissionError, match="closed"):
            find()


def test_data_in_a_folder_that_cannot_be_read_are_not_left_out(tmp_path, unreadable):
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    unreadable("closed")
    with pytest.raises(PermissionError, match="closed"):
        all_files(tmp_path)
    with pytest.raises(PermissionError, match="closed"):
        matching(tmp_path, ["*/*.txt"], "no file")


@pytest.mark.parametrize("name", ["lost+found", ".trash"])
def test_what_holds_no_data_may_be_unreadable(tmp_path, unreadable, name):
    (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("text")
    unreadable(name)
    assert all_files(tmp_path) == [tmp_path / "a.txt"]
    assert matches(tmp_path, "**/*.txt") == [tmp_path / "a.txt"]
    assert matches(tmp_path, "*/*.txt") == []


FINDS_OUT_BY = {
    "stat": lambda folder: exists(folder / "closed"),
    "listdir": lambda folder: names_in(folder / "closed"),
    "scandir": files_below,
}


@pytest.mark.parametrize("call", FINDS_OUT_BY)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_no_other_error_means_that_nothing_is_there(tmp_path, monkeypatch, call, number):
    (tmp_path / "closed").mkdir()
    whole = getattr(os, call)

    def failing(path=".", *arguments, **options):
        if Path(path).name == "closed":
            raise OSError(number, os.strerror(number))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        FINDS_OUT_BY[call](tmp_path)


def test_a_hint_is_no_reason_to_fail(tmp_path, unreadable):
    (tmp_path / "closed").mkdir()
    unreadable("closed")
    assert hints_in(tmp_path / "closed", "*.toml") == []


@pytest.mark.parametrize("look", [recover, clean])
def test_checkpoints_that_cannot_be_listed_are_an_error(tmp_path, unreadable, look):
    """A checkpoint that was moved aside would otherwise be passed over for an older one."""
    (tmp_path / "checkpoints/step-4.before").mkdir(parents=True)
    unreadable("checkpoints")
    with pytest.raises(PermissionError):
        look(tmp_path / "checkpoints")


def test_files_of_a_checkpoint_that_cannot_be_listed_are_an_error(tmp_path, unreadable):
    place = tmp_path / "step-4"
    place.mkdir()
    (place / "manifest.json").write_text('{"files": {"state.json": {"bytes": 1, "crc32": 1}}}')
    unreadable("step-4")
    with pytest.raises(PermissionError):
        files_of(place)
