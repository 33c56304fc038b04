"""docs/parallelism.md: its tables are those of the tests that prove them; its launcher starts what it says."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from muon import Muon
from plans import capability_table, optimizers_table, plans_table

from longfire.config import settings
from longfire.mixers import MIXERS
from longfire.optim import OPTIMIZERS, rule_of

BUILT_IN = {name: type(rule_of(settings.Optimizer(name=name))) for name in OPTIMIZERS}
ROOT = Path(__file__).parents[1]


def with_tables(page: str) -> str:
    tables = {
        "mixers": capability_table(list(MIXERS)),
        "plans": plans_table(),
        "optimizers": optimizers_table({**BUILT_IN, "Muon": Muon}),
    }
    for name, table in tables.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, t=table: found[1] + t + found[2],
            page,
            flags=re.S,
        )
    return page


def test_the_tables_are_those_of_the_tests():
    page = (ROOT / "docs/parallelism.md").read_text()
    assert with_tables(page) == page, "python tests/test_docs_parallelism.py writes them"


def test_the_launcher_hands_everything_to_torchrun(tmp_path):
    """With a python that only tells what it was given."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "NGPU": "4",
        "NNODE": "2",
        "MASTER_ADDR": "node-0",
        "MASTER_PORT": "123",
        "MAX_RESTARTS": "3",
        "LOG_RANK": "0,2",
    }
    command = [
        shutil.which("bash"),
        str(ROOT / "scripts/train.sh"),
        "x.toml",
        "--training.steps",
        "7",
    ]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    for part in (
        "--nnodes 2 ",
        "--nproc-per-node 4 ",
        "--max-restarts 3 ",
        "--rdzv-endpoint node-0:123 ",
        "--local-ranks-filter 0,2 --tee 3 ",
        "-m longfire train x.toml --training.steps 7",
    ):
        assert part in said


def launched(tmp_path, **environment: str) -> subprocess.CompletedProcess:
    """scripts/train.sh with a python that only tells what it was given."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    command = [shutil.which("bash"), str(ROOT / "scripts/train.sh"), "x.toml"]
    return subprocess.run(
        command,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "NGPU": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_two_runs_on_one_machine_do_not_meet(tmp_path):
    """The second one waited at the port of the first."""
    assert "--standalone " in launched(tmp_path).stdout
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = launched(tmp_path, MASTER_PORT=port)
        assert refused.returncode == 2 and f"port {port} is taken" in refused.stderr
    assert f"--rdzv-endpoint localhost:{port} " in launched(tmp_path, MASTER_PORT=port).stdout
    two_machines = launched(tmp_path, NNODE="2", MASTER_ADDR="node-0")
    assert "--rdzv-endpoint node-0:29500 " in two_machines.stdout


if __name__ == "__main__":
    file = ROOT / "docs/parallelism.md"
    file.write_text(with_tables(file.read_text()))
    sys.exit()
