"""One sequence of 32,768 tokens, its blocks recomputed: softmax attention and a recurrence."""

from functools import partial

from longfire.gpu_check.model_runs import device_of_work, planned_bytes, run_of
from longfire.gpu_check.speed import memory_problems, number, ours_measured
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.json_types import JsonObject

TOKENS = {True: 512, False: 32768}  # True: small
GIB = 2**30


def measure(work: Work, model: str) -> Outcome:
    """A step of one sequence; left out where the planner does not let it fit."""
    run = run_of(model, work, seq_len=TOKENS[work.is_small], batch_size=1, remat="block")
    device = device_of_work(work)
    planned = planned_bytes(run, device)
    if work.is_cuda and planned > device.usable_bytes:
        row = f"needs {planned / GIB:.0f} GiB by the planner: too many here"
        return Outcome(row, {"planned_bytes": planned}, (), ("all of it",))
    work.note("steps of one long sequence")
    numbers: JsonObject = {**ours_measured(run, work)}
    row = (
        f"{run.training.seq_len:,} tokens: {number(numbers, 'tokens_per_second'):,.0f} tokens/s, "
        f"MFU {number(numbers, 'mfu'):.1%}"
    )
    if not work.is_cuda:
        return Outcome(row, numbers)
    numbers["planned_bytes"] = planned
    row += f", {number(numbers, 'memory_bytes') / GIB:.1f} GiB held, {planned / GIB:.1f} planned"
    problems = [] if work.is_small else memory_problems(numbers)
    return Outcome(row, numbers, tuple(problems))


STAGES = tuple(
    Stage(f"long row {name}", 60, 6, partial(measure, model=name))
    for name in ("transformer-1b", "gla-1b")
)
