"""ending_signals.py: a signal ends a command by an exception, which no library loses and which does no harm."""

import signal

import pytest
from signalled import TERMINABLE, WAITS_IN_A_LIBRARY, run_python


def test_sigterm_ends_what_has_nothing_to_save():
    done = run_python(TERMINABLE.format(grace=10, body="time.sleep(60)"))
    assert done.returncode == 0 and done.stdout == "cleaned up\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_where_python_drops_errors_is_sent_again(number):
    done = run_python(DROPPED.format(number=int(number)))
    assert done.stdout == "ended\n" and done.returncode == 0
    assert not done.stderr


DROPPED = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
from longfire.ending_signals import Terminated, terminable
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(1)  # in which the handler raises
try:
    with terminable():
        Dropped()
        time.sleep(15)
except (Terminated, KeyboardInterrupt):
    print("ended")
"""


def test_sigterm_ends_a_process_that_waits_in_a_library():
    """Python sees the signal when the library returns; one that waits for a lock of its own does not."""
    done = run_python(TERMINABLE.format(grace=1, body=WAITS_IN_A_LIBRARY))
    assert done.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: stopped" in done.stderr


def test_a_second_sigterm_leaves_the_time_to_clean_up():
    """Launchers send it to the group of processes, and to each."""
    body = """try:
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            print("removed")"""
    done = run_python(TERMINABLE.format(grace=10, body=body))
    assert done.returncode == 0 and done.stdout == "removed\ncleaned up\n"


IN_TORCH = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
from longfire.ending_signals import Terminated, terminable
def look_up(seconds):
    os.kill(os.getpid(), {number})
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    print("looked up", flush=True)
of_torch = type(look_up)(look_up.__code__, dict(globals(), __name__="torch._library.some"))
try:
    with terminable():
        of_torch({seconds})
        time.sleep(15)
except (Terminated, KeyboardInterrupt):
    print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_code_of_torch_is_raised_after_it(number):
    """Its C++ code calls Python where an exception ends the process: `longfire plan` aborted."""
    done = run_python(IN_TORCH.format(number=int(number), seconds=0.3))
    assert done.stdout == "looked up\nended\n" and done.returncode == 0
    assert not done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_code_of_torch_that_takes_long_is_interrupted(number):
    done = run_python(IN_TORCH.format(number=int(number), seconds=30))
    assert done.stdout == "ended\n" and done.returncode == 0


def test_it_is_raised_as_soon_as_torch_has_returned():
    """Also where nearly all time is spent in torch, and no signal that is sent again meets other code."""
    once = IN_TORCH.format(number=int(signal.SIGINT), seconds=0.2)
    again = """
        while True:
            of_torch_again(0.2)
"""
    body = once.replace("        time.sleep(15)\n", again.lstrip("\n"))
    quiet = """
def work(seconds):
    time.sleep(seconds)
    print("worked", flush=True)
of_torch_again = type(work)(work.__code__, dict(globals(), __name__="torch._library.some"))
try:"""
    done = run_python(body.replace("\ntry:", quiet))
    assert done.stdout == "looked up\nended\n" and done.returncode == 0


CLEANS_UP = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from longfire.ending_signals import terminable
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)
of_torch = type(interrupt)(interrupt.__code__, dict(globals(), __name__="torch.some"))
for number in range(100):
    try:
        with terminable():
            try:
                of_torch()
                time.sleep(15)
            finally:
                time.sleep(0.03)  # in which a signal that was sent again would come
                print("removed", flush=True)
    except KeyboardInterrupt:
        print("ended", flush=True)
"""


def test_what_cleans_up_is_not_interrupted_by_the_same_signal():
    done = run_python(CLEANS_UP)
    assert done.stdout == 100 * "removed\nended\n" and done.returncode == 0


AFTERWARDS = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from longfire.ending_signals import EndingSignal, terminable
ending = EndingSignal()
with terminable(ending):
    ending.number = signal.SIGINT
    ending.send_again()
time.sleep(0.2)
print("nothing came")
"""


def test_nothing_is_sent_when_the_command_is_over():
    done = run_python(AFTERWARDS)
    assert done.stdout == "nothing came\n" and done.returncode == 0
