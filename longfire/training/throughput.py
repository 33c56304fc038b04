"""`longfire bench`: how fast this machine trains a recipe, on random tokens, with the very step
that training takes."""

import logging
import statistics

import torch

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.data.batch import Batch
from longfire.device import (
    Clock,
    check_float8,
    choose_device,
    fastest_matmul_peak,
    peak_memory_bytes,
)
from longfire.messages import log_in_first_process
from longfire.ops.documents import Documents
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import joined
from longfire.training.setup import make_state
from longfire.training.step import train_step

logger = logging.getLogger(__name__)

WARMUP_STEPS = 2  # the first compiles and allocates, the second fills the optimizer's state
DOCUMENT_TOKENS = 512  # mean length of the random documents of data.varlen


def bench(run: Run, steps: int = 10) -> dict[str, float]:
    """Measure `steps` steps and log what they cost; returns the numbers (seconds, tokens, bytes,
    FLOP/s).

    The learning rate is 0: the same work, and parameters that random tokens do not drive anywhere.
    Where many processes measure together, tokens are those of all, and bytes those of this one.
    """
    log_in_first_process(run.world.is_first)
    device = choose_device(run.training, run.world.local_rank)
    check_float8(run.float8, device)
    config = run.known_model_config.with_vocabulary(run.vocab_size)
    offloads = run.parallelism.cpu_offload
    with joined(run.world, run.degrees, run.comm, device, offloads) as mesh:
        state = make_state(run, config, device, mesh=mesh)
        taken = measured(run, state, steps, Clock(device))
        peak, source = fastest_matmul_peak(device)
    seconds = statistics.median(parts["seconds"] for parts in taken)
    flops_per_token = 3 * state.model.flops_per_token(run.training.seq_len)
    result = {
        "tokens_per_second": run.tokens_per_step / seconds,
        "seconds": seconds,
        **median_parts(taken),
        "memory_bytes": peak_memory_bytes(device),
        "flops_per_token": flops_per_token,
        "matmul_peak": peak,
        "mfu": run.tokens_per_step * flops_per_token / seconds / peak / run.world.size,
    }
    log_result(result, [run.tokens_per_step / parts["seconds"] for parts in taken], source)
    return result


def median_parts(steps: list[dict[str, float]]) -> dict[str, float]:
    """The median seconds of each part of a step."""
    medians: dict[str, float] = {}
    for part in steps[0]:
        if part != "seconds":
            medians[f"{part}_seconds"] = statistics.median([seconds[part] for seconds in steps])
    return medians


def measured(run: Run, state: State, steps: int, clock: Clock) -> list[dict[str, float]]:
    """Where the seconds of each step went, after the warm-up."""
    generator = torch.Generator().manual_seed(run.training.seed + state.mesh.rank(*DATA))
    taken = []
    for step in range(WARMUP_STEPS + steps):
        with clock("data"):
            batch = random_batch(run, state.model.config.vocab_size, generator)
        train_step(state, batch.split(run.microbatches), 0.0, run.training, clock)
        parts = clock.read()
        if step >= WARMUP_STEPS:
            taken.append(parts)
    return taken


def random_batch(run: Run, vocab_size: int, generator: torch.Generator) -> Batch:
    """A process's rows of a step, every token and label drawn alike; with data.varlen documents of
    some DOCUMENT_TOKENS tokens."""
    size = (run.training.batch_size * run.accumulation, run.training.seq_len)
    ids_BT, labels_BT = (torch.randint(vocab_size, size, generator=generator) for _ in range(2))
    positions_BT = torch.arange(run.training.seq_len).expand(size)
    if not run.data.varlen:
        return Batch(ids_BT, labels_BT, positions_BT)
    starts_BT = torch.rand(size, generator=generator) < 1 / DOCUMENT_TOKENS
    first_BT = torch.where(starts_BT, positions_BT, 0).cummax(1).values
    return Batch(
        ids_BT, labels_BT, positions_BT - first_BT, Documents.from_ids(starts_BT.long().cumsum(1))
    )


def log_result(result: dict[str, float], rates: list[float], source: str) -> None:
    """The result as four lines; the spread says how much to believe it."""
    share = {}
    for key, value in result.items():
        if key.endswith("_seconds"):
            share[key.removesuffix("_seconds")] = value / result["seconds"]
    logger.info(
        f"speed: {result['tokens_per_second']:,.0f} tokens/s, the median of {len(rates)} steps "
        f"(from {min(rates):,.0f} to {max(rates):,.0f})"
    )
    logger.info(
        f"a step: {result['seconds']:.3f} s = "
        + ", ".join(f"{part} {part_share:.0%}" for part, part_share in share.items())
    )
    logger.info(f"memory: {result['memory_bytes'] / 2**20:,.0f} MiB at most")
    logger.info(
        f"mfu: {result['mfu']:.1%} of {result['matmul_peak'] / 1e9:,.0f} GFLOP/s ({source}), at "
        f"{result['flops_per_token'] / 1e6:,.0f} MFLOP a token"
    )
