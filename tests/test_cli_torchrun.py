"""cli/torchrun.py: how processes ended that torchrun has started, without its traceback."""

import signal
import subprocess
import sys

import pytest

from longfire.cli.torchrun import ended_by_signal

START = [sys.executable, "-m", "longfire.cli.torchrun", "--standalone", "--nproc-per-node", "2"]
WORKER = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {end}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("end", "exit_code", "message"),
    [
        ("print('longfire: why', file=sys.stderr, flush=True); os._exit(6)", 6, "longfire: why"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9, "process 1 was ended by SIGKILL"),
    ],
)
def test_a_failed_process_is_one_message(tmp_path, end, exit_code, message):
    (tmp_path / "worker.py").write_text(WORKER.format(end=end))
    done = subprocess.run(
        [*START, str(tmp_path / "worker.py")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == exit_code
    assert done.stderr.count(message) == 1 and "Traceback" not in done.stderr


def test_a_signal_of_no_known_cause_is_a_fault():
    assert "SIGSEGV, which is a fault of longfire" in ended_by_signal(3, signal.SIGSEGV)
