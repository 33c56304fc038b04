"""Traces of torch's profiler and snapshots of CUDA memory, one step in `profiling.profile_freq`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from longfire.config.settings import Profiling


@contextmanager
def profiler(settings: Profiling, run_folder: Path, rank: int = 0) -> Iterator[Callable[[], None]]:
    """A function to call after each step. Traces are Chrome traces: open them in Perfetto or
    chrome://tracing. Each process writes its own; the rank stands in the names of all but the
    first's."""
    if not settings.enable_profiling:
        yield lambda: None
        return
    cuda = torch.cuda.is_available()
    traces = run_folder / settings.save_traces_folder
    snapshots = run_folder / settings.save_memory_snapshot_folder

    whose = f"-rank-{rank}" if rank else ""

    def write(trace: profile) -> None:
        if trace.step_num % settings.profile_freq:
            return  # the run ended where the step to trace would have begun
        traces.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(traces / f"step-{trace.step_num}{whose}.json"))
        if settings.enable_memory_snapshot and cuda:
            snapshots.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(
                str(snapshots / f"step-{trace.step_num}{whose}.pickle")
            )

    if settings.enable_memory_snapshot and cuda:
        torch.cuda.memory._record_memory_history()
    warmup = min(
        1, settings.profile_freq - 1
    )  # the step before is traced and thrown away: starting to trace is slow
    steps = schedule(wait=settings.profile_freq - 1 - warmup, warmup=warmup, active=1)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as tracing:
        yield tracing.step
