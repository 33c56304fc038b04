"""Puts what bench/results/ holds into README.md, docs/benchmarks.md and docs/long-context.md, so that pages and measurements cannot
disagree (a test compares them).

    python bench/tables.py

Between `<!-- results: NAME -->` and `<!-- end -->` stand the tables of bench/results/NAME.json, after `<!-- sample: NAME -->` its
`sample` as a block of text; all else on the page is prose.
"""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/long-context.md"]


def with_tables(page: str) -> str:
    """The page with every block of results as they are now."""
    return re.sub(r"(<!-- (results|sample): (\w+) -->\n).*?(<!-- end -->)", block, page, flags=re.S)


def block(found: re.Match[str]) -> str:
    """A block between its two marks, made anew."""
    begin, kind, name, end = found.groups()
    result = json.loads((RESULTS / f"{name}.json").read_text())
    text = tables(result) if kind == "results" else f"```\n{result['sample'].rstrip()}\n```\n"
    return begin + text + end


def tables(result: dict[str, Any]) -> str:
    """Each list of rows in a result as a table, then its command, date and machine."""
    parts = [
        table(rows)
        for rows in result.values()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    ]
    machine = result["machine"]
    device = (
        machine["gpu"]
        or f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads"
    )
    message = f"`{result['command']}`, {result['date'][:10]}, {device}, torch {machine['versions']['torch']}"
    return "\n".join([*parts, message, ""])


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        names,
        ["---"] * len(names),
        *([cell(row.get(name, "")) for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
