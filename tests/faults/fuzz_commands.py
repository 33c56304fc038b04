"""Damaged runs, checkpoints, stores and exports, given to whole commands."""

import json
import random
from pathlib import Path

from tests.faults.damage import Kind, files_of, flip_bytes, forge_json, put_instead
from tests.faults.forked import run_forked
from tests.faults.workplace import COMMANDS, assert_message, digests, make_workplace

CASE = "case.json"
# The commands that read a folder, by its name
READERS = {
    "run": ("train", "export", "eval", "generate", "report"),
    "stores": ("train", "begin", "verify"),
    "hf": ("import", "convert", "eval_export", "generate_export"),
}
WORDS = {
    **{name: command.words for name, command in COMMANDS.items()},
    "verify": ("prepare", "recipe.toml", "--verify"),
    "eval_export": ("eval", "hf", "--data", "text.txt", "--tokens", "64"),
    "generate_export": ("generate", "hf", "--prompt", "a", "--max_new_tokens", "3"),
}
OUTSIDE = ("*.json", "*.toml", "*.txt")


def damage_commands(folder: Path, chance: random.Random) -> None:
    """Damage a file of a folder, with its checksums or after they were removed, and choose who
    reads it."""
    name = chance.choice(list(READERS))
    file = chance.choice(files_of(folder / name))
    if file.suffix == ".json" and chance.random() < 0.6:
        forge_json(file, chance)
    elif chance.random() < 0.1:
        file.unlink()
    elif chance.random() < 0.2:
        put_instead(file, folder / "text.txt", chance)
    else:
        flip_bytes(file, chance)
    sums = folder / name / "SHA256SUMS"
    if file != sums and chance.random() < 0.5:
        sums.unlink(missing_ok=True)
    (folder / CASE).write_text(json.dumps({"command": chance.choice(READERS[name])}))


def read_commands(folder: Path) -> None:
    command = json.loads((folder / CASE).read_text())["command"]
    outside = digests(folder, OUTSIDE)
    neighbours = sorted(path.name for path in folder.parent.iterdir())
    ended = run_forked(WORDS[command], folder)
    assert_message(ended)
    assert digests(folder, OUTSIDE).items() >= outside.items(), "a file outside was changed"
    assert sorted(path.name for path in folder.parent.iterdir()) == neighbours, "written outside"


COMMANDS_KIND = Kind(make_workplace, damage_commands, read_commands)
