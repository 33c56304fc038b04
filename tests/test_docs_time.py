"""docs/time.md is true: its commands run as they stand on the page, with a bound on the steps; the second repeats the first."""

import json
import re
import shlex
from pathlib import Path

import pytest
from test_docs_data import SMALLER

from longfire.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/time.md").read_text()


@pytest.mark.slow
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```bash\n(.+?)```", PAGE, re.S)
    first, second = (
        shlex.split(block.strip().replace("runs/", f"{tmp_path}/"))[1:] for block in blocks
    )
    own = [
        "--data.dataset",
        "docs",
        "--data.folder",
        str(tmp_path / "stores"),
        "--data.num_workers",
        "1",
    ]
    small = [
        *SMALLER.replace("--training.steps 2", "--training.steps 6").split(),
        *own,
        "--training.threads",
        "1",
    ]
    assert main([*first, *small, "--job.dump_folder", str(tmp_path / "quickstart")]) == 0
    assert "300 s of training are 6 steps" in capsys.readouterr().out
    assert main(second) == 0
    losses = [
        [
            record["loss"]
            for record in map(
                json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines()
            )
            if "loss" in record
        ]
        for run in ("quickstart", "again")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_page_speaks_of_every_schedule():
    from longfire.config import settings

    assert all(
        f"`{name}`" in PAGE
        for name in settings.LRScheduler.__dataclass_fields__["name"].type.__args__
    )
