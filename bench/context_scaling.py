"""What sharing a row costs: weak scaling from one process to two, and what a zigzag saves.

A block of hidden size 256, fp32, one thread a process; one process has a row of 16k tokens, two share one of 32k. Softmax attention
has more to do for each token of a longer row, so what is compared is the work that the mathematics asks for (Model.flops_per_token) in
a second of a process. Goal: two reach at least 0.85 of one. Two processes share the memory that one has to itself: the
column "two that share nothing" (a row each) is what no software can beat.

The second table: pairs of queries and keys that the busiest of 4 processes computes, contiguous over zigzag, counted while they run
(goal: 1.6), and the seconds of a forward and backward of attention alone at 2 processes.
"""

import os
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import arguments, print_table, write_result

from longfire.config.model_config import ModelConfig
from longfire.config.settings import Parallelism
from longfire.data.batch import Batch
from longfire.initialise import build
from longfire.loss import loss_sum
from longfire.model import Model
from longfire.parallel.context import make_context
from longfire.parallel.context_strategies.key_blocks import work
from longfire.parallel.mesh import Mesh

FULL = {"hidden": 256, "layers": 1, "intermediate": 768, "words": 1024, "tokens": 16384}
QUICK = {"hidden": 32, "layers": 1, "intermediate": 48, "words": 64, "tokens": 128}
EFFICIENCY, SAVED = 0.85, 1.6
MIXERS = {
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "gla": {"num_heads": 4},
    "gated_delta_net": {"num_heads": 2, "head_dim": 64, "expand_v": 1.0},
    "mamba2": {"head_dim": 64, "state_size": 64},
    "rwkv7": {"head_dim": 32},
}
CASES = [("attention", strategy) for strategy in ("ring", "allgather", "alltoall")] + [
    (m, "") for m in MIXERS if m != "attention"
]


def model_of(size: dict[str, int], mixer: str) -> Model:
    settings = MIXERS[mixer]
    if size is QUICK or size == QUICK:
        settings = {**settings, **{key: 8 for key in ("head_dim", "state_size") if key in settings}}
    shape = ModelConfig(
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        layer_types=(mixer,),
        vocab_size=size["words"],
        mixers={mixer: settings},
        intermediate_size=size["intermediate"],
    )
    return build(shape, 0)


def row_of(size: dict[str, int], tokens: int) -> Batch:
    ids = torch.randint(size["words"], (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(tokens)[None])


def forward_and_backward(model: Model, batch: Batch) -> None:
    (loss_sum(model, batch, 1024) / batch.ids_BT.numel()).backward()
    model.zero_grad()


def idle() -> None:
    """The other process works."""


def process(rank: int, count: int, port: int, job: Any, arguments: tuple, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    answer = job(rank, Mesh.of_degrees({"cp": count}, "cpu"), *arguments)
    if rank == 0:
        answers.put(answer)
    dist.barrier()
    dist.destroy_process_group()


def in_processes(count: int, port: int, job: Any, *arguments: Any) -> Any:
    """What process 0 says."""
    answers = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(process, (count, port, job, arguments, answers), count, join=False)
    answer = answers.get()
    context.join()
    return answer


def scaling(rank: int, mesh: Mesh, size: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """Each case: one process alone, two with a row each, two that share one of twice the length, in turn."""
    rows = []
    for mixer, strategy in CASES:
        alone, shared = model_of(size, mixer), model_of(size, mixer)
        context = make_context(
            shared, mesh, Parallelism(context_parallel_strategy=strategy or "auto")
        )
        short, long = (
            row_of(size, size["tokens"]),
            row_of(size, 2 * size["tokens"]).context_part(context),
        )
        ways = {
            "one": idle if rank else partial(forward_and_backward, alone, short),
            "each its own": partial(forward_and_backward, alone, short),
            "shared": partial(forward_and_backward, shared, long),
        }
        times = {way: [] for way in ways}
        for rotate in range(1 + repeats):
            for way, run in ways.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                dist.barrier()
                times[way] += [time.perf_counter() - start] if rotate else []
        one, own, both = (statistics.median(taken) for taken in times.values())
        more = alone.flops_per_token(2 * size["tokens"]) / alone.flops_per_token(size["tokens"])
        rows.append(
            {
                "mixer": mixer,
                "strategy": strategy,
                "one process s": one,
                "two that share nothing s": own,
                "two that share s": both,
                "work for a token": more,
                "efficiency": one * more / both,
                "of two that share nothing": own * more / both,
                "goal": f">= {EFFICIENCY}",
                "reached": one * more / both >= EFFICIENCY,
            }
        )
    return rows


def layouts(
    rank: int, mesh: Mesh, size: dict[str, int], repeats: int
) -> dict[str, tuple[int, float]]:
    """Of each layout: the pairs of the busiest process, and the seconds of a step."""
    found = {}
    for layout in ("contiguous", "zigzag"):
        model = model_of(size, "attention")
        context = make_context(
            model,
            mesh,
            Parallelism(context_parallel_layout=layout, context_parallel_strategy="ring"),
        )
        batch, times = row_of(size, size["tokens"]).context_part(context), []
        for _ in range(1 + repeats):
            work.forget()
            dist.barrier()
            start = time.perf_counter()
            forward_and_backward(model, batch)
            dist.barrier()
            times.append(time.perf_counter() - start)
        found[layout] = max(mesh.all_gather_object(work.pairs)), statistics.median(times[1:])
    return found


def balance(size: dict[str, int], repeats: int, port: int) -> list[dict[str, Any]]:
    rows = []
    for count in (2, 4):
        found = in_processes(count, port + count, layouts, size, repeats if count == 2 else 1)
        (pairs, seconds), (fewer, faster) = found["contiguous"], found["zigzag"]
        rows.append(
            {
                "processes": count,
                "busiest, contiguous": pairs,
                "busiest, zigzag": fewer,
                "work ratio": pairs / fewer,
                "seconds ratio": seconds / faster if count == 2 else "more processes than cores",
                "goal": f">= {SAVED} (work)" if count == 4 else "",
                "reached": pairs / fewer >= SAVED if count == 4 else "",
            }
        )
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0], repeats=2, port=29651)
    size, repeats = (QUICK, 1) if options.quick else (FULL, options.repeats)
    rows = in_processes(2, options.port, scaling, size, repeats)
    print_table("weak scaling", rows)
    balanced = balance(size, repeats, options.port)
    print_table("layouts", balanced)
    write_result(
        "context_scaling", {"size": size, "rows": rows, "layouts": balanced}, options.quick
    )


if __name__ == "__main__":
    main()
