"""Every script of bench/ runs to its end on small sizes, so that it measures the code that is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
NO_SCRIPTS = {"measure", "tables", "plain_loop"}  # quickstart runs plain_loop beside ours
MINUTES = {
    "context_memory",
    "long_documents",
    "quickstart",
    "recurrent_ops",
    "startup",
    "train_throughput",
}


def scripts() -> list[object]:
    found: list[object] = []
    for file in sorted(BENCH.glob("*.py")):
        if file.stem not in NO_SCRIPTS:
            mark = pytest.mark.matrix if file.stem in MINUTES else pytest.mark.slow
            found.append(pytest.param(file, id=file.stem, marks=mark))
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", scripts())
def test_a_benchmark_runs(script, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
