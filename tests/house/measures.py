"""How readable the package is, in numbers: `make house` prints them, test_measures.py holds them.

What is counted, and what the same counts are of five peers that are known to read well (nanodo, lingua, nanochat, torchtitan,
OLMo-core, as of autumn 2026):

    nodes a line            all nodes of the syntax tree, by all lines of the files                       3.9 to 5.7
    comprehensions          list, set, dict and generator, of 1,000 lines                                 5 to 13
    conditionals            `a if b else c`, of 1,000 lines                                               5 to 9
    tuple assignments       `a, b = c, d`, of 1,000 lines                                                 0.6 to 5
    nested comprehensions   one inside another, in all
    long lines              above 100 columns, in all                                                     0 to 6 % of lines
    formatter escapes       `# fmt:`, in all                                                              0
    Any                     as a name, of 1,000 lines                                                     0 to 6
    function lines          median, nine of ten, longest
"""

import ast
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "longfire"
COLUMNS = 100
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Measures:
    lines: int
    nodes_a_line: float
    comprehensions: float
    conditionals: float
    tuple_assignments: float
    nested_comprehensions: int
    long_lines: int
    formatter_escapes: int
    any: float
    function_lines: tuple[int, int, int]


def measure(files: Iterable[Path]) -> Measures:
    """The measures of all files together."""
    counts: Counter[str] = Counter()
    lengths: list[int] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        counts["lines"] += len(text.splitlines())
        counts["long"] += sum(len(line) > COLUMNS for line in text.splitlines())
        counts["escapes"] += text.count("# fmt:")
        for node in ast.walk(tree):
            count_node(node, counts)
            if isinstance(node, FUNCTIONS):
                lengths.append(node.end_lineno - node.lineno + 1)
    thousand = counts["lines"] / 1000
    lengths.sort()
    return Measures(
        lines=counts["lines"],
        nodes_a_line=counts["nodes"] / counts["lines"],
        comprehensions=counts["comprehensions"] / thousand,
        conditionals=counts["conditionals"] / thousand,
        tuple_assignments=counts["tuple assignments"] / thousand,
        nested_comprehensions=counts["nested"],
        long_lines=counts["long"],
        formatter_escapes=counts["escapes"],
        any=counts["Any"] / thousand,
        function_lines=(
            round(statistics.median(lengths)),
            lengths[len(lengths) * 9 // 10],
            lengths[-1],
        ),
    )


def count_node(node: ast.AST, counts: Counter[str]) -> None:
    """Add one node of a syntax tree to the counts."""
    counts["nodes"] += 1
    if isinstance(node, COMPREHENSIONS):
        counts["comprehensions"] += 1
        inside = [child for child in ast.walk(node) if child is not node]
        counts["nested"] += any(isinstance(child, COMPREHENSIONS) for child in inside)
    elif isinstance(node, ast.IfExp):
        counts["conditionals"] += 1
    elif isinstance(node, ast.Assign):
        several = any(isinstance(target, ast.Tuple) for target in node.targets)
        counts["tuple assignments"] += several and isinstance(node.value, ast.Tuple)
    elif isinstance(node, ast.Name):
        counts["Any"] += node.id == "Any"


def main() -> None:
    """Print the measures of the package, and beside each the ceiling that test_measures.py holds."""
    from closures import MIXERS, lines_of, model_with, model_with_all
    from test_closures import MAX_LINES_WITH_A_MIXER, MAX_LINES_WITH_ALL_MIXERS
    from test_measures import CEILINGS, GOALS

    found = measure(sorted(PACKAGE.rglob("*.py")))
    print(f"{'measure':<24}{'now':>16}{'ceiling':>16}{'goal':>16}")
    for name, goal in GOALS.items():
        value = getattr(found, name)
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        print(f"{name.replace('_', ' '):<24}{shown:>16}{CEILINGS[name]!s:>16}{goal!s:>16}")
    print(f"{found.lines:,} lines; of them are opened to follow the model")
    for mixer in MIXERS:
        read = lines_of(model_with(mixer))
        print(f"{'with ' + mixer:<24}{read:>16}{MAX_LINES_WITH_A_MIXER:>32}")
    read = lines_of(model_with_all())
    print(f"{'with all mixers':<24}{read:>16}{MAX_LINES_WITH_ALL_MIXERS:>32}")


if __name__ == "__main__":
    main()
