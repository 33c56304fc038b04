"""own_files.py, json_types.py and regular_files.py: what is damaged is named, what is no regular file is refused."""

import os
from typing import NamedTuple, TypedDict

import pytest
from logged import logged_to

from longfire.errors import CheckpointError
from longfire.own_files import json_of, parse_json, parse_toml, read_json, read_note
from longfire.regular_files import open_without_link, read_regular


class Row(NamedTuple):
    step: int
    best: float | None = None


class Facts(TypedDict, total=False):
    step: int
    rows: list[Row]


class Whole(Facts):
    name: str


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "a", "step": "12"}', "step must be a whole number, not '12'"),
        ('{"name": "a", "step": true}', "step must be a whole number, not True"),
        ('{"name": "a", "step": 1' + "0" * 399 + "}", "more than 63 bits"),
        ('{"name": "a", "step": 1' + "0" * 9999 + "}", "not valid JSON"),
        ('{"name": "a", "rows": {}}', "rows must be a list, not an object"),
        ('{"name": "a", "rows": [[1, 2.5], []]}', r"rows\[1\] must be a list of step, best"),
        ('{"name": "a", "rows": [[1, "x"]]}', r"rows\[0\].best must be a number or null, not 'x'"),
        ('{"step": 3}', "no key 'name'"),
        ("[]", "it must be an object, not a list"),
        ('{\n"name": }', "line 2, column 9"),
        ("[" * 100_000, "nested too deeply"),
        ("", "an empty file"),
        (b'{"name": "\xff"}', "not UTF-8 at byte 10"),
    ],
    ids=range(13),
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    file = tmp_path / "facts.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message) as error:
        read_json(file, Whole, CheckpointError, "take another step")
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).endswith("; take another step")


def test_what_is_right_is_read():
    assert json_of('{"name": "a", "step": 3, "rows": [[1], [2, 0.5]], "more": 1}', Whole) == {
        "name": "a",
        "step": 3,
        "rows": [[1], [2, 0.5]],
        "more": 1,
    }


def test_a_damaged_note_is_a_warning_and_a_missing_one_is_nothing(tmp_path):
    assert read_note(tmp_path / "note.json", dict[str, str]) is None
    (tmp_path / "note.json").write_text('{"a": 1}')
    with logged_to([]) as messages:
        assert read_note(tmp_path / "note.json", dict[str, str]) is None
    assert messages == [
        f"{tmp_path / 'note.json'}: a must be text, not 1; what it held is not used"
    ]


def test_toml_that_is_nested_too_deeply_or_not_utf_8():
    for content, message in ((b"a = " + b"[" * 100_000, "too deeply"), (b"\xff", "not UTF-8")):
        with pytest.raises(ValueError, match=message):
            parse_toml(content)


def test_a_key_twice_is_refused_where_that_is_asked():
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="'a' stands twice"):
        parse_json('{"a": 1, "a": 2}', is_strict=True)


def test_a_fifo_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, message in (("fifo", "a FIFO"), ("device", "a device"), ("folder", "directory")):
        with pytest.raises(OSError, match=message):
            read_regular(tmp_path / name)


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic link"):
        open_without_link(tmp_path / "link", "a+b")
    assert (tmp_path / "theirs").read_text() == "theirs"
