"""The picture of the packages in docs/design.md, drawn from what the files import.

`python scripts/reference.py` puts it into the page. Nothing here names a package:

1. Each package is a node, and so is each file of the root.
2. Where nodes import each other in a circle, the packages among them are split: the files that reach other nodes of the
   circle are a node of their own. Files never import each other in a circle (tests/house), so this ends.
3. Files of the root that lie at the same place, above and below the same nodes, are one node.
4. An arrow from A to B says that A imports B. Arrows that follow from others are left out.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

PACKAGE = Path(__file__).parents[1] / "longfire"
ROOT = ""  # the package of the files that lie in none
NAMES_A_LINE = 3
HIDDEN = ("__init__", "__main__", "public")  # of the root: they name other files, and do nothing

STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

Graph = dict[str, set[str]]
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """Files of one package. is_whole: all of them."""

    package: str
    files: frozenset[str]
    is_whole: bool


def picture() -> str:
    """The picture as a block of Mermaid."""
    files = file_graph()
    nodes = nodes_of(files)
    edges = reduced(node_graph(nodes, files))
    order = sorted(nodes, key=label)
    numbers = {node: f"n{number}" for number, node in enumerate(order)}
    lines = ["```mermaid", "flowchart TD"]
    for node in order:
        box = '[["{}"]]' if node.package != ROOT else '["{}"]'
        lines.append(f"    {numbers[node]}{box.format(label(node))}")
    for node in order:
        for other in sorted(edges[node], key=label):
            lines.append(f"    {numbers[node]} --> {numbers[other]}")
    return "\n".join([*lines, "```"]) + "\n"


def nodes_of(files: Graph) -> set[Node]:
    """What is drawn: packages or their parts, and files of the root that lie at one place."""
    return merged(split(packages_of(files), files), files)


def file_graph() -> Graph:
    """Module (without `longfire.`) -> the modules that it imports at run time."""
    modules = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] in HIDDEN and len(parts) == 1:
            continue
        modules[".".join(parts).removesuffix(".__init__")] = file
    graph: Graph = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = set(imports(tree)) & modules.keys()
        graph[module] = imported - {module}
    return graph


def imports(tree: ast.Module) -> Iterator[str]:
    """What may be a module of ours, of each import that runs."""
    for node in running(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longfire"):
            module = node.module.removeprefix("longfire").removeprefix(".")
            yield module
            for alias in node.names:
                yield f"{module}.{alias.name}".removeprefix(".")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.removeprefix("longfire.")


def running(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements but those for type checkers only. Expressions hold no imports."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            inner = ast.iter_child_nodes(node)
            todo += [child for child in inner if isinstance(child, STATEMENTS)]


def package_of(module: str) -> str:
    """data.text -> data; model -> "" """
    if (PACKAGE / module.split(".")[0]).is_dir():
        return module.split(".")[0]
    return ROOT


def packages_of(files: Graph) -> set[Node]:
    """Each package as a node, and each file of the root."""
    found: dict[str, set[str]] = defaultdict(set)
    nodes = set()
    for module in files:
        package = package_of(module)
        if package == ROOT:
            nodes.add(Node(ROOT, frozenset([module]), True))
        else:
            found[package].add(module)
    for package, modules in found.items():
        nodes.add(Node(package, frozenset(modules), True))
    return nodes


def node_graph(nodes: Iterable[Node], files: Graph) -> dict[Node, set[Node]]:
    home = {module: node for node in nodes for module in node.files}
    graph: dict[Node, set[Node]] = {node: set() for node in nodes}
    for module, imported in files.items():
        for other in imported:
            if home[other] != home[module]:
                graph[home[module]].add(home[other])
    return graph


def reachable(graph: Mapping[T, set[T]]) -> dict[T, set[T]]:
    """Each node -> all that it reaches; itself only where it lies in a circle."""
    reached = {}
    for node in graph:
        found: set[T] = set()
        todo = list(graph[node])
        while todo:
            other = todo.pop()
            if other not in found:
                found.add(other)
                todo += graph[other]
        reached[node] = found
    return reached


def split(nodes: set[Node], files: Graph) -> set[Node]:
    """The same files in nodes that import each other in no circle."""
    reached = reachable(files)
    while found := circles(nodes, files):
        for node in sorted(found, key=label):
            outside = {module for other in found[node] - {node} for module in other.files}
            upper = frozenset(module for module in node.files if reached[module] & outside)
            if upper and upper != node.files:
                parts = {upper, node.files - upper}
                nodes = (nodes - {node}) | {Node(node.package, part, False) for part in parts}
                break
        else:
            raise AssertionError(f"files import each other in a circle: {[*map(label, found)]}")
    return nodes


def merged(nodes: set[Node], files: Graph) -> set[Node]:
    """The files of the root that lie above and below the same packages as one node, where that makes
    no circle."""
    reached = reachable(node_graph(nodes, files))
    places: dict[tuple[frozenset[Node], frozenset[Node]], set[Node]] = defaultdict(set)
    for node in nodes:
        if node.package == ROOT:
            below = frozenset(other for other in reached[node] if other.package != ROOT)
            above = frozenset(
                other for other in nodes if other.package != ROOT and node in reached[other]
            )
            places[below, above].add(node)
    for together in sorted(places.values(), key=first_label):
        modules = [module for node in together for module in node.files]
        joined = (nodes - together) | {Node(ROOT, frozenset(modules), True)}
        if not circles(joined, files):
            nodes = joined
    return nodes


def first_label(nodes: set[Node]) -> str:
    return min(label(node) for node in nodes)


def circles(nodes: set[Node], files: Graph) -> dict[Node, set[Node]]:
    """Each node that imports itself by way of others -> all that lies in the same circle."""
    reached = reachable(node_graph(nodes, files))
    return {
        node: {other for other in reached[node] if node in reached[other]}
        for node in nodes
        if node in reached[node]
    }


def reduced(graph: dict[Node, set[Node]]) -> dict[Node, set[Node]]:
    """Without the arrows that follow from others."""
    reached = reachable(graph)
    return {
        node: {
            other
            for other in others
            if not any(other in reached[between] for between in others - {other})
        }
        for node, others in graph.items()
    }


def label(node: Node) -> str:
    """`data/`, `parallel/, in part: apply, pipeline`, or the files of the root."""
    names = sorted(module.rpartition(".")[2] for module in node.files - {node.package})
    if node.package != ROOT and node.is_whole:
        return f"{node.package}/"
    listed = [
        ", ".join(names[first : first + NAMES_A_LINE])
        for first in range(0, len(names), NAMES_A_LINE)
    ]
    title = [f"{node.package}/, in part:"] if node.package != ROOT else []
    return "<br>".join([*title, *listed])


if __name__ == "__main__":
    print(picture(), end="")
