"""A few cases of each kind of the fuzzer (fuzz.py), with a fixed seed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fuzz import KINDS, fuzz

ROOT = Path(__file__).parents[2]
# Kinds whose cases are commands in forked processes: a process of its own forks them, in which no
# other test has started threads
WITH_PROCESSES = {"commands": 6, "files": 6, "signals": 6, "limits": 6}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - WITH_PROCESSES.keys()))
def test_files_that_are_damaged_or_forged_survive(name, tmp_path):
    failures = fuzz(name, 40, 1, tmp_path).failures
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cases"), WITH_PROCESSES.items())
def test_commands_that_are_hurt_survive(name, cases, tmp_path):
    words = ["--kind", name, "--cases", str(cases), "--seed", "1", "--keep", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
