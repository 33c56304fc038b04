"""docs/evaluation.md is true: its commands run, and end well, as they stand on the page."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from longfire.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.+?)```", PAGE, re.S) for line in block.splitlines()
]
TASK = """task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the page names: a run of two steps, its export, texts, prompts, a task."""
    home = tmp_path_factory.mktemp("home")
    (home / "docs").mkdir()
    (home / "docs/words.md").write_text((ROOT / "docs/words.md").read_text())
    (home / "README.md").write_text("read me " * 99)
    (home / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} fire " * 30}) for i in range(20))
    )
    (home / "prompts.txt").write_text("def \nclass A\n")
    (home / "prompts.jsonl").write_text('{"prompt": "def"}\n{"prompt": "import os\\n"}\n')
    (home / "my-tasks").mkdir()
    (home / "my-tasks/own.yaml").write_text(TASK.replace("DATA", str(home / "questions.jsonl")))
    (home / "questions.jsonl").write_text(
        json.dumps({"question": "fire is", "choices": [" hot", " cold"], "answer": 0})
    )
    (home / "model.json").write_text(
        json.dumps(
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "layer_types": ["gla", "attention"],
                "gla": {"num_heads": 2},
                "attention": {"num_heads": 2},
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = "--model.config model.json --data.dataset text.jsonl --data.validation_fraction 0.5 --training.seq_len 64"
        words += " --training.steps 2"
        words += " --training.batch_size 2 --lr_scheduler.warmup_steps 1 --checkpoint.export true --metrics.report false"
        words += " --job.dump_folder runs/quickstart --eval.tokens 2000 --data.num_workers 1"
        assert main(["train", *words.split()]) == 0
    return home


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command, home, monkeypatch, capsys):
    if "--tasks" in command:
        pytest.importorskip("lm_eval")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
        for name in (
            "HF_HUB_OFFLINE",
            "HF_DATASETS_OFFLINE",
            "HF_EVALUATE_OFFLINE",
            "TRANSFORMERS_OFFLINE",
        ):
            monkeypatch.setenv(name, "")  # what the command sets is taken back after the test
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\n    return x\n"))
    words = shlex.split(command)[1:]
    words += ["--max_new_tokens", "8"] if words[0] == "generate" else []
    assert main(words) == 0
    assert capsys.readouterr().out
    for option in ("--plot", "--json"):
        if option in words:
            assert (home / words[words.index(option) + 1]).stat().st_size


def test_the_page_names_every_way_to_draw_and_to_score():
    for option in (
        "--min_p",
        "--repetition_penalty",
        "--interactive",
        "--batch_size",
        "--data",
        "--needle",
        "--tasks",
        "--include_path",
        "--allow_download",
        "--plot",
        "--json",
        "--stats",
    ):
        assert option in PAGE, option
