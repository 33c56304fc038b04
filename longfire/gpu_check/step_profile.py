"""One profiled step by kind of kernel, idle time among them, beside the roofline."""

from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.device import Clock, wait
from longfire.gpu_check.kernel_kinds import (
    busy_seconds,
    kernels_of,
    operator_seconds,
    seconds_by_kind,
)
from longfire.gpu_check.model_runs import config_of, device_of_work, fitting_run
from longfire.gpu_check.roofline import counted_step
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.json_types import JsonObject
from longfire.training.setup import make_state
from longfire.training.step import train_step
from longfire.training.throughput import random_batch

WARMUP_STEPS = 3
GIB = 2**30


def measure(work: Work, model: str) -> Outcome:
    """Profile a step. The roofline is that of the data sheet's peaks, and of assumed shares of
    them."""
    run, planned = fitting_run(model, work)
    if run is None:
        row = f"a step of one sequence needs {planned / GIB:.0f} GiB by the planner: too many here"
        return Outcome(row, {"planned_bytes": planned}, (), ("all of it",))
    config = config_of(run)
    work.note("making the model")
    state = make_state(run, config, work.device)
    generator = torch.Generator().manual_seed(0)
    for count in range(WARMUP_STEPS):
        work.note(f"step {count + 1}")
        one_step(run, state, generator)
    work.note("the profiled step")
    activities = [ProfilerActivity.CPU]
    if work.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        begun = wait(work.device)
        one_step(run, state, generator)
        seconds = wait(work.device) - begun
    numbers: JsonObject = {"seconds": seconds}
    if work.is_cuda:
        kernels = kernels_of(profiled)
        busy = busy_seconds(kernels)
        by_kind = seconds_by_kind(kernels)
        by_kind["idle"] = max(0.0, seconds - busy)
        numbers |= {"launches": len(kernels), "busy_seconds": busy}
        longest = sorted(kernels, key=lambda kernel: kernel.start - kernel.end)[:10]
        numbers["longest"] = [
            {"name": kernel.name[:160], "microseconds": kernel.end - kernel.start}
            for kernel in longest
        ]
    else:
        by_kind = operator_seconds(profiled)
    numbers["seconds_by_kind"] = by_kind
    missing: tuple[str, ...] = ()
    if not sum(by_kind.values()) > 0:
        missing = ("kinds of kernels: the profiler saw none",)
    work.note("the roofline")
    step = counted_step(config, run.training.batch_size, run.training.seq_len)
    device = device_of_work(work)
    numbers["roofline"] = {
        "device": device.name,
        "at_best": step.seconds(step.compiled, device, at_best=True),
        "assumed": step.seconds(step.compiled, device),
        "assumed_mfu": step.mfu(step.compiled, device),
        "launches": step.compiled.launches,
    }
    at_best = step.seconds(step.compiled, device, at_best=True)
    return Outcome(row_of(seconds, by_kind, at_best), numbers, (), missing)


def one_step(run: Run, state: State, generator: torch.Generator) -> None:
    """One update on random tokens, with a learning rate of 0."""
    batch = random_batch(run, state.model.config.vocab_size, generator)
    clock = Clock(torch.device("cpu"))  # waits for nothing
    train_step(state, batch.split(run.microbatches), 0.0, run.training, clock)


def row_of(seconds: float, by_kind: dict[str, float], at_best: dict[str, float]) -> str:
    """Milliseconds of each kind, and in brackets those of the roofline, where there are any."""
    words: list[str] = []
    for kind, taken in by_kind.items():
        least = at_best.get(kind, 0.0)
        if kind == "elementwise":
            least += at_best["optimizer"]
        shown = f" [{1000 * least:.0f}]" if least else ""
        words.append(f"{kind} {1000 * taken:.0f}{shown}")
    return f"{1000 * seconds:.0f} ms: {', '.join(words)} [at the device's peaks]"


STAGES = tuple(
    Stage(f"profile {name}", 45, 8, partial(measure, model=name))
    for name in ("transformer-1b", "gla-1b")
)
