"""What is collected has one order: workers of pytest-xdist that collect different orders stop.

The order of a set depends on the process, since texts are hashed with a seed of their own and
modules by their address. `sorted` with a key keeps that order among equal keys.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.parent.glob("longfire/**/*.py")) + sorted(TESTS.rglob("*.py"))
# What these make is the same in whatever order the elements come.
OF_ANY_ORDER = {"all", "any", "frozenset", "len", "max", "min", "set", "sorted", "sum"}


def name_called(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name):
            return function.id
        if isinstance(function, ast.Attribute):
            return function.attr
    return ""


def has_no_order(node: ast.AST) -> bool:
    """Whether an expression is a set, or the files of a folder as the file system gives them."""
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.Sub):
        return has_no_order(node.left) or has_no_order(node.right)
    return name_called(node) in {"set", "frozenset", "glob", "rglob", "iterdir", "listdir"}


def by_a_key_alone(top: ast.AST) -> Iterator[int]:
    """The lines that sort a set by a key, which leaves equal keys in the order of the set."""
    for node in ast.walk(top):
        if name_called(node) in {"sorted", "min", "max"}:
            assert isinstance(node, ast.Call)
            keys = {keyword.arg for keyword in node.keywords}
            of_set = bool(node.args) and isinstance(node.args[0], ast.Set | ast.SetComp)
            if "key" in keys and (of_set or name_called(node.args[0]) in {"set", "frozenset"}):
                yield node.lineno


def iterated(node: ast.AST) -> list[ast.expr]:
    """What an expression takes the elements of, one after the other, into something ordered."""
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp):
        return [generator.iter for generator in node.generators]
    if isinstance(node, ast.Starred):
        return [node.value]
    if isinstance(node, ast.For):
        return [node.iter]
    if name_called(node) in {"list", "tuple", "enumerate", "zip", "product", "fromkeys"}:
        assert isinstance(node, ast.Call)
        return node.args
    return []


def in_order_of_a_set(node: ast.AST) -> Iterator[int]:
    """The lines that take the elements of a set, or of a folder, without sorting them."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.Set | ast.SetComp):
        return
    if name_called(node) in OF_ANY_ORDER:
        return
    for taken in iterated(node):
        if has_no_order(taken):
            yield taken.lineno
    for child in ast.iter_child_nodes(node):
        yield from in_order_of_a_set(child)


def parametrized(top: ast.Module) -> Iterator[ast.expr]:
    """The values of each `pytest.mark.parametrize` of a file."""
    for node in ast.walk(top):
        if name_called(node) == "parametrize":
            assert isinstance(node, ast.Call)
            yield from node.args[1:]


def collected_in_any_order(top: ast.Module) -> list[int]:
    """The lines of a file of tests whose order of collection depends on the process."""
    lines = [*by_a_key_alone(top)]
    for statement in top.body:
        lines += in_order_of_a_set(statement)
    for values in parametrized(top):
        lines += in_order_of_a_set(values)
        if has_no_order(values):
            lines.append(values.lineno)
    return lines


def name_of(file: Path) -> str:
    return file.relative_to(TESTS.parent).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_order_of_a_set_decides_nothing(file: Path):
    top = ast.parse(file.read_text(encoding="utf-8"))
    of_tests = file.is_relative_to(TESTS)
    lines = collected_in_any_order(top) if of_tests else [*by_a_key_alone(top)]
    assert not lines, f"{name_of(file)}: sort what these lines take from a set or folder: {lines}"


@pytest.mark.parametrize(
    "text",
    [
        "CASES = sorted({(a, b) for a, b in MADE}, key=len)",
        "CASES = [x for x in {1, 2}]",
        "CASES = list(set(MADE) - {1})",
        "CASES = [*Path().glob('*.toml')]",
        "@pytest.mark.parametrize('x', set(MADE))\ndef test(x): ...",
        "@pytest.mark.parametrize('x', [*set(MADE)])\ndef test(x): ...",
    ],
)
def test_lines_that_are_found(text: str):
    assert collected_in_any_order(ast.parse(text))


def test_lines_that_keep_one_order():
    text = "CASES = sorted({1, 2})\nKNOWN = {x for x in {1, 2}}\nMOST = max(len(x) for x in {1})\n"
    assert not collected_in_any_order(ast.parse(text))
