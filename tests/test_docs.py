"""What the documents say exists: files, tests, commands, settings. (scripts/story.sh runs the commands themselves.)"""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from test_docs_data import SMALLER

from longfire.cli import main
from longfire.cli.arguments import take_settings
from longfire.cli.entry import COMMANDS
from longfire.config import recipe

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OWN_OPTIONS = {
    f"--{name}"
    for name in (
        "steps",
        "step",
        "tokens",
        "dtype",
        "prompt",
        "max_new_tokens",
        "out",
        "top_k",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "prompts",
        "interactive",
        "batch_size",
        "data",
        "needle",
        "tasks",
        "model",
        "config",
        "output",
        "keep-attention",
        "plugins",
        "gpus",
        "device",
        "memory",
        "json",
        "alternatives",
        "context",
    )
}


def name_of(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "design.md"], ids=name_of)
def test_files_that_are_named_exist(page):
    """Paths in backquotes, from the root, from longfire/ or beside the test before them. (The design also names what is to come.)"""
    for path in re.findall(r"`([a-z_/]+\w*\.(?:py|toml|sh|md|json))`", page.read_text()):
        written_by_a_run = path.startswith("runs/") or path in (
            "conversion.json",
            "run.toml",
            "recipe.toml",
            "serve.py",  # by the reader of the tutorial
            "config.json",
            "environment.json",
            "tokenizer.json",
            "manifest.json",
            "fingerprints.json",
            "classes.json",
            "checkpoints/validation_losses.json",
        )
        places = (ROOT, ROOT / "longfire", ROOT / "tests/contracts", ROOT / "recipes")
        assert written_by_a_run or any((place / path).exists() for place in places), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_settings_exist(page):
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?longfire (.+)$", text, re.M) + re.findall(
        r"`longfire ([^`]+)`", text
    )
    for line in lines:
        command, *words = shlex.split(line.split("  #")[0].replace(" ...", ""))
        if command.startswith("--") or command == "COMMAND":
            continue
        known = command in COMMANDS or page.name == "design.md"
        assert known, f"longfire {command}"
        if "--section.key" not in words:
            _, overrides = take_settings(words, OWN_OPTIONS)
            recipe.sections(recipe.read_words(overrides))
            unknown = [
                w
                for w in words
                if w.startswith("--") and "." in w and w.lstrip("-").split("=")[0] not in overrides
            ]
            assert not unknown, unknown


@pytest.mark.slow
def test_the_readmes_own_run(tmp_path, monkeypatch):
    """Its three lines, one after the other: on files, on with it, both drawn; with fewer steps, and away from the clone's runs/."""
    monkeypatch.chdir(ROOT)
    block = (ROOT / "README.md").read_text().split("## Your own run")[1].split("```")[1]
    first, second, drawn = (
        shlex.split(line.replace("runs/", f"{tmp_path}/"))[1:]
        for line in block.strip().splitlines()
    )
    small = shlex.split(SMALLER.replace("--training.steps 2", "--data.num_workers 1"))
    assert (
        main([*first, *small, "--data.folder", str(tmp_path / "stores"), "--training.steps", "2"])
        == 0
    )
    assert main([*second, "--training.steps", "3"]) == 0
    assert (tmp_path / "mine/checkpoints/step-3").is_dir()
    shutil.copytree(tmp_path / "mine", tmp_path / "quickstart")
    assert main([*drawn[:-1], str(tmp_path / drawn[-1])]) == 0
    assert (tmp_path / "compared.html").exists()


def test_the_readme_lists_every_command():
    listed = re.findall(r"^\| `longfire ([\w-]+)", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(COMMANDS)


def test_each_promise_names_the_tests_that_prove_it():
    """docs/flow.md lists every contract, and nothing that is none."""
    named = set(
        re.findall(r"`(?:tests/contracts/)?(test_\w+\.py)`", (ROOT / "docs/flow.md").read_text())
    )
    assert named == {path.name for path in (ROOT / "tests/contracts").glob("test_*.py")}


def test_the_pages_of_benchmarks_show_what_was_measured():
    """Every result of bench/results/ stands on a page as it is; `python bench/tables.py` puts it there."""
    tables, shown = runpy.run_path(str(ROOT / "bench/tables.py")), []
    for path in tables["PAGES"]:
        page = path.read_text()
        assert tables["with_tables"](page) == page
        shown += re.findall(r"<!-- results: (\w+) -->", page)
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "bench/results").glob("*.json"))
