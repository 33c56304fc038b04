"""Three steps of each recipe at full size under the stand-in, as process 0 of the devices that its
plan is of, and what they hold beside the planner's number.

    python tests/null_gpu/start.py FOLDER tests/null_gpu/recipe_memory.py docs/gpu.md

Collectives do nothing and take no memory (torch's process group `fake`). Each recipe is a process
of its own; the table replaces the one between the marks of the page.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import no_kernels
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from longfire import initialise
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.data.step_batch import StepBatch
from longfire.device import Clock
from longfire.images.batch import ImageBatch
from longfire.launch import StopRequest, World
from longfire.parallel.cost import device_of
from longfire.parallel.mesh import ALONE, Mesh
from longfire.planner.planner import Planner
from longfire.tasks.table import task_named
from longfire.training.setup import make_state
from longfire.training.step import train_step
from longfire.training.throughput import random_batch

RECIPES = Path(__file__).parents[2] / "recipes"
PLANNED = re.compile(r"#\s+longfire plan \S+ --gpus (\d+) --device (\S+)")
STEPS = 3
GIB = 2**30
MARKS = "<!-- recipes under the stand-in -->", "<!-- end -->"


def main(page: Path) -> None:
    """Measure every recipe that names its devices, and write the table."""
    rows = ["| recipe | devices | planned, GiB | held, GiB |", "|---|---|---|---|"]
    for recipe in sorted(RECIPES.glob("*.toml")):
        planned = PLANNED.search(recipe.read_text(encoding="utf-8"))
        if planned:
            rows.append(row_of(recipe, *planned.groups()))
            print(rows[-1], flush=True)
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    table = "\n".join(["", "", *rows, "", ""])
    page.write_text(f"{before}{MARKS[0]}{table}{MARKS[1]}{after}", encoding="utf-8")


def row_of(recipe: Path, processes: str, device: str) -> str:
    """A line of the table; the last words of the error where a step did not run."""
    command = [sys.executable, __file__, str(recipe), processes, device]
    done = subprocess.run(command, capture_output=True, text=True)
    devices = f"{processes} x {device}"
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1][:100].replace("|", "/")
        return f"| {recipe.stem} | {devices} | | did not run: {error} |"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return f"| {recipe.stem} | {devices} | {found['planned']:.1f} | {found['held']:.1f} |"


def measure(recipe: Path, processes: int, device_name: str) -> dict[str, float]:
    """Bytes that the allocator held at most, and those that the planner foretells, in GiB."""
    world = World(processes)
    run = Run.compose(recipe, {}, world=world, planned=True)
    planner = Planner(run, device_of(device_name, ""))
    planned = planner.peak(planner.of_recipe()).total
    device = torch.device("cuda", 0)
    mesh = joined(run, processes)
    config = planner.model_config
    task = task_named(run.job.task)(run, mesh, StopRequest())
    generator = torch.Generator().manual_seed(0)
    with no_kernels.without_numbers(), patch.object(initialise, "initialise"):
        state = make_state(run, config, device, mesh=mesh)
        for _ in range(STEPS):
            parts = batch_of(run, config, generator).split(run.microbatches)
            numbers = train_step(state, parts, 1e-4, run.training, Clock(device), task.loss_sum)
            assert numbers["skipped"] == 0
    return {"planned": planned / GIB, "held": torch.cuda.max_memory_allocated() / GIB}


def batch_of(run: Run, config: ModelConfig, generator: torch.Generator) -> StepBatch:
    """Random tokens, or black images of two classes each, as many as a process has in a step."""
    if not config.image_size:
        return random_batch(run, config.vocab_size, generator)
    images = run.training.batch_size * run.accumulation
    pixels_BCHW = torch.zeros(images, config.image_channels, config.image_size, config.image_size)
    labels_B = torch.zeros(images, dtype=torch.int64)
    return ImageBatch(pixels_BCHW, labels_B, config.image_tokens, labels_B, torch.ones(images))


def joined(run: Run, processes: int) -> Mesh:
    """The mesh of the recipe's plan, whose other processes are not there."""
    if processes == 1 and not run.parallelism.cpu_offload:
        return ALONE
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    return Mesh.of_degrees(run.degrees, "cuda")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
