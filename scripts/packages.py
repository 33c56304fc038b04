"""The picture of the packages and the list of the files in docs/design.md, made from the code.

`python scripts/reference.py` puts both into the page. Nothing here names a package.

picture()  Each package and each file of the root is a node. An arrow from A to B says that files of A
           import files of B more often than the other way round (files of one package may lie on
           several floors: tests/house/test_house.py). Arrows that follow from others are left out.
listing()  Each package with the list of its files, which its docstring gives in the order of the
           flow, and each file of the root with the first sentence of its docstring.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "longfire"
HIDDEN = {"__init__", "__main__", "public", "auto_classes"}  # they name other files, and do nothing
STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

Graph = dict[str, set[str]]


def picture() -> str:
    """The picture as a block of Mermaid."""
    graph = reduced(package_graph())
    names = sorted(graph)
    lines = ["```mermaid", "flowchart TD"]
    for name in names:
        if (PACKAGE / name).is_dir():
            lines.append(f'    {name}[["{name}/"]]')
        else:
            lines.append(f'    {name}["{name}.py"]')
    for name in names:
        for other in sorted(graph[name]):
            lines.append(f"    {name} --> {other}")
    lines.append("```")
    return "\n".join(lines) + "\n"


def package_graph() -> Graph:
    """Package or file of the root -> those that it imports more often than they import it."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        here = node_of(file.relative_to(PACKAGE).with_suffix("").parts)
        for module in set(imports(ast.parse(file.read_text(encoding="utf-8")))):
            there = node_of(tuple(module.split(".")))
            counts[here, there] += 1
    graph: Graph = {}
    for (here, there), count in counts.items():
        known = here not in HIDDEN and there not in HIDDEN and here != there
        if known and exists(here) and exists(there):
            graph.setdefault(here, set())
            graph.setdefault(there, set())
            if count > counts[there, here]:
                graph[here].add(there)
    return graph


def node_of(parts: tuple[str, ...]) -> str:
    return parts[0]


def exists(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of ours, without `longfire.`, of each import that runs."""
    for node in running(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longfire"):
            module = (node.module or "").removeprefix("longfire").removeprefix(".")
            if module:
                yield module
                continue
            for alias in node.names:
                yield alias.name


def running(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements but those for type checkers only. Expressions hold no imports."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        for child in ast.iter_child_nodes(node):
            if isinstance(child, STATEMENTS):
                todo.append(child)


def reachable(graph: Graph) -> Graph:
    """Each node -> all that it reaches."""
    reached: Graph = {}
    for node in graph:
        found: set[str] = set()
        todo = list(graph[node])
        while todo:
            other = todo.pop()
            if other not in found:
                found.add(other)
                todo += graph[other]
        reached[node] = found
    return reached


def reduced(graph: Graph) -> Graph:
    """Without the arrows that follow from others."""
    reached = reachable(graph)
    result: Graph = {}
    for node, others in graph.items():
        result[node] = set()
        for other in others:
            between = (middle for middle in others - {other} if other in reached[middle])
            circle = node in reached[other]
            if circle or not any(between):
                result[node].add(other)
    return result


def listing() -> str:
    """Every file with what it is for, packages first."""
    lines = ["```", "longfire/"]
    for file in sorted(PACKAGE.glob("*.py")):
        if file.stem != "__main__":
            lines.append(f"  {file.name:<22} {first_sentence(file)}")
    for package in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        lines += ["", f"  {package.name + '/':<22} {first_sentence(package / '__init__.py')}"]
        for name, purpose in files_of(package):
            lines.append(f"    {name:<20} {purpose}")
    lines.append("```")
    return "\n".join(lines) + "\n"


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def first_sentence(file: Path) -> str:
    """Of a file's docstring, on one line."""
    text = " ".join(docstring(file).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)`\"])[.:;] ", text)[0]
    return sentence.rstrip(".:")


def files_of(package: Path) -> Iterator[tuple[str, str]]:
    """(name, purpose) of each file that the docstring of a package lists."""
    for line in docstring(package / "__init__.py").splitlines():
        found = re.match(r" *(\w+(?:\.py|/)) +(.*)", line)
        if found:
            yield found[1], found[2]
