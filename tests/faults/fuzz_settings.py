"""Settings of odd keys, types and sizes, in a recipe and on the command line, through `longfire plan`."""

import contextlib
import io
import json
import os
import random
from pathlib import Path

import tomli_w

from longfire.cli.entry import main
from longfire.config.aliases import ALIASES
from longfire.config.recipe import OTHER_NAMES, SETTINGS, SHAPE_KEYS
from tests.faults.damage import ODD_VALUES, Kind

DOCUMENTED_EXIT_CODES = range(2, 7)  # docs/reference: 0 for what is right, 1 for a fault of ours
MIXERS = ("attention", "gla", "mamba2", "rwkv7", "gsa", "hgrn2")
# Keys that name code or what is on the net: the case is another kind's
LEFT_OUT = ("model.plugins",)
KEYS = [
    *(key for key in SETTINGS if key not in LEFT_OUT),
    *SHAPE_KEYS,
    *ALIASES,
    *OTHER_NAMES,
    *(f"model.{mixer}.{key}" for mixer in MIXERS for key in ("num_heads", "head_dim", "qk_norm")),
    "model.attention",
    "training",
    "training.stepz",
    "größe.länge",
    "",
    ".",
]
WORDS = ("true", "off", "auto", "full", "0.5", "2", "-1", "7", "1e9", "inf", "nan", "[1, 2]")
ODD_TEXTS = (
    "é",
    "\u202e",
    "\x1b[31m",
    "a" * 5000,
    "$x_{$",
    "[red]",
    "'",
    '"""',
    "1_0",
    "٣",
    "0x10",
)
SIZES = (1, 2, 3, 8, 64, 1000, 2**31, 2**40, 10**30, -(2**63), 0.1, 1e-30, 1e308)
RECIPE = {
    "job": {"dump_folder": "run"},
    "training": {"steps": 20, "seq_len": 64, "batch_size": 2},
    "data": {"dataset": ["text.txt"]},
    "tokenizer": {"path": "bytes"},
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "layer_types": ["gla", "attention"],
        "gla": {"num_heads": 2},
        "attention": {"num_heads": 2},
    },
}


def make_settings(folder: Path) -> None:
    folder.mkdir()
    (folder / "text.txt").write_text("a few words of text\n" * 20)
    (folder / "recipe.toml").write_text(tomli_w.dumps(RECIPE))
    (folder / "words.json").write_text("[]")


def odd_value(chance: random.Random) -> object:
    """A value of a random type and size; TOML can write it."""
    value = chance.choice((*ODD_VALUES, *WORDS, *ODD_TEXTS, *SIZES, *SIZES))
    if value is None or value == 10**399:
        return chance.randrange(10)
    if chance.random() < 0.1:
        return [value, chance.choice(WORDS)]
    return value


def damage_settings(folder: Path, chance: random.Random) -> None:
    """One to three odd settings, each in the recipe or on the command line."""
    recipe: dict[str, object] = json.loads(json.dumps(RECIPE))
    words: list[str] = []
    written = []
    for _ in range(chance.randint(1, 3)):
        key, value = chance.choice(KEYS), odd_value(chance)
        if chance.random() < 0.5:
            words += word_of(key, value, chance)
        elif "." in key and isinstance(recipe.get(key.split(".")[0], {}), dict):
            put(recipe, key.split("."), value)
        else:
            recipe[key] = value
        if chance.random() < 0.05:
            written.append(f"\n[training]\nsteps = {chance.randrange(9)}\n")
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe) + "".join(written))
    (folder / "words.json").write_text(json.dumps(words))


def put(table: dict[str, object], path: list[str], value: object) -> None:
    """Set the value at a path of keys; a value in the way of it is replaced by a table."""
    for key in path[:-1]:
        inner = table.get(key)
        if not isinstance(inner, dict):
            inner = table[key] = {}
        table = inner
    table[path[-1]] = value


def word_of(key: str, value: object, chance: random.Random) -> list[str]:
    """The setting as words of a command line, in one of the spellings."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\x00", "")
    ways = ([f"--{key}", text], [f"--{key}={text}"], [f"{key}={text}"], [f"--{key}"])
    return chance.choice(ways)


def read_settings(folder: Path) -> None:
    recipe = str(folder / "recipe.toml")
    words = json.loads((folder / "words.json").read_text())
    before = sorted(path.name for path in folder.iterdir())
    command(["plan", recipe, "--alternatives", "0", *words], folder)
    assert sorted(path.name for path in folder.iterdir()) == before, "a plan wrote something"


def command(words: list[str], folder: Path) -> None:
    """Run a command in the folder; it must end as right, or with a message and an exit code that is
    documented. A fault of longfire's raises."""
    here = os.getcwd()
    shown, errors = io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
            code = exit_code_of(words)
    finally:
        os.chdir(here)
    message = errors.getvalue()
    assert "Traceback" not in message, message
    assert code == 0 or (code in DOCUMENTED_EXIT_CODES and message.strip()), (
        f"exit code {code} of {words}: {message}"
    )


def exit_code_of(words: list[str]) -> int:
    """What `longfire` with these words exits with; where longfire is at fault, its error is raised
    rather than reported."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2


SETTINGS_KIND = Kind(make_settings, damage_settings, read_settings)
