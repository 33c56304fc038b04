"""plain_console.py: texts from outside are no commands, on no console, chart or model card."""

import ast
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from longfire.generation.prompts import printable
from longfire.huggingface.model_card import plain_markdown
from longfire.messages import visible
from longfire.plain_console import plain_column, plain_console
from longfire.training.report_page import as_svg, figure, plain_label

HOUSE = Path(__file__).parents[1] / "longfire"
NAMES = ["[red]a[/]", "[/nothing]", ":smile:", "[link=x]y"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_shows_names_as_they_are(name, capsys):
    table = Table(name)
    table.add_row(name)
    plain_console(width=60).print(table)
    assert capsys.readouterr().out.count(name) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_progress_bar_shows_names_as_they_are(name):
    column = plain_column("read {task.description}")
    with Progress(column, disable=True) as bar:
        task = bar.add_task(name)
        assert column.render(bar.tasks[task]).plain == f"read {name}"


def test_no_other_console_is_made():
    """Everywhere else the two functions are used."""
    for file in HOUSE.rglob("*.py"):
        if file.name == "plain_console.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("Console", "TextColumn"), f"{file}:{node.lineno}"


def test_control_characters_are_escapes():
    assert visible("a\x1b]0;title\x07b\u202ec\n\td é 字 👩‍💻") == (
        "a\\x1b]0;title\\x07b\\u202ec\n\td é 字 👩‍💻"
    )


def test_what_a_model_writes_cannot_command_a_terminal(monkeypatch):
    assert printable("\x1b[2J") == "\x1b[2J", "in a file it is what the model wrote"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert printable("\x1b[2J") == "\\x1b[2J"


@pytest.mark.parametrize("name", ["$x_{$", "a$b", "_private", "$$", "\\frac", "<b>&"])
def test_a_chart_shows_names_as_they_are(name):
    drawn, axes = figure("loss", "tokens")
    axes.plot([0, 1], [1, 2], label=plain_label(name))
    axes.legend()
    svg = as_svg(drawn)
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert shown in svg


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>", "&lt;script&gt;"),
        ("![x](http://y)", "!\\[x\\](http://y)"),
        ("a|b`c`\n# d", "a\\|b\\`c\\` # d"),
        ("hidden_size", "hidden_size"),
    ],
)
def test_a_model_card_shows_texts_as_they_are(text, shown):
    assert plain_markdown(text) == shown
