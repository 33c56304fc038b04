"""SIGTERM and SIGINT end a command by an exception, so that what is half written is removed on the
way out.

Python runs a signal's handler between two of its own operations, wherever those are. There are
places where an exception is lost or does harm: Python drops it in a `__del__`, and torch ends the
process where its C++ code has called Python and takes no exception (torch 2.13: the search for the
rule of an operator under a mode). Then the exception waits until torch has returned to code of
ours, and what Python dropped is sent once more.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from types import FrameType

from longfire.launch import write_to_stderr

TERM_SECONDS = 3  # that a library may take to return after SIGTERM
AGAIN_SECONDS = 0.02  # after which a signal is sent again
TORCH_SECONDS = 1  # for which torch's Python code is waited for: a compilation takes minutes
# Code of torch that only calls what it was given
WRAPPERS = {"torch.nn.modules.module", "torch.utils._contextlib"}
# What torch's C++ code calls, whoever has written it
CALLED_BY_TORCH = {"__torch_dispatch__", "__torch_function__"}


class Terminated(BaseException):
    """SIGTERM where nothing has to be saved first. Not an Exception: it ends the process."""


class EndingSignal:
    """The signal that ends a command, None before one arrives. It is noted because a library may
    put an error of its own in the place of the exception that the signal has raised."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.is_raised = False  # its exception, which Python has not dropped
        self.came_at: float | None = None  # while it waits for torch to return
        self.is_traced = False  # the frame to which torch returns
        self.is_over = False
        self.is_sent_again = False
        self.again = -1  # the descriptor that takes what is to be sent again

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM. A launcher sends it twice: the second one must not interrupt the
        removal of what is half written."""
        if not self.is_raised and self.can_raise(number, frame):
            raise Terminated

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT, which a user may send again to end at once."""
        if self.can_raise(number, frame):
            raise KeyboardInterrupt

    def can_raise(self, number: int, frame: FrameType | None) -> bool:
        """Note the signal. Whether its exception may be raised in this frame. If not, it is raised
        when torch returns, or by the signal that is sent again when that takes too long."""
        if self.is_over:
            return False
        self.number = signal.Signals(number)
        now = time.monotonic()
        if self.came_at is None:
            self.came_at = now
        outer = frame_outside_torch(frame)
        if outer is frame or now - self.came_at > TORCH_SECONDS:
            self.note_raised()
            return True
        if outer is not None:
            outer.f_trace = self.raise_here
            sys.settrace(trace_nothing)  # without one, f_trace is not called
            self.is_traced = True
        self.send_again()
        return False

    def note_raised(self) -> None:
        if self.is_traced:
            sys.settrace(None)
        self.is_traced = False
        self.came_at = None
        self.is_sent_again = False  # it would interrupt what cleans up
        self.is_raised = True

    def raise_here(self, frame: FrameType, event: str, argument: object) -> None:
        """Called where a frame goes on to which torch has returned (sys.settrace)."""
        frame.f_trace = None
        if self.came_at is None or self.is_over:
            return
        self.note_raised()
        if self.number == signal.SIGTERM:
            raise Terminated
        raise KeyboardInterrupt

    def dropped(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """The hook (sys.unraisablehook) for errors that Python drops."""
        is_of_signal = issubclass(unraisable.exc_type, Terminated | KeyboardInterrupt)
        if self.number is None or not is_of_signal:
            sys.__unraisablehook__(unraisable)
            return
        self.is_raised = False
        self.send_again()

    def send_again(self) -> None:
        """A moment later, by the thread of `send_signals_again`: no lock is taken here, which the
        interrupted code may hold."""
        assert self.number is not None, "it has come"
        self.is_sent_again = True
        with suppress(OSError):  # the command is over
            os.write(self.again, bytes([self.number]))


def trace_nothing(frame: FrameType, event: str, argument: object) -> None:
    """No frame that begins is traced."""


def frame_outside_torch(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that torch's C++ code has not called: this one, or one that it will
    return to. None where there is none."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    outside = None
    for frame in reversed(frames):
        if is_of_torch(frame):
            break
        outside = frame
    return outside


def is_of_torch(frame: FrameType) -> bool:
    """Whether a frame runs code of torch, or what torch calls."""
    module = str(frame.f_globals.get("__name__", ""))
    if module == "torch" or module.startswith("torch."):
        return module not in WRAPPERS
    return frame.f_code.co_name in CALLED_BY_TORCH


@contextmanager
def terminable(
    ending: EndingSignal | None = None,
    grace_seconds: float = TERM_SECONDS,
) -> Iterator[None]:
    """SIGTERM raises Terminated inside, so that what is half written is removed on the way out, and
    SIGINT KeyboardInterrupt, unless it is ignored. Which came is noted in `ending`.

    Where a library does not return for grace_seconds (it trains a tokenizer, or waits for other
    processes), a thread ends the process. In a thread other than the main one nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = ending or EndingSignal()
    came, writer = os.pipe()
    os.set_blocking(writer, False)
    again, ending.again = os.pipe()
    os.set_blocking(ending.again, False)
    before = signal.signal(signal.SIGTERM, ending.terminate)
    interrupt_before = signal.getsignal(signal.SIGINT)
    if interrupt_before is signal.default_int_handler:
        signal.signal(signal.SIGINT, ending.interrupt)
    hook_before = sys.unraisablehook
    sys.unraisablehook = ending.dropped
    woken_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threads = [
        threading.Thread(
            target=end_after_a_signal, args=(came, grace_seconds), name="sigterm", daemon=True
        ),
        threading.Thread(
            target=send_signals_again, args=(again, ending), name="signal again", daemon=True
        ),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.is_over = True
        signal.set_wakeup_fd(woken_before)
        os.close(writer)  # which ends the threads
        os.close(ending.again)
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt_before)
        sys.unraisablehook = hook_before


def send_signals_again(again: int, ending: EndingSignal) -> None:
    """Send this process each signal whose number comes through a pipe, a moment after it; return
    when the pipe ends."""
    with open(again, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            time.sleep(AGAIN_SECONDS)
            if ending.is_sent_again and not ending.is_over:
                os.kill(os.getpid(), number[0])


def end_after_a_signal(came: int, grace_seconds: float) -> None:
    """Wait for SIGTERM, then for grace_seconds, and end the process; return when the pipe ends
    before."""
    with open(came, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != signal.SIGTERM:
                continue
            if ends_within(pipe, grace_seconds):
                return
            write_to_stderr("SIGTERM: stopped; what is whole on disk stays")
            os._exit(128 + signal.SIGTERM)


def ends_within(pipe: FileIO, seconds: float) -> bool:
    """Whether a pipe ends in time. Signals that come meanwhile change nothing: launchers send
    SIGTERM twice."""
    until = time.monotonic() + seconds
    while True:
        left = max(0.0, until - time.monotonic())
        has_more, _, _ = select.select([pipe], [], [], left)
        if not has_more:
            return False
        if not pipe.read(1):
            return True
