"""Several processes on one machine: `in_processes(4, function, ...)` runs function(rank, ...) in each, joined by gloo."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=120)  # of a collective: a test that hangs ends


def in_processes(
    count: int, function: Callable, *arguments: Any, timeout_seconds: float = 240
) -> list[Any]:
    """What function(rank, *arguments) returned in each of `count` forked processes, by rank; anything that pickles.

    Raises AssertionError with the traceback of the first process that failed. One thread a process: there are more of them than
    cores.
    """
    context = mp.get_context("fork")  # a spawned one imports torch again: 6 s more for each
    answers, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(
            target=run, args=(rank, count, port, answers, function, arguments), daemon=True
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    said: dict[int, Any] = {}
    try:
        while len(said) < count:
            rank, failure, value = wait_for(answers, processes, said, timeout_seconds)
            assert failure is None, f"process {rank} of {count}:\n{failure}"
            said[rank] = value
    finally:
        for process in processes:
            process.kill() if len(said) < count else process.join()
    return [said[rank] for rank in range(count)]


def wait_for(
    answers: Any, processes: list, said: dict, timeout_seconds: float
) -> tuple[int, str | None, Any]:
    """The next answer. Raises AssertionError when a process died without one, or when none comes."""
    if answers._reader.poll(timeout_seconds):
        return pickle.loads(answers.get())
    states = [
        f"{rank}: {process.exitcode}" for rank, process in enumerate(processes) if rank not in said
    ]
    raise AssertionError(
        f"no answer in {timeout_seconds} s; exit codes of those that are silent: {', '.join(states)}"
    )


def run(
    rank: int, count: int, port: int, answers: Any, function: Callable, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    if (
        "torch._inductor.config" in sys.modules
    ):  # threads that compiled for the parent are not in its fork, which would wait for them
        sys.modules["torch._inductor.config"].compile_threads = 1
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(count),
    )
    try:
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=TIMEOUT)
        answers.put(
            pickle.dumps((rank, None, function(rank, *arguments)))
        )  # by value, not as shared memory
        dist.barrier()  # nobody leaves while another one still talks
        dist.destroy_process_group()
    except BaseException:
        answers.put(pickle.dumps((rank, traceback.format_exc(), None)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
