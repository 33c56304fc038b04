"""tasks/contract.py: a task of a plugin trains, resumes and is measured by the loop of all tasks; a wrong one is named."""

import json
from pathlib import Path

import pytest
from small_runs import command_line

from longfire import plugins
from longfire.cli import main
from longfire.config.run import Run
from longfire.errors import SettingsError
from longfire.launch import World
from longfire.plugins import load_plugins
from longfire.tasks.contract import Task
from longfire.tasks.table import TASKS, task_named
from longfire.training import loop

PLUGIN = Path(__file__).parent / "counting.py"
BUILT_IN = ["image_classification", "language_modeling", "sequence_classification"]


@pytest.fixture(autouse=True)
def forget_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_loaded", {})
    yield
    for name in set(TASKS) - set(BUILT_IN):
        del TASKS[name]


def words(run: Path, **changes: str) -> dict[str, str]:
    return {
        "job.task": "counting",
        "job.task_options": "numbers=12",
        "job.dump_folder": str(run),
        "model.plugins": str(PLUGIN),
        "model.hidden_size": "32",
        "model.num_hidden_layers": "2",
        "model.layer_types": "attention",
        "model.attention.num_heads": "4",
        "model.init_matrices": "fan_in",
        "model.init_embedding": "0.5",
        "model.compute_dtype": "float32",
        "training.seq_len": "12",
        "training.batch_size": "32",
        "training.compile": "off",
        "training.threads": "1",
        "optimizer.lr": "1e-2",
        "lr_scheduler.warmup_steps": "10",
        "lr_scheduler.name": "constant",
        "eval.interval": "20",
        "metrics.report": "false",
        **changes,
    }


def numbers(run: Path) -> list[tuple]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "grad_norm", "tokens", "eval/unseen/accuracy")
    return [tuple(json.loads(line).get(name) for name in names) for line in lines]


def test_a_task_of_a_plugin_learns_resumes_and_is_measured(tmp_path, monkeypatch, capsys):
    whole = words(tmp_path / "whole", **{"training.steps": "120"})
    assert main(command_line(whole)) == 0
    assert "of the unseen numbers are right" in capsys.readouterr().out
    assert numbers(tmp_path / "whole")[-1][-1] >= 0.9
    for steps in ("25", "120"):
        monkeypatch.setattr(plugins, "_loaded", {})
        TASKS.pop("counting")
        settings = words(tmp_path / "parts", **{"training.steps": steps, "eval.at_end": "false"})
        assert main(command_line(settings)) == 0
    evaluated = [line for line in numbers(tmp_path / "whole") if line[0] != 120 or line[1]]
    assert numbers(tmp_path / "parts")[: len(evaluated)] == evaluated
    assert (tmp_path / "parts" / "counting.txt").read_text() == "12\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"job.task_options": "numbers=1"}, "'numbers=1' must lie in|numbers=1"),
        ({"job.task_options": "number=3"}, "'number=3' is no option of job.task = 'counting'"),
        ({"job.task": "countng"}, "'countng' must be one of .*counting"),
        ({"training.seq_len": "1"}, "the step is seen after two numbers"),
        ({"images.flip": "true"}, "images.flip = True is not read by job.task = 'counting'"),
    ],
)
def test_what_a_plugins_task_refuses_is_asked_before_a_device(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        Run.compose(None, words(tmp_path, **changes))


def test_an_axis_that_it_has_not_proven_is_refused(tmp_path):
    changes = {"parallelism.tensor_parallel_degree": "2"}
    with pytest.raises(SettingsError, match="tensor_parallel_degree = 2: no test has compared"):
        Run.compose(None, words(tmp_path, **changes), world=World(2))


@pytest.mark.parametrize(
    "table, message",
    [
        ("TASKS = [1]", "TASKS must be a table"),
        ("TASKS = {'mine': int}", "is no class derived from longfire.tasks.contract.Task"),
        (
            "from longfire.tasks.contract import Task\nTASKS = {'language_modeling': Task}",
            "there is a task of this name",
        ),
    ],
)
def test_a_wrong_table_is_named_with_its_file(tmp_path, table, message):
    (tmp_path / "mine.py").write_text(table)
    with pytest.raises(SettingsError, match=message) as error:
        load_plugins((str(tmp_path / "mine.py"),))
    assert "mine.py" in str(error.value)


def test_options_are_for_tasks_of_plugins(tmp_path):
    changes = {"job.task": "language_modeling"}
    with pytest.raises(SettingsError, match="job.task_options = 'numbers=12' is for a task of a"):
        Run.compose(None, words(tmp_path, **changes))


def test_the_table_has_the_tasks_and_the_loop_none_of_their_names():
    assert sorted(TASKS) == BUILT_IN
    assert all(issubclass(task_named(name), Task) for name in TASKS)
    for file in Path(loop.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert not any(f'"{name}"' in text for name in BUILT_IN), file
