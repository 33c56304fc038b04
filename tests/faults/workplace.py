"""A folder with a recipe, a run, an export and what else commands need; the commands; and what must
hold after one was hurt: nothing that was there has changed, and the same command then succeeds."""

import hashlib
import importlib
import json
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.faults.forked import Ended, run_forked
from tests.faults.tiny_recipe import RECIPE, SHAPE

EXIT_CODES = (0, *range(2, 7))  # of what was right or of a user's error: 1 is a fault of ours
UNFINISHED = ("*.aside*", "*.writing*", "*.forgotten", "*.before")
FACTS = "facts.json"  # of the commands when nothing hurts them
# Packages of which the parent imports what a command has imported
WARM = ("longfire", "torch", "matplotlib", "transformers", "sympy", "pyarrow", "tokenizers")


class Command(NamedTuple):
    """The words of a command; the files that it makes, as patterns, which are the same each time;
    the files of before that it may change, as beginnings of their names."""

    words: tuple[str, ...]
    makes: tuple[str, ...] = ()
    may_change: tuple[str, ...] = ()


COMMANDS = {
    "prepare": Command(
        ("prepare", "recipe.toml", "--data.folder", "new-stores"), ("new-stores/**/*.bin",)
    ),
    "train": Command(
        ("train", "recipe.toml", "--training.steps", "6"),
        ("run/checkpoints/step-6/*model.safetensors",),
        ("run/", "stores/"),
    ),
    "begin": Command(
        ("train", "recipe.toml", "--job.dump_folder", "fresh"),
        ("fresh/checkpoints/step-4/*model.safetensors",),
        ("stores/",),
    ),
    "export": Command(("export", "run", "out"), ("out/*.safetensors", "out/config.json")),
    "import": Command(("import", "hf", "imported"), ("imported/checkpoints/step-0/*.safetensors",)),
    "eval": Command(("eval", "run", "--data", "text.txt", "--tokens", "64")),
    "generate": Command(("generate", "run", "--prompt", "a", "--max_new_tokens", "3")),
    "convert": Command(
        ("convert", "--model", "hf", "--config", "target.json", "--output", "converted"),
        ("converted/*.safetensors",),
    ),
    "plan": Command(("plan", "recipe.toml", "--alternatives", "0")),
    "report": Command(("report", "run", "--out", "page.html"), ("page.html",)),
}


def make_workplace(folder: Path) -> None:
    """Make the folder, run each command once in a copy, and note what it made and how long it
    took."""
    folder.mkdir()
    (folder / "shape.json").write_text(SHAPE)
    (folder / "target.json").write_text(
        SHAPE.replace('["gla", "attention"]', '["attention", "gla"]')
    )
    settings = RECIPE.replace("steps = 12", "steps = 4").replace(
        "[data]", '[data]\nfolder = "stores"'
    )
    (folder / "recipe.toml").write_text(settings)
    lines = [f"{n} sheep jump over field {n * 7 % 31}.\n" for n in range(40)]
    (folder / "text.txt").write_text("".join(lines))
    for words in (["train", "recipe.toml"], ["export", "run", "hf"]):
        ended = run_forked(words, folder, hurt=import_later)
        assert ended.code == 0, ended.errors
        import_what_a_command_needs(folder)
    facts = {}
    for name, command in COMMANDS.items():
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        ended = run_forked(command.words, copy, hurt=import_later)
        assert ended.code == 0, f"{name}: {ended.errors}"
        import_what_a_command_needs(copy)
        facts[name] = {"made": digests(copy, command.makes), "seconds": ended.seconds}
        shutil.rmtree(copy)
    (folder / FACTS).write_text(json.dumps(facts))


def import_later() -> None:
    """Note at the end of this process which modules it has imported."""
    import atexit

    atexit.register(lambda: Path("modules.json").write_text(json.dumps(sorted(sys.modules))))


def import_what_a_command_needs(folder: Path) -> None:
    """Import here what a command imported, so that the next fork of this process need not."""
    file = folder / "modules.json"
    for name in json.loads(file.read_text()):
        if name not in sys.modules and name.startswith(WARM):
            with suppress(Exception):  # a part of a package that only it can import
                importlib.import_module(name)
    file.unlink()


def facts_of(folder: Path) -> dict[str, dict[str, object]]:
    """What was noted of each command when nothing hurt it."""
    return json.loads((folder / FACTS).read_text())


def some_command(folder: Path, chance: random.Random) -> str:
    """The name of a command, of those that take long more seldom."""
    facts = facts_of(folder)
    weights = [1 / (1 + facts[name]["seconds"]) for name in COMMANDS]
    return chance.choices(list(COMMANDS), weights)[0]


def digests(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """The hash of each file that matches."""
    found = {}
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                found[name] = hashlib.blake2b(file.read_bytes()).hexdigest()
    return found


def kept(folder: Path, command: Command) -> dict[str, str]:
    """The hashes of what the command may not change; of a run that goes on, of its checkpoint."""
    found = digests(folder, ("**/*",))
    kept_files = {}
    for name, digest in found.items():
        may_change = name.startswith(command.may_change) and "/step-4/" not in name
        if not may_change and not name.endswith(("lock", "hashes.json")):
            kept_files[name] = digest
    return kept_files


def assert_message(ended: Ended, codes: tuple[int, ...] = EXIT_CODES) -> None:
    """The command ended with a documented exit code, and with a message where it failed."""
    assert "Traceback (most recent call last)" not in ended.errors, ended.errors
    assert ended.code in codes, f"exit code {ended.code}: {ended.errors}"
    assert ended.code <= 0 or ended.errors.strip(), f"exit code {ended.code} without a message"


def assert_recovers(folder: Path, name: str, before: dict[str, str]) -> None:
    """What was there before is unchanged; the same command succeeds, makes what it makes when
    nothing hurts it, and leaves nothing unfinished."""
    command = COMMANDS[name]
    changed = [file for file, digest in before.items() if digest_of(folder / file) != digest]
    assert not changed, f"changed: {changed}"
    again = run_forked(command.words, folder)
    is_there = "already there" in again.errors  # what is whole is not made again
    assert again.code == 0 or is_there, f"again: exit code {again.code}: {again.errors}"
    made, expected = digests(folder, command.makes), facts_of(folder)[name]["made"]
    assert made == expected, f"made {made}, not {expected}"
    left = []
    for pattern in UNFINISHED:
        left += [path.name for path in folder.rglob(pattern)]
    assert not left, f"left lying: {left}"


def digest_of(file: Path) -> str:
    """The hash of a file; empty where there is none."""
    return hashlib.blake2b(file.read_bytes()).hexdigest() if file.is_file() else ""
