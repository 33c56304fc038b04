"""How much has to be opened to follow the model: the files that imports reach from it, and their lines.

`make house` prints them, test_closures.py holds them.
"""

import ast
import re
from functools import cache
from pathlib import Path

HOUSE = Path(__file__).parents[2] / "longfire"
FILES = sorted(HOUSE.rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(["longfire", *file.relative_to(HOUSE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> frozenset[str]:
    """The modules of longfire that a file imports, wherever in it; `from longfire import ops` is longfire.ops."""
    found = set()
    for_types = type_imports(file)
    for node in ast.walk(tree(file)):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively; write longfire. in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return frozenset(module for module in found if module in MODULES)


def type_imports(file: Path) -> set[ast.stmt]:
    """What a file imports for type checkers only: nothing is imported when it runs, so types may
    come from any floor."""
    found: set[ast.stmt] = set()
    for node in tree(file).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found.update(node.body)
    return found


MODULES = {module_of(file): file for file in FILES}


@cache
def named(file: Path) -> frozenset[str]:
    """The modules that a file names as text, as lazy tables do: "longfire.mixers.gla:GLA"."""
    constants = (node for node in ast.walk(tree(file)) if isinstance(node, ast.Constant))
    texts = [node.value for node in constants if isinstance(node.value, str)]
    places = {text.partition(":")[0] for text in texts if re.fullmatch(r"longfire[\w.]*:\w+", text)}
    return frozenset(places & MODULES.keys())


EVERY_MODULE = frozenset(MODULES)


# What a mixer asks for along the sequence (seq.ops.NAME), and the file that computes it.
ALONG_THE_SEQUENCE = {
    "attention": "longfire.ops.attention",
    "convolution": "longfire.ops.short_conv",
    "token_shift": "longfire.ops.token_shift",
}


@cache
def asked_along_the_sequence(file: Path) -> frozenset[str]:
    """The modules behind seq.ops that a file asks for; ops/sequence_ops.py looks them up by name."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and node.attr in ALONG_THE_SEQUENCE:
            asked = ast.unparse(node.value)
            if asked.endswith(".ops"):  # as in seq.ops.attention
                found.add(ALONG_THE_SEQUENCE[node.attr])
    return frozenset(found)


# What refuses a wrong config: nothing that a model computes depends on it.
REFUSALS = {"longfire.config.model_rules", "longfire.config.own_settings"}


def closure(module: str, lazy: frozenset[str] = EVERY_MODULE) -> set[str]:
    """The modules that somebody who reads this one may have to open: all that are imported by name,
    and of those that tables only name the ones in `lazy`, and those that it asks for along the
    sequence. Without REFUSALS. (A package from which nothing but its files is imported has nothing
    to read.)"""
    reached, todo = set(), [module]
    while todo:
        module = todo.pop()
        if module not in reached | REFUSALS:
            reached.add(module)
            file = MODULES[module]
            todo += imports(file) | (named(file) & lazy)
            todo += asked_along_the_sequence(file)
    return reached


def lines_of(modules: set[str]) -> int:
    return sum(len(MODULES[module].read_text().splitlines()) for module in modules)


MIXERS = (
    "attention",
    "linear_attention",
    "retention",
    "gla",
    "gsa",
    "hgrn2",
    "mamba",
    "mamba2",
    "delta_net",
    "gated_delta_net",
    "kda",
    "rwkv7",
)


def model_with(mixer: str) -> set[str]:
    """What is read of the model with this mixer in every layer and the default MLP."""
    return closure("longfire.model", frozenset({f"longfire.mixers.{mixer}", "longfire.mlps.gated"}))


def model_with_all() -> set[str]:
    """What is read of the model with all mixers and MLPs."""
    parts = ("longfire.mixers.", "longfire.mlps.")
    return closure("longfire.model", frozenset(m for m in MODULES if m.startswith(parts)))
