"""The pages of docs/ that are made from the code: `make reference` writes them, tests/test_reference.py compares them.

    docs/reference/settings.md   every setting, from longfire's settings and old spellings
    docs/reference/mixers.md     every mixer, from its class and the dataclass of its settings
    docs/reference/commands.md   every command, from its --help
    docs/model_config.md         every key of a model config (longfire init --model-keys)
    docs/migration.md            the tables of old spellings, between their marks
    docs/design.md               the picture of the packages and the list of files, between marks

The API page (docs/reference/api.md) names what it shows; the site fills it in from the docstrings.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path

import packages

from longfire.cli import main as longfire
from longfire.cli import model_keys
from longfire.cli.arguments import kind_of, summary_of
from longfire.cli.commands import GROUPS
from longfire.config import aliases
from longfire.config.settings import SECTIONS
from longfire.mixers import MIXERS
from longfire.mixers.mixer import Mixer

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "Made by `make reference` from {}; do not edit it by hand."
CONTEXTS = {
    "attention": "keys and values of earlier tokens, as a ring, an all-gather or an all-to-all",
    "state": "the state after earlier tokens, as a map that each process sends once",
    "halo": "the last inputs of the process before, for a short convolution or token shift",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def escaped(cell: str) -> str:
    """Text inside a table, where a bar ends the cell."""
    return cell.replace("|", "\\|")


def settings_page() -> str:
    old = old_spellings()
    parts = [
        "# Settings",
        NOTE.format("the dataclasses that hold them"),
        "A setting is `section.key`: in a recipe a key of `[section]`, on the command line `--section.key VALUE`. "
        "A list is comma-separated on the command line. `longfire train --help SECTION` prints the same.",
        "The last column has the spellings of other systems that mean the same ([migration](../migration.md)). The keys of "
        "the model itself, which `[model]` takes too, are in [model config](../model_config.md).",
    ]
    for name, section in SECTIONS.items():
        rows = []
        for field in fields(section):
            key = f"{name}.{field.name}"
            allowed = field.metadata["within"]
            kind = kind_of(field.type) + (f" in {allowed}" if allowed else "")
            default = aliases.as_text(field.default)
            spellings = ", ".join(f"`{spelling}`" for spelling in old.get(key, ()))
            shown = f"`{default}`" if default else "none"
            rows.append([f"`{key}`", kind, shown, field.metadata["help"], spellings])
        head = ["setting", "type", "default", "meaning", "other spellings"]
        parts += [f"## {name}", summary_of(section), table(head, rows)]
    return "\n\n".join(parts) + "\n"


def old_spellings() -> dict[str, list[str]]:
    """Our key -> the spellings elsewhere that mean the same and are not the same text."""
    found: dict[str, list[str]] = {}
    for spelling, meaning in aliases.ALIASES.items():
        if isinstance(meaning, str):
            found.setdefault(meaning, []).append(spelling)
    return found


def mixers_page() -> str:
    parts = [
        "# Mixers",
        NOTE.format("the classes of the mixers"),
        "What each mixer computes, its settings, and what it declares to the code that runs it on several devices. "
        "[Mixers](../mixers.md) compares them; [parallelism](../parallelism.md) says what of each is proven by tests.",
        "Every mixer can be trained with replicated or sharded parameters and along a pipeline. What else a mixer declares: the "
        "settings that tensor parallelism divides (the degree must divide them), and what context parallelism sends:",
        table(
            ["context", "what is sent"], [[f"`{kind}`", text] for kind, text in CONTEXTS.items()]
        ),
    ]
    for name, mixer in MIXERS.items():
        parts += [f"## {name}", paragraph(mixer), declared(mixer), settings_of(mixer)]
    return "\n\n".join(parts) + "\n"


def paragraph(documented: type) -> str:
    """The first paragraph of a docstring. Formulas are full of signs that Markdown reads as its own."""
    first = cleandoc(documented.__doc__ or "").split("\n\n")[0]
    return re.sub(r"([*_<\\])", r"\\\1", " ".join(first.split()))


def declared(mixer: type[Mixer]) -> str:
    divided = dict.fromkeys(mixer.divided.values())
    rows = [
        ["tensor parallelism divides", ", ".join(f"`{key}`" for key in divided)],
        ["context parallelism sends", ", ".join(f"`{kind}`" for kind in mixer.context)],
    ]
    if mixer.carried:
        rows.append(["stages of a pipeline pass on", "what its first layer leaves for later ones"])
    if mixer.keep_fp32:
        rows.append(["always float32", ", ".join(f"`{name}`" for name in mixer.keep_fp32)])
    return table(["", f"`{mixer.__module__}.{mixer.__name__}`"], rows)


def settings_of(mixer: type[Mixer]) -> str:
    """The table of model_keys.py, without its heading."""
    section = model_keys.section("", model_keys.config_fields(mixer.Config))
    return section.split("\n\n", 1)[1]


def commands_page() -> str:
    parts = [
        "# Command line",
        NOTE.format("the parsers of the commands"),
        "`longfire --help` lists the commands, `longfire COMMAND --help` prints what is below.",
    ]
    for title, commands in GROUPS.items():
        parts.append(f"## To {title}" if title.islower() else f"## {title}")
        for name in commands:
            parts += [f"### longfire {name}", f"```text\n{help_of(name)}```"]
    return "\n\n".join(parts) + "\n"


def help_of(command: str) -> str:
    """What `longfire COMMAND --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        longfire([command, "--help"])
    return printed.getvalue()


def spellings_of(system: str) -> str:
    """A row for each spelling of a system: our setting, or what becomes of it."""
    rows = []
    for row in aliases.rows_of(system):
        accepted = ", ".join(f"`{value}`" for value in row.accepted)
        but = f" (accepted: {accepted})" if accepted else ""
        here = f"`{row.setting}`" if row.setting else row.state
        rows.append([f"`{row.spelling}`", here, row.why + but])
    return table(["there", "here", "why"], rows) + "\n"


def with_blocks(page: str, blocks: dict[str, str]) -> str:
    """The page with what stands between `<!-- made: NAME -->` and `<!-- end -->` made anew."""
    for name, text in blocks.items():
        begin = f"<!-- made: {name} -->\n"
        assert begin in page, f"the page has no {begin.strip()}"
        before, rest = page.split(begin, 1)
        after = rest[rest.index("<!-- end -->") :]
        page = before + begin + text + after
    return page


def pages() -> dict[Path, str]:
    """Every page that is made from the code, whole."""
    migration = DOCS / "migration.md"
    design = DOCS / "design.md"
    tables = {system: spellings_of(system) for system in aliases.SYSTEMS}
    return {
        DOCS / "reference/settings.md": settings_page(),
        DOCS / "reference/mixers.md": mixers_page(),
        DOCS / "reference/commands.md": commands_page(),
        DOCS / "model_config.md": model_keys.page(),
        migration: with_blocks(migration.read_text(encoding="utf-8"), tables),
        design: with_blocks(
            design.read_text(encoding="utf-8"),
            {"files": packages.listing(), "packages": packages.picture()},
        ),
    }


def main() -> int:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
