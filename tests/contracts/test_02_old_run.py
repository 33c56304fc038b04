"""Promise 2 over time: a run that an earlier version of longfire began is resumed by this one.

tests/golden/run_of_2026_11 is the folder of such a run as that version wrote it: 6 steps of a GLA
and attention hybrid in float32, with the checkpoints of steps 3 and 6 and all records. Its settings
carry the names of that time. When a test here fails, the settings, the checkpoint format or the
order of data changed: give the old form an alias or a migration. Never regenerate the folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longfire.cli import main

OLD_RUN = Path(__file__).parents[1] / "golden" / "run_of_2026_11"
# Three Adam steps in float32 by other kernels: Adam divides by the root of a second moment, so a
# relative error of 2**-24 * sqrt(64 tokens) in a gradient stays one of the update.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old run as it was after 3 of its 6 steps, in a folder of its own."""
    shutil.copytree(OLD_RUN / "run", tmp_path / "run")
    for name in ("texts.jsonl", "golden.toml"):
        shutil.copy(OLD_RUN / name, tmp_path / name)
    settings = tmp_path / "run" / "run.toml"
    settings.write_text(settings.read_text().replace("@FOLDER@", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {}).update(record)
    return found


@pytest.mark.parametrize("recipe", ["run/run.toml", "golden.toml"])
def test_an_old_run_is_resumed(folder: Path, recipe: str) -> None:
    before = records(folder)
    assert main(["train", recipe]) == 0

    state = json.loads((folder / "run/checkpoints/step-6/state.json").read_text())
    old_state = json.loads((OLD_RUN / "step-6/state.json").read_text())
    for key in ("step", "rows_consumed", "tokens", "vocabulary"):
        assert state[key] == old_state[key]
    after = records(folder)
    for step in (4, 5, 6):
        for key in ("loss", "grad_norm", "lr"):
            assert after[step][key] == pytest.approx(before[step][key], rel=1e-5), (step, key)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_the_checkpoint_after_is_the_one_it_wrote_then(folder: Path, part: str) -> None:
    assert main(["train", "run/run.toml"]) == 0
    name = f"shard-00000-{part}.safetensors"
    then = load_file(OLD_RUN / "step-6" / name)
    now = load_file(folder / "run/checkpoints/step-6" / name)
    assert now.keys() == then.keys()
    for key in then:
        torch.testing.assert_close(now[key], then[key], **TOLERANCE)


def test_an_old_run_is_evaluated_generates_and_is_exported(folder: Path) -> None:
    assert main(["eval", "run"]) == 0
    assert main(["generate", "run", "--prompt", "the river", "--max_new_tokens", "4"]) == 0
    assert main(["export", "run", "exported"]) == 0
    assert (folder / "exported" / "model.safetensors").is_file()
