"""launch.py: signals ask and then end, a hang ends itself, several processes are refused, the compiler is found."""

import os
import signal
import time

import pytest
from signalled import TERMINABLE, WAITS_IN_A_LIBRARY, run_python

from longfire import launch
from longfire.config.settings import Comm
from longfire.errors import SettingsError
from longfire.launch import StopRequest, Watchdog


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (
        *(name for names in launch.NAMES.values() for name in names),
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back as well
        monkeypatch.delenv(name)


TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
def test_a_launcher_says_who_a_process_is(monkeypatch, no_launcher, environment):
    assert launch.world() == launch.ALONE
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.world() == launch.World(4, 3, 1) and (
        os.environ["RANK"],
        os.environ["WORLD_SIZE"],
    ) == ("3", "4")
    assert launch.meeting_point() == "host:29500"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"MASTER_PORT": ""},
            "WORLD_SIZE = 4 .* MASTER_PORT is not set.*scripts/train.sh or torchrun",
        ),
        ({"RANK": "4"}, "RANK = 4 .*WORLD_SIZE = 4: ranks count from 0"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE = 'many' in the environment is not a number"),
    ],
)
def test_half_a_launcher_is_reported(monkeypatch, no_launcher, changes, message):
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        launch.world()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_loop_to_stop(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert (
            stop.requested
            and stop.exit_code == 128 + number
            and launch.signal_name(stop.exit_code) == number.name
        )
    assert signal.getsignal(number) is before
    assert "finishing this step" in capfd.readouterr().err


def test_a_second_signal_ends_the_process_at_once():
    code = """
import os, signal, time
from longfire.launch import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""
    done = run_python(code)
    assert done.returncode == 128 + signal.SIGINT
    assert "SIGINT again: stopping at once" in done.stderr


def test_a_second_sigterm_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


CLOSED = """
import os
os.dup2(os.open(os.devnull, os.O_RDONLY), 2)  # nothing can be written to it
"""


def test_a_signal_is_heeded_where_no_message_can_be_written():
    """As in `longfire train 2>&1 | tee log`, whose tee gets the signal too."""
    body = "stop = StopRequest(); stop.__enter__(); time.sleep(2); print(stop.requested)"
    done = run_python(CLOSED + TERMINABLE.format(grace=0.5, body=body))
    assert done.stdout == "True\n" and done.returncode == 0
    done = run_python(CLOSED + TERMINABLE.format(grace=0.5, body=WAITS_IN_A_LIBRARY))
    assert done.returncode == 128 + signal.SIGTERM
    done = run_python(CLOSED + HANG.format(init=1, train=1, body="time.sleep(60)"))
    assert done.returncode == 5


def test_sigterm_in_the_loop_waits_for_its_save():
    body = "stop = StopRequest(); stop.__enter__(); time.sleep(2); stop.__exit__(); print(stop.requested)"
    done = run_python(TERMINABLE.format(grace=0.5, body=body))
    assert done.stdout == "True\n" and done.returncode == 0, done.stderr


HANG = """
import time
from longfire.launch import Watchdog
from longfire.config.settings import Comm
with Watchdog(Comm(init_timeout_seconds={init}, train_timeout_seconds={train}), grace_seconds=1) as watchdog:
    {body}
"""


@pytest.mark.parametrize(
    ("init", "train", "body", "key"),
    [
        (1, 0, "time.sleep(60)", "comm.init_timeout_seconds"),
        (0, 1, "watchdog.step_done(); time.sleep(60)", "comm.train_timeout_seconds"),
        (600, 1, "watchdog.step_done(); time.sleep(60)", "comm.train_timeout_seconds"),
    ],
)
def test_a_hang_ends_with_the_limit_the_stacks_and_an_exit_code(init, train, body, key):
    start = time.monotonic()
    done = run_python(HANG.format(init=init, train=train, body=body))
    assert time.monotonic() - start < 10
    assert done.returncode == 5
    assert f"1 s were not enough to finish a step ({key})" in done.stderr
    assert 'File "<string>", line 6' in done.stderr  # where it hung


def test_a_hang_that_holds_the_interpreter_ends_too():
    # ctypes.PyDLL keeps the lock while it sleeps: no other Python thread can run
    done = run_python(
        HANG.format(init=1, train=1, body="import ctypes; ctypes.PyDLL(None).sleep(60)")
    )
    assert done.returncode == 1 and "Timeout" in done.stderr and "<string>" in done.stderr


def test_a_run_that_moves_is_left_alone():
    with Watchdog(Comm(init_timeout_seconds=1, train_timeout_seconds=1)) as watchdog:
        for _ in range(6):
            time.sleep(0.25)
            watchdog.step_done()


def test_without_the_second_timer_the_thread_watches_alone():
    """faulthandler starts a thread, which the system may refuse."""
    refused = """
import faulthandler
def refuse(*_, **__):
    raise RuntimeError("unable to start watchdog thread")
faulthandler.dump_traceback_later = refuse
"""
    done = run_python(refused + HANG.format(init=1, train=1, body="time.sleep(60)"))
    assert done.returncode == 5 and "1 s were not enough" in done.stderr
    assert "unable to start" not in done.stderr


def test_the_first_steps_limit_ends_with_the_first_step():
    """Where later steps may take for ever, no timer of the first one is left behind."""
    done = run_python(HANG.format(init=1, train=0, body="watchdog.step_done(); time.sleep(2.5)"))
    assert done.returncode == 0, done.stderr


def test_no_limit_never_ends():
    with Watchdog(Comm(init_timeout_seconds=0, train_timeout_seconds=0)) as watchdog:
        time.sleep(0.05)
        watchdog.step_done()
    assert not watchdog.thread.is_alive()


def test_the_compiler_is_what_torch_will_use(monkeypatch, tmp_path):
    if not (headers := launch.cxx_compiler()):
        pytest.skip("no C++ compiler or no headers of Python here")
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert launch.cxx_compiler() == str(compiler) == os.environ["CXX"]
    monkeypatch.setenv("CXX", headers)
    assert launch.cxx_compiler() == headers
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert launch.cxx_compiler() is None


def test_what_the_environment_says_about_trackers_and_colours(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE", "HF_HUB_OFFLINE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert launch.wandb_run() == {"id": "abc"}
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert launch.wandb_run() == {"id": "abc", "mode": "disabled"}
    monkeypatch.delenv("WANDB_DISABLED")
    assert not launch.offline() and not launch.no_color()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert launch.offline() and launch.no_color()


ENDING = """
import atexit, os
from longfire.launch import end_process
os.environ["WORLD_SIZE"] = "{size}"
class Last:
    def __del__(self):
        print("the interpreter is taken down")
last = Last()
atexit.register(print, "at exit")
print("result")
end_process(3)
"""


@pytest.mark.parametrize(("size", "last_line"), [(1, "the interpreter is taken down\n"), (2, "")])
def test_one_of_several_processes_ends_without_taking_its_interpreter_down(size, last_line):
    """Threads of the communication library may be in it still."""
    done = run_python(ENDING.format(size=size))
    assert done.returncode == 3 and done.stdout == "result\nat exit\n" + last_line
