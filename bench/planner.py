"""`longfire plan` against truth: bytes that tensors of the second step hold at most, predicted and measured, on a CPU in fp32.

Goal (issues 4 and 5): within 10 %. Measured is the sum of all storages that live, after each operation of a real step (what an
operator of torch holds only while it works is in neither number). One process, then two that share parameters, and two that share
rows.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import arguments, print_table, write_result
from torch.distributed.tensor import DTensor

from longfire.config.run import Run
from longfire.device import Clock
from longfire.launch import World
from longfire.parallel.context_strategies import STRATEGIES
from longfire.parallel.cost import device_of
from longfire.parallel.mesh import ALONE, Mesh, joined
from longfire.parallel.sharding import local
from longfire.planner.live_bytes import LiveBytes
from longfire.planner.planner import Planner
from longfire.training.setup import make_state
from longfire.training.step import train_step
from longfire.training.throughput import random_batch

GOAL, ONE_PROCESS = 0.1, World()
SIZE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
    "attention": {"num_heads": 4},
    "gla": {"num_heads": 4},
}
MIXERS = {"attention": ["attention"], "gla": ["gla"], "hybrid": ["gla", "gla", "gla", "attention"]}
ONE = [(name, remat, 1, "") for name in MIXERS for remat in ("none", "block")] + [
    ("hybrid", "none", 2, "")
]
SHARED = [
    ("hybrid", "none", 1, ""),
    ("attention", "block", 1, ""),
    ("attention", "none", 2, ""),
    ("attention", "none", 1, "replicate"),
    ("attention", "block", 2, "replicate"),
    ("attention", "none", 1, "ring"),
    ("attention", "block", 1, "ring"),
    ("attention", "none", 1, "allgather"),
    ("attention", "none", 1, "alltoall"),
    ("gla", "none", 1, "ring"),
    ("hybrid", "block", 1, "ring"),
]


class LiveBytesOfShards(LiveBytes):
    """Counts shards, not what they are shards of; and what FSDP2 frees by giving a storage another size, which is no operation."""

    def __enter__(self) -> "LiveBytesOfShards":
        self.resize = resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            if storage._cdata in self.sizes:
                self.now += size - self.sizes[storage._cdata]
                self.sizes[storage._cdata] = size
            return done

        torch.UntypedStorage.resize_ = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as operations on its shard
        return super().__torch_dispatch__(operation, types, args, kwargs)


def run_of(case: tuple[str, str, int, str], folder: Path, quick: bool, world: World) -> Run:
    name, remat, microbatches, plan = case
    size = {**SIZE, **({"hidden_size": 64, "vocab_size": 1024} if quick else {})}
    shape = folder / f"{name}.json"
    config = {key: value for key, value in size.items() if key not in {"gla", "attention"}}
    for mixer in dict.fromkeys(MIXERS[name]):
        config[mixer] = size[mixer]
    shape.write_text(json.dumps({**config, "layer_types": MIXERS[name]}))
    settings = {
        "model.config": shape,
        "model.compute_dtype": "float32",
        "training.seq_len": 128 if quick else 256,
        "training.batch_size": 4,
        "training.loss_chunk_tokens": 64 if quick else 256,
        "training.compile": "off",
        "training.gradient_accumulation_steps": microbatches,
        "activation_checkpoint.mode": remat,
        "training.device": "cpu",
        "parallelism.data_parallel_replicate_degree": world.size if plan == "replicate" else 1,
        "parallelism.context_parallel_degree": world.size if plan in STRATEGIES else 1,
        "parallelism.context_parallel_strategy": plan if plan in STRATEGIES else "auto",
    }
    return Run.compose(None, {key: str(value) for key, value in settings.items()}, world=world)


def predicted(run: Run) -> dict[str, Any]:
    planner = Planner(run, device_of("h100-80gb"), as_cuda=False)
    peak = planner.peak(planner.of_recipe())
    return {"where": peak.where, "bytes": peak.total}


def measured(run: Run, mesh: Mesh) -> int:
    """Of this process, in its second step."""
    device, clock = torch.device("cpu"), Clock(torch.device("cpu"))
    config = run.known_model_config.with_vocabulary(run.vocab_size)
    state = make_state(run, config, device, mesh=mesh)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        mine = random_batch(run, run.vocab_size, generator).split(run.microbatches)
        moments = [value for of_one in state.optimizer.state.values() for value in of_one.values()]
        held = [local(tensor) for tensor in (*state.model.parameters(), *moments)]
        live = LiveBytesOfShards(held, [(b.ids_BT, b.labels_BT, b.positions_BT) for b in mine])
        del held, moments
        with live:
            train_step(state, mine, 0.0, run.training, clock)
    return live.peak


def measured_here(runs: list[Run]) -> list[int]:
    """Of each of the runs, whose processes join once."""
    world, cpu = runs[0].world, torch.device("cpu")
    with joined(world, runs[0].degrees, runs[0].comm, cpu):
        return [
            measured(run, Mesh.of_degrees(run.degrees, "cpu") if world.size > 1 else ALONE)
            for run in runs
        ]


def measured_by_two(quick: bool) -> list[int]:
    """The peaks of SHARED, those of the first of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--side", "shared", *(["--quick"] if quick else [])]
    around = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    both = [
        subprocess.Popen(
            command,
            env={**around, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, _ = both[0].communicate(timeout=300)
    finally:
        for process in both:
            process.kill() if both[0].poll() is None else None
    assert both[1].wait(60) == 0 and both[0].returncode == 0, "one of the two processes failed"
    return json.loads(said.splitlines()[-1])


def compared(
    cases: list[tuple], peaks: list[int], made: Callable[[tuple], Run]
) -> list[dict[str, Any]]:
    rows = []
    for case, peak in zip(cases, peaks):
        message, (name, remat, microbatches, plan) = predicted(made(case)), case
        processes = made(case).world.size
        ratio = message["bytes"] / peak
        rows.append(
            {
                "model": name,
                "remat": remat,
                "microbatches": microbatches,
                "processes": f"{processes} {plan or 'shard'}" if processes > 1 else "1",
                "predicted MB": message["bytes"] / 1e6,
                "measured MB": peak / 1e6,
                "ratio": ratio,
                "within 10 %": "yes" if abs(ratio - 1) <= GOAL else "**no**",
                "at": message["where"],
            }
        )
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0], side="")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:

        def made(case: tuple, world: World = ONE_PROCESS) -> Run:
            return run_of(case, Path(folder), options.quick, world)

        if options.side:
            world = World(2, int(os.environ["RANK"]), int(os.environ["RANK"]))
            print(json.dumps(measured_here([made(case, world) for case in SHARED])))
            return
        rows = compared(ONE, measured_here([made(case) for case in ONE]), made)
        rows += compared(SHARED, measured_by_two(options.quick), lambda case: made(case, World(2)))
    print_table("bytes of the fullest moment of a step", rows)
    write_result("planner", {"rows": rows}, options.quick)


if __name__ == "__main__":
    main()
