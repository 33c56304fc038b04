"""Checkpoints: against the disk's plain speed, the time that training stands still, and on to another number of processes.

A state of parameters and Adam's moments of about 1 GB. Goals: save and load at 80 % of a plain write and read of as many
bytes in as many files, synced; an asynchronous save holds training up for at most 5 % of a synchronous one; a state that four
processes wrote is loaded by two in under 10 s.

The plain write is of bytes that lie ready in memory, with fsync; the plain read is of files that the cache may hold, as ours are.
What ours do besides: checksums of all bytes on both ways, a manifest, the rename.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import arguments, print_table, seconds, write_result

from longfire.checkpoint.restoring import load
from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.initialise import materialise
from longfire.model import on_meta
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.parallel.mesh import ALONE, Mesh
from longfire.training.step import train_step

CPU = torch.device("cpu")
FULL, QUICK = (
    {"hidden": 1024, "layers": 4, "words": 32000},
    {"hidden": 64, "layers": 2, "words": 500},
)
SPEED, STALL, SECONDS = 0.8, 0.05, 10.0


def state_of(size: dict[str, int], mesh: Mesh = ALONE) -> State:
    """With moments, as after a step."""
    shape = ModelConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        layer_types=("attention",),
        vocab_size=size["words"],
        mixers={"attention": {"num_heads": 8}},
        tie_word_embeddings=True,
    )
    model = parallelize(on_meta(shape), settings.ActivationCheckpoint(), False, mesh)
    materialise(model, 0, CPU)
    state = State(model, make_optimizer(model, settings.Optimizer(), CPU), mesh=mesh)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state


def plain(folder: Path, blocks: list[memoryview]) -> tuple[float, float]:
    """Seconds of writing and of reading files with these bytes."""
    start = time.perf_counter()
    for number, block in enumerate(blocks):
        with (folder / f"plain-{number}").open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
    middle = time.perf_counter()
    for number, block in enumerate(blocks):
        with (folder / f"plain-{number}").open("rb") as file:
            file.readinto(bytearray(len(block)))
    end = time.perf_counter()
    for number in range(len(blocks)):
        (folder / f"plain-{number}").unlink()
    return middle - start, end - middle


def one_process(
    size: dict[str, int], folder: Path, repeats: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    state = state_of(size)
    count = sum(tensor.nbytes for tensor, *_ in state.held().values())
    parameters = sum(p.nbytes for p in state.model.parameters())
    blocks = [
        memoryview(torch.ones(n, dtype=torch.uint8).numpy())
        for n in (parameters, count - parameters)
    ]
    times: dict[str, list[float]] = {
        name: [] for name in ("save", "load", "plain write", "plain read")
    }
    checkpoints = saving(folder, "disabled")
    for number in range(1 + repeats):
        state.step = number + 1
        start = time.perf_counter()
        checkpoints.save(state)
        saved = time.perf_counter() - start
        start = time.perf_counter()
        load(state, folder / "disabled" / f"step-{number + 1}")
        loaded = time.perf_counter() - start
        written, read = plain(folder, blocks)
        if number:
            for name, taken in {
                "save": saved,
                "load": loaded,
                "plain write": written,
                "plain read": read,
            }.items():
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [
        {
            "what": f"{ours} / {theirs}",
            "GB/s": count / medians[ours] / 1e9,
            "plain GB/s": count / medians[theirs] / 1e9,
            "ratio": medians[theirs] / medians[ours],
            "goal": f">= {SPEED}",
            "reached": medians[theirs] / medians[ours] >= SPEED,
        }
        for ours, theirs in (("save", "plain write"), ("load", "plain read"))
    ]
    return rows, stalls(state, folder, size, repeats), count


def saving(folder: Path, mode: str) -> Checkpoints:
    return Checkpoints(folder / mode, settings.Checkpoint(async_mode=mode, keep_latest_k=1))


def stalls(state: State, folder: Path, size: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """How long training stands still for a save begun before a step (`save` itself, and the wait before the update), and how much
    later the step ends: that is also what sharing the cores with the writer costs."""
    ids = torch.randint(size["words"], (2, 257))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(256).expand(2, -1))
    modes: dict[str, Checkpoints | None] = {
        "no save": None,
        "save": saving(folder, "disabled"),
        "asynchronous save": saving(folder, "async"),
    }
    steps: dict[str, list[float]] = {name: [] for name in modes}
    still: dict[str, list[float]] = {name: [] for name in modes}
    wait_for_snapshot = state.wait_for_snapshot
    for number in range(1 + repeats):
        for name, checkpoints in modes.items():
            stood: list[float] = []
            state.wait_for_snapshot = lambda stood=stood: stood.append(seconds(wait_for_snapshot))
            start = time.perf_counter()
            if checkpoints:
                stood.append(seconds(lambda checkpoints=checkpoints: checkpoints.save(state)))
            train_step(state, [batch], 1e-4, settings.Training(), Clock(CPU))
            if number:
                steps[name].append(time.perf_counter() - start)
                still[name].append(sum(stood))
            if checkpoints:
                checkpoints.wait()
    step, stood_still = (
        {name: statistics.median(taken) for name, taken in times.items()}
        for times in (steps, still)
    )
    share = {name: taken / stood_still["save"] for name, taken in stood_still.items()}
    return [
        {
            "step with": name,
            "seconds": step[name],
            "stands still": stood_still[name],
            "of a save": share[name],
            "ends later by": step[name] - step["no save"],
            "goal": f"<= {STALL}" if name == "asynchronous save" else "",
            "reached": share[name] <= STALL if name == "asynchronous save" else "",
        }
        for name in modes
    ]


def resharded(
    rank: int, count: int, port: int, size: dict[str, int], folder: Path, answers: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    mesh = Mesh.of_degrees({"dp_shard": count}, "cpu")
    state = state_of(size, mesh)
    checkpoints = Checkpoints(folder, settings.Checkpoint(async_mode="disabled"), mesh)
    dist.barrier()
    start = time.perf_counter()
    if not checkpoints.restore(state):
        state.step = 1
        checkpoints.save(state)
    dist.barrier()
    if rank == 0:
        answers.put(time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()


def reshard(size: dict[str, int], folder: Path, port: int) -> list[dict[str, Any]]:
    taken = []
    for number, count in enumerate((4, 2)):
        answers = mp.get_context("spawn").SimpleQueue()
        context = mp.spawn(
            resharded, (count, port + number, size, folder, answers), count, join=False
        )
        taken.append(answers.get())
        context.join()
    return [
        {"what": "4 processes save", "seconds": taken[0], "goal": "", "reached": ""},
        {
            "what": "2 processes load it",
            "seconds": taken[1],
            "goal": f"< {SECONDS:g}",
            "reached": taken[1] < SECONDS,
        },
    ]


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=5, port=29641, folder="")
    size, repeats = (QUICK, 1) if options.quick else (FULL, options.repeats)
    folder = Path(tempfile.mkdtemp(dir=options.folder or None))
    try:
        rows, held_up, count = one_process(size, folder, repeats)
        print_table(f"a state of {count / 1e9:.2f} GB", rows)
        print_table("training stands still", held_up)
        moved = reshard(size, folder / "resharded", options.port)
        print_table("another number of processes", moved)
    finally:
        shutil.rmtree(folder)
    write_result(
        "checkpoints",
        {"bytes": count, "rows": rows, "stalls": held_up, "resharding": moved},
        options.quick,
    )


if __name__ == "__main__":
    main()
