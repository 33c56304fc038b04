"""Processes of their own for the tests of signals: what they run, and how they end."""

import subprocess
import sys

# Sends itself SIGTERM while it runs {body}
TERMINABLE = """
import os, signal, threading, time
from longfire.ending_signals import Terminated, terminable
from longfire.launch import StopRequest
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    with terminable(grace_seconds={grace}):
        {body}
except Terminated:
    print("cleaned up")
"""

# A body that never returns to Python
WAITS_IN_A_LIBRARY = (
    "import ctypes; libc = ctypes.CDLL(None); lock = ctypes.create_string_buffer(64); "
    "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)"
)


def run_python(code: str, timeout_seconds: float = 20) -> subprocess.CompletedProcess:
    """The exit code and the output of a program."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_seconds
    )
