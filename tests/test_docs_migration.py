"""The pages that go through the four predecessors line by line: every line has a status, and a test that exists or a reason."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/migration"
# Lines of each page: what the system documents, and what its code does besides.
LINES = {
    "flame-accelerate": (61, 10),
    "flame-torchtitan": (115, 9),
    "flash-attention": (64, 8),
    "ring-attention": (82, 7),
}
STATUSES = {"same", "other words", "other way", "out of scope"}
BAR = re.compile(r"(?<!\\)\|")


def rows(page: str) -> list[list[str]]:
    """The cells of each line of the two tables: number, there, here, status, shown by."""
    found = []
    for line in (PAGES / f"{page}.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| x?\d+ \|", line):
            found.append([cell.strip() for cell in BAR.split(line)[1:-1]])
    return found


@cache
def names_of_tests(file: Path) -> frozenset[str]:
    """Names of the test functions of a file, with those of its classes."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            names.add(node.name)
    return frozenset(names)


@pytest.mark.parametrize("page", LINES)
def test_every_line_is_there_once(page):
    documented, besides = LINES[page]
    expected = [str(number + 1) for number in range(documented)]
    expected += [f"x{number + 1}" for number in range(besides)]
    assert [row[0] for row in rows(page)] == expected


@pytest.mark.parametrize("page", LINES)
def test_every_line_has_a_status_and_what_shows_it(page):
    for number, there, here, status, shown_by in rows(page):
        where = f"{page}, line {number}"
        assert there and here, f"{where} has an empty cell"
        assert status in STATUSES, f"{where}: {status!r}"
        if status == "out of scope":
            assert not shown_by, f"{where}: nothing shows what is not here"
            continue
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", shown_by)
        assert tests, f"{where} names no test as `tests/FILE.py::NAME`"
        for file, name in tests:
            assert (ROOT / file).is_file(), f"{where}: no {file}"
            assert name in names_of_tests(ROOT / file), f"{where}: no {name} in {file}"


def test_little_is_out_of_scope():
    """What is left out, in all; a line that comes in lowers it."""
    left_out = [
        f"{page} {row[0]}" for page in LINES for row in rows(page) if row[3] == "out of scope"
    ]
    assert len(left_out) <= 8, left_out
