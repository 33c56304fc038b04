"""Words that name something of this repository name something that is there: settings, commands, extras, paths. In README,
docs, recipes, `--help` and messages (docs/reference/ is made of the help)."""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from longfire.cli.commands import COMMANDS
from longfire.config.aliases import ALIASES
from longfire.config.model_config import ModelConfig
from longfire.config.recipe import SETTINGS
from longfire.config.settings import SECTIONS
from longfire.mixers import MIXERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
SCRIPTS = [*sorted((ROOT / "scripts").glob("*")), ROOT / "Dockerfile", ROOT / "Makefile"]
CODE = sorted((ROOT / "longfire").rglob("*.py"))
# An identifier of a list that readers do not have: S2-46, S0x-3
NUMBERED = re.compile(r"\bS\dx?-\d+\b")
SETTING = re.compile(rf"(?<![\w./\-])({'|'.join(SECTIONS)})\.([a-z][a-z0-9_]*)(?![\w(/]|\.\w)")
COMMAND = re.compile(r"`longfire ([a-z_]+(?:-[a-z_]+)*)\b")
EXTRA = re.compile(r"longfire\[([a-z_,]+)\]")
FILE = re.compile(
    r"(?<![\w./\-<*])((?:docs|recipes|bench|scripts|tests|longfire)/[\w./\-]*\.(?:md|py|toml|sh|json))\b"
)
ENDINGS = {
    "json",
    "jsonl",
    "py",
    "toml",
    "txt",
    "yaml",
    "yml",
    "safetensors",
    "pt",
    "bin",
    "npz",
    "parquet",
    "md",
    "html",
}
MODEL_KEYS = {field.name for field in fields(ModelConfig)} | set(MIXERS)
ATTENTION_KEYS = {field.name for field in fields(MIXERS["attention"].Config)}
# Attributes of objects, and names of files, that look like a setting
NOT_SETTINGS = {
    "data.sources",  # a table of a recipe
    "model.embed",
    "model.embed_tokens",
    "model.embeddings",
    "model.head",
    "model.layers",
    "optimizer.state",
    "tokenizer.model",
    "tokenizer.padding_side",
    "tokenizer.vocab_size",
}
# Of other systems, in their own words
FOREIGN_PAGES = {
    "migration.md",
    "flame-accelerate.md",
    "flame-torchtitan.md",
    "flash-attention.md",
    "ring-attention.md",
}


def strings_and_comments(file: Path) -> Iterator[str]:
    """What a file of Python says to people: its strings, docstrings and comments."""
    source = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def text_of(file: Path) -> str:
    if file.suffix == ".py":
        return "\n".join(strings_and_comments(file))
    return file.read_text(encoding="utf-8")


def unknown_settings(text: str) -> list[str]:
    """Words that look like settings and are none, neither of today nor of before."""
    found = []
    for match in SETTING.finditer(text):
        name = match[0]
        if match[2] in ENDINGS or name in SETTINGS or name in ALIASES or name.endswith("_"):
            continue
        if name in NOT_SETTINGS or (match[1] == "model" and match[2] in MODEL_KEYS):
            continue
        if (ROOT / "longfire" / match[1] / f"{match[2]}.py").exists():
            continue
        if match[1] == "attention" and match[2] in ATTENTION_KEYS:
            continue
        found.append(name)
    return found


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "file", [*PAGES, *RECIPES, *SCRIPTS, *CODE], ids=lambda file: str(file.relative_to(ROOT))
)
def test_what_is_named_is_there(file):
    if file.is_dir():
        return
    text = text_of(file)
    assert not NUMBERED.findall(text), "identifiers of a list that readers do not have"
    assert not [word for word in COMMAND.findall(text) if word not in COMMANDS and word != "help"]
    for found in EXTRA.findall(text):
        assert set(found.split(",")) <= extras()
    if file.name not in FOREIGN_PAGES and "aliases" not in file.parts:
        assert not [name for name in FILE.findall(text) if not (ROOT / name).exists()]
        assert not unknown_settings(text)


def test_a_wrong_word_would_be_found():
    assert NUMBERED.findall("as in S2-46") and NUMBERED.findall("(S0x-3)")
    assert unknown_settings("set training.stepps to 3") == ["training.stepps"]
    assert not unknown_settings("set training.steps to 3; data.json, optimizer.step()")
    assert FILE.findall("see docs/nothing.md") == ["docs/nothing.md"]
    assert COMMAND.findall("run `longfire fly`") == ["fly"]
