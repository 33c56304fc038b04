"""`--help-old SYSTEM`: the words of an earlier system and what they mean here."""

import textwrap
from collections.abc import Sequence

from longfire.config.aliases import SYSTEMS, rows_of
from longfire.config.aliases.listing import Row
from longfire.config.values import nearest
from longfire.errors import SettingsError

OLD_WORDS = "--help-old"
FLAME = "flame"  # both of its generations
WIDTH = 118
HEAD = Row("there", setting="here", why="why")


def systems() -> tuple[str, ...]:
    """What --help-old may be followed by."""
    return (FLAME, *SYSTEMS)


def show_old_words(words: Sequence[str]) -> None:
    """Print the table of the system that follows --help-old and exit; nothing where nobody asks.

    Raises SettingsError where no system, or an unknown one, follows.
    """
    for place, word in enumerate(words):
        option, equals, system = word.partition("=")
        if option != OLD_WORDS:
            continue
        if not equals:
            system = words[place + 1] if place + 1 < len(words) else ""
        print(tables_of(system))
        raise SystemExit(0)


def tables_of(system: str) -> str:
    """The tables of a system, with a heading each. Raises SettingsError for an unknown one."""
    if system not in systems():
        raise SettingsError(
            f"{OLD_WORDS} {system}: the systems are {', '.join(systems())}"
            f"{nearest(system, systems())}"
        )
    tables = []
    for name in SYSTEMS:
        if name == system or (system == FLAME and name.startswith(FLAME)):
            tables.append(f"{name}\n\n{table(rows_of(name))}")
    return "\n\n".join(tables)


def table(rows: Sequence[Row]) -> str:
    """Rows in columns: there, here, why."""
    all_rows = [HEAD, *rows]
    there = max(len(row.spelling) for row in all_rows) + 2
    here = max(len(row.setting or row.state) for row in all_rows) + 2
    lines = []
    for row in all_rows:
        beginning = f"{row.spelling:<{there}}{row.setting or row.state:<{here}}"
        why = row.why
        if row.accepted:
            why += f" (accepted: {', '.join(row.accepted)})"
        width = max(WIDTH - there - here, 30)
        parts = textwrap.wrap(why, width) or [""]
        lines.append(f"{beginning}{parts[0]}".rstrip())
        lines += [" " * (there + here) + part for part in parts[1:]]
    return "\n".join(lines)
