"""What a checkpoint costs the training: how long the loop stands still for one, and how long it is
written in the background; and whether it is read back as it was."""

import shutil
import time

import torch

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.device import wait
from longfire.gpu_check.model_runs import config_of, run_of
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.gpu_check.step_profile import one_step
from longfire.json_types import JsonObject
from longfire.training.setup import make_state

MODEL = "transformer-340m"
SAVES = 2  # the first takes the host's memory, later ones have it
STATE_BYTES = 12  # of a parameter and of AdamW's two moments
SPARE = 3  # checkpoints that must have room on the disk: two, and one that is being written
GIB = 2**30


def measure(work: Work) -> Outcome:
    """Save twice while training goes on, then read the last one back."""
    run = run_of(MODEL, work)
    config = config_of(run)
    state = make_state(run, config, work.device)
    size = STATE_BYTES * sum(parameter.numel() for parameter in state.model.parameters())
    free = shutil.disk_usage(work.folder).free
    if free < SPARE * size:
        row = f"{free / GIB:.0f} GiB are free in {work.folder.parent}, {SPARE} checkpoints need "
        row += f"{SPARE * size / GIB:.0f} GiB; another folder: TMPDIR"
        return Outcome(row, {"free_bytes": free, "checkpoint_bytes": size}, (), ("all of it",))
    generator = torch.Generator().manual_seed(0)
    checkpoints = Checkpoints(work.folder / "checkpoints", settings.Checkpoint(async_mode="async"))
    stalls: list[float] = []
    written: list[float] = []
    steps: list[float] = []
    for count in range(SAVES):
        work.note(f"save {count + 1}")
        one_step(run, state, generator)
        begun = wait(work.device)
        checkpoints.save(state)
        stalls.append(wait(work.device) - begun)
        begun_step = time.perf_counter()
        one_step(run, state, generator)
        steps.append(wait(work.device) - begun_step)
        checkpoints.wait()
        written.append(time.perf_counter() - begun)
    one_step(run, state, generator)
    begun_step = wait(work.device)
    one_step(run, state, generator)
    alone = wait(work.device) - begun_step
    work.note("reading back")
    begun_step = time.perf_counter()
    problems = read_back(state, checkpoints)
    numbers: JsonObject = {
        "checkpoint_bytes": size,
        "stall_seconds": stalls,
        "written_seconds": written,
        "step_while_writing_seconds": steps,
        "step_seconds": alone,
        "read_seconds": time.perf_counter() - begun_step,
    }
    row = (
        f"{size / GIB:.2f} GiB: the loop stands still for {stalls[-1]:.2f} s (the first time "
        f"{stalls[0]:.2f}), written after {written[-1]:.1f} s; a step meanwhile "
        f"{1000 * steps[-1]:.0f} ms, else {1000 * alone:.0f}"
    )
    return Outcome(row, numbers, tuple(problems))


def read_back(state: State, checkpoints: Checkpoints) -> list[str]:
    """Restore the last checkpoint over the state; what of it is wrong. (With a learning rate of 0
    no later step has changed a parameter.)"""
    saved = checkpoints.saved_step
    before: dict[str, torch.Tensor] = {}
    for name, parameter in state.model.named_parameters():
        before[name] = parameter.detach().clone()
    if not checkpoints.restore(state):
        return ["the checkpoint cannot be read back"]
    if state.step != saved:
        return [f"read back is step {state.step}, not {saved}"]
    for name, parameter in state.model.named_parameters():
        if not torch.equal(parameter, before[name]):
            return [f"{name} is another one after it was read back"]
    return []


STAGE = Stage("checkpoint", 60, 6, measure)
