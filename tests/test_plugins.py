"""A mixer from a user's own file: the one that docs/mixers.md shows trains, resumes and generates; a wrong file is named."""

import json
import re
from pathlib import Path

import pytest

from longfire import plugins
from longfire.cli import main
from longfire.errors import SettingsError
from longfire.mixers import MIXERS
from longfire.plugins import load_plugins

DOCS = Path(__file__).parents[1] / "docs" / "mixers.md"


def from_docs(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def forget_plugins():
    known = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(known)


@pytest.fixture
def longfire(tmp_path, monkeypatch, capsys, forget_plugins):
    """The command line in a folder of its own; each call as a process that has run no plugin yet."""
    monkeypatch.chdir(tmp_path)
    ours = dict(MIXERS)

    def run(*words: str, fails: bool = False) -> str:
        monkeypatch.setattr(plugins, "_loaded", {})
        MIXERS.clear()
        MIXERS.update(ours)
        code = main(list(words))
        printed = capsys.readouterr()
        assert bool(code) == fails, printed.err
        return printed.out + printed.err

    return run


def test_the_mixer_of_the_docs_trains_resumes_and_generates(tmp_path, longfire):
    (tmp_path / "my_mixer.py").write_text(from_docs("python"))
    (tmp_path / "config.json").write_text(from_docs("json"))
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"number {i} is {i * i}. " * 9}) + "\n" for i in range(200))
    )
    train = [
        "train",
        "--model.plugins",
        "my_mixer.py",
        "--model.config",
        "config.json",
        "--job.dump_folder",
        "runs/mine",
        "--data.dataset",
        "text.jsonl",
        "--training.seq_len",
        "64",
        "--training.batch_size",
        "2",
        "--training.threads",
        "1",
        "--checkpoint.interval",
        "4",
        "--lr_scheduler.warmup_steps",
        "2",
        "--metrics.report",
        "false",
        "--training.compile",
        "off",
    ]
    longfire(*train, "--training.steps", "4")
    assert "step-4" in longfire(*train, "--training.steps", "8")
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()
    ]
    assert sorted({step for step in steps}) == [*range(1, 9)]
    generate = [
        "generate",
        "runs/mine",
        "--prompt",
        "number 7",
        "--max_new_tokens",
        "5",
        "--temperature",
        "0",
    ]
    assert "number 7" in longfire(*generate, "--plugins", "my_mixer.py")
    refused = longfire(*generate, fails=True)
    assert "--plugins" in refused and "my_mixer.py" in refused


@pytest.mark.parametrize(
    "code, message",
    [
        (None, "there is no such file"),
        ("MIXERS = {'gla': 3}", r"MIXERS\['gla'\] is no class derived from"),
        ("MIXERS = 3", "must be a table"),
        (
            "import nothing_of_that_name",
            "failed when it was run: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        (
            "from longfire.mixers.gla import GLA\nMIXERS = {'gla': GLA}",
            r"MIXERS\['gla'\]: the name is taken by longfire.mixers.gla",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(code, message, tmp_path, forget_plugins):
    if code is not None:
        (tmp_path / "mine.py").write_text(code)
    with pytest.raises(SettingsError, match=message):
        load_plugins((str(tmp_path / "mine.py"),))


def test_a_file_runs_once(tmp_path, forget_plugins):
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\np = Path(__file__).with_name('count')\n"
        "p.write_text(p.read_text() + 'x' if p.exists() else 'x')\n"
    )
    load_plugins((str(tmp_path / "mine.py"),) * 2)
    assert (tmp_path / "count").read_text() == "x"


OLD = """
import torch
from longfire.mixers.gla import GLA
from longfire.ops.linear_attention import linear_attention

class Old(GLA):
    def __init__(self, model, shape, layer):
        super().__init__(model, shape, layer)
        self.recur = linear_attention

    def forward(self, x, seq):
        return self.recur(x, x, x, documents=seq.documents)[0]

class Derived(Old):
    pass

MIXERS = {"derived": Derived}
"""

UNLIKE = """
import torch
from longfire.mixers.gla import GLA

class Unlike(GLA):
    def __init__(self, model, shape, layer):
        super().__init__(model, shape, layer)
        self.shift = torch.nn.Parameter(torch.zeros(3))

    def attend(self, x):
        return x + self.shift

    def forward(self, x, seq):
        return self.attend(super().forward(x, seq))

MIXERS = {"unlike": Unlike}
"""


def test_a_mixer_of_an_earlier_version_names_what_to_write_now(tmp_path, forget_plugins):
    (tmp_path / "mine.py").write_text(OLD)
    with pytest.raises(SettingsError, match=r"mine.py:12: self.recur .* call seq.ops.recurrence"):
        load_plugins((str(tmp_path / "mine.py"),))
    (tmp_path / "unlike.py").write_text(UNLIKE)
    load_plugins((str(tmp_path / "unlike.py"),))
