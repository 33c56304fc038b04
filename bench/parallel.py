"""What many processes cost: weak scaling from one process to two, and the parallel path with nothing to share.

A Llama-shaped model of 30M parameters, fp32, one thread a process; each process has eight rows, so two do twice the work of one.
Goals: efficiency (one process's seconds / two's) at least 0.9 for FSDP and for replicas; a step through the path of many
processes, in a world of one, at most 1.03 of the plain loop.

Both sides take turns, so that a slow minute of the machine falls on both. Two processes share the memory that one has to itself,
and memory is what small matrix products wait for: the third line shows two processes that share nothing, which no software can beat.
"""

import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import arguments, print_table, write_result

from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.initialise import materialise
from longfire.loss import loss_sum
from longfire.model import Model, on_meta
from longfire.optim import clip_gradients, make_optimizer
from longfire.parallel.apply import parallelize
from longfire.parallel.mesh import ALONE, Mesh
from longfire.training.step import train_step

CPU = torch.device("cpu")
FULL = {
    "hidden": 384,
    "layers": 6,
    "heads": 6,
    "intermediate": 1024,
    "words": 50257,
    "rows": 8,
    "tokens": 512,
}
QUICK = {
    "hidden": 64,
    "layers": 2,
    "heads": 2,
    "intermediate": 128,
    "words": 1000,
    "rows": 2,
    "tokens": 64,
}
EFFICIENCY, OVERHEAD = 0.9, 1.03
PLANS = {"FSDP": {"dp_shard": 2}, "replicas": {"dp_replicate": 2}, "two that share nothing": {}}


def state_of(size: dict[str, int], mesh: Mesh) -> State:
    shape = ModelConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        layer_types=("attention",),
        vocab_size=size["words"],
        mixers={"attention": {"num_heads": size["heads"]}},
        intermediate_size=size["intermediate"],
        tie_word_embeddings=True,
    )
    model = parallelize(on_meta(shape), settings.ActivationCheckpoint(), False, mesh)
    materialise(model, 0, CPU)
    return State(model, make_optimizer(model, settings.Optimizer(), CPU), mesh=mesh)


def batch_of(size: dict[str, int], seed: int) -> Batch:
    ids = torch.randint(
        size["words"],
        (size["rows"], size["tokens"] + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(size["tokens"]).expand(size["rows"], -1))


def process(rank: int, port: int, size: dict[str, int], repeats: int, answers: Any) -> None:
    """Times of a step of each plan, in turn; and, by rank 0 while rank 1 waits, of one process alone."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    states = {
        name: state_of(size, Mesh.of_degrees(given, "cpu") if given else ALONE)
        for name, given in PLANS.items()
    }
    batch, times = batch_of(size, rank), {name: [] for name in ("one process", *PLANS)}
    for rotate in range(1 + repeats):
        for name in times:
            dist.barrier()
            start = time.perf_counter()
            if name != "one process" or rank == 0:
                state = states.get(name, states["two that share nothing"])
                train_step(state, [batch], 3e-4, settings.Training(), Clock(CPU))
            dist.barrier()
            if rotate:
                times[name].append(time.perf_counter() - start)
    if rank == 0:
        answers.put(times)
    dist.barrier()
    dist.destroy_process_group()


def scaling(size: dict[str, int], repeats: int, port: int) -> list[dict[str, Any]]:
    answers = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(process, (port, size, repeats, answers), 2, join=False)
    times = answers.get()
    context.join()
    alone = times.pop("one process")
    return [
        {
            "plan": name,
            "one process s": statistics.median(alone),
            "two processes s": statistics.median(taken),
            "efficiency": statistics.median(one / two for one, two in zip(alone, taken)),
            "goal": f">= {EFFICIENCY}" if PLANS[name] else "",
            "reached": (statistics.median(alone) / statistics.median(taken) >= EFFICIENCY)
            if PLANS[name]
            else "",
        }
        for name, taken in times.items()
    ]


def plain_step(model: Model, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """The step as one would write it for one process."""
    (loss_sum(model, batch, 1024) / batch.real_tokens()).backward()
    clip_gradients([p.grad for p in model.parameters()], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def overhead(size: dict[str, int], repeats: int, port: int) -> list[dict[str, Any]]:
    """A joined world of one process, with its mesh and all sums over it, beside the plain loop."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=0, world_size=1)
    state, plain = state_of(size, Mesh.of_degrees({}, "cpu")), state_of(size, ALONE)
    batch, ratios = batch_of(size, 0), []
    for rotate in range(1 + repeats):
        start = time.perf_counter()
        plain_step(plain.model, plain.optimizer, batch)
        middle = time.perf_counter()
        train_step(state, [batch], 3e-4, settings.Training(), Clock(CPU))
        if rotate:
            ratios.append((time.perf_counter() - middle) / (middle - start))
    dist.destroy_process_group()
    ratio = statistics.median(ratios)
    return [
        {
            "what": "step through the path of many / plain step",
            "ratio": ratio,
            "goal": f"<= {OVERHEAD}",
            "reached": ratio <= OVERHEAD,
        }
    ]


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=7, port=29631)
    size, repeats = (QUICK, 2) if options.quick else (FULL, options.repeats)
    rows = scaling(size, repeats, options.port)
    print_table("weak scaling", rows)
    ratios = overhead(size, repeats, options.port + 1)
    print_table("overhead", ratios)
    write_result("parallel", {"size": size, "rows": rows, "ratios": ratios}, options.quick)


if __name__ == "__main__":
    main()
