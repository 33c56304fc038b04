"""The speed of a model: tokens a second, MFU, the parts of a step, and memory beside the planner's
number, with and without documents, and in turns with its peer."""

import gc
import statistics
from functools import partial

import torch

from longfire.config.run import Run
from longfire.gpu_check.findings import noted
from longfire.gpu_check.model_runs import MODELS, config_of, fitting_run, run_of
from longfire.gpu_check.peers import PlainLoop, peer_of
from longfire.gpu_check.stage import Outcome, Stage, Work
from longfire.json_types import JsonObject
from longfire.parallel.cost import USABLE_MEMORY
from longfire.training.throughput import bench

GIB = 2**30
STEPS = {True: 2, False: 8}  # that are timed in a turn; True: small
TURNS = {True: 1, False: 2}
LAYERS_OF_7B = 8  # of the 32: a whole one and its optimizer do not fit into 80 GB
PARTS = ("forward", "backward", "optimizer", "other")


def measure(work: Work, model: str, layers: int = 0) -> Outcome:
    """Ours and the peer in turns, then ours with documents."""
    run, planned = fitting_run(model, work, layers)
    if run is None:
        row = f"a step of one sequence needs {planned / GIB:.0f} GiB by the planner: too many here"
        return Outcome(row, {"planned_bytes": planned}, (), ("all of it",))
    problems: list[str] = []
    missing: list[str] = []
    ours: list[dict[str, float]] = []
    peers: list[float] = []
    config = config_of(run)
    peer, why_not = peer_of(config, work.device)
    if why_not:
        missing.append(f"{peer}: {why_not}")
    for turn in range(TURNS[work.is_small]):
        work.note(f"ours, turn {turn + 1}")
        ours.append(ours_measured(run, work))
        if not why_not:
            work.note(f"the peer, turn {turn + 1}")
            with noted(problems, peer):
                peers.append(peer_measured(run, work))
        free()
    numbers = numbers_of(run, ours, planned, work)
    numbers["peer"] = peer
    if peers:
        rate = statistics.median(peers)
        numbers["peer_tokens_per_second"] = rate
        numbers["ratio"] = median(ours, "tokens_per_second") / rate
    work.note("ours, with documents")
    with noted(problems, "with documents"):
        documents = run_of(
            model,
            work,
            layers=layers,
            batch_size=run.training.batch_size,
            remat=run.activation_checkpoint.mode,
            documents=True,
        )
        found = ours_measured(documents, work)
        numbers["with_documents"] = found
    if not work.is_small:
        problems += memory_problems(numbers)
    return Outcome(row_of(numbers, run), numbers, tuple(problems), tuple(missing))


def ours_measured(run: Run, work: Work) -> dict[str, float]:
    """`longfire bench` of a run; memory is that of this run alone on CUDA."""
    free()
    if work.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    return bench(run, STEPS[work.is_small])


def peer_measured(run: Run, work: Work) -> float:
    """Tokens a second of the peer on sequences of the same size."""
    free()
    return run.tokens_per_step / PlainLoop(run, work).seconds_of_step(STEPS[work.is_small])


def free() -> None:
    """Give back what no model holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def median(turns: list[dict[str, float]], name: str) -> float:
    return statistics.median([one[name] for one in turns])


def numbers_of(run: Run, ours: list[dict[str, float]], planned: float, work: Work) -> JsonObject:
    """The medians over the turns. Memory is left out on a CPU, where it is that of the process."""
    numbers: JsonObject = {
        "sequences": run.training.batch_size,
        "seq_len": run.training.seq_len,
        "recomputed": run.activation_checkpoint.mode,
        "parameters_layers": run.known_model_config.num_hidden_layers,
    }
    for name in ours[0]:
        if name != "memory_bytes":
            numbers[name] = median(ours, name)
    if work.is_cuda:
        numbers["memory_bytes"] = max(one["memory_bytes"] for one in ours)
        numbers["planned_bytes"] = planned
    return numbers


def memory_problems(numbers: JsonObject) -> list[str]:
    """Where a plan that the planner lets fit would run out of memory: the allocator held more than
    its number and the share that it leaves free. Less is expected: the planner counts eager
    blocks, and compiled ones keep less."""
    held, planned = numbers.get("memory_bytes"), numbers.get("planned_bytes")
    if not isinstance(held, int | float) or not isinstance(planned, int | float):
        return []
    if held * USABLE_MEMORY <= planned:
        return []
    return [
        f"the allocator held {held / GIB:.1f} GiB, the planner's number is only "
        f"{planned / GIB:.1f} GiB"
    ]


def row_of(numbers: JsonObject, run: Run) -> str:
    """The line of the table."""
    parts: list[str] = []
    for part in PARTS:
        seconds = numbers.get(f"{part}_seconds")
        if isinstance(seconds, float):
            parts.append(f"{part} {1000 * seconds:.0f}")
    words = [
        f"{number(numbers, 'tokens_per_second'):,.0f} tokens/s",
        f"MFU {number(numbers, 'mfu'):.1%}",
        f"{run.training.batch_size} x {run.training.seq_len} tokens",
        f"ms: {', '.join(parts)}",
    ]
    documents = numbers.get("with_documents")
    if isinstance(documents, dict):
        words.append(f"with documents {number(documents, 'tokens_per_second'):,.0f}")
    if "ratio" in numbers:
        words.append(f"{number(numbers, 'ratio'):.2f}x {numbers['peer']}")
    if "memory_bytes" in numbers:
        held = number(numbers, "memory_bytes") / GIB
        planned = number(numbers, "planned_bytes") / GIB
        words.append(f"{held:.1f} GiB held, {planned:.1f} planned")
    return "; ".join(words)


def number(numbers: JsonObject, name: str) -> float:
    value = numbers[name]
    assert isinstance(value, int | float), name
    return float(value)


STAGES = (
    *(Stage(f"speed {name}", 65, 8, partial(measure, model=name)) for name in MODELS),
    Stage(
        "speed transformer-7b",
        60,
        6,
        partial(measure, model="transformer-7b", layers=LAYERS_OF_7B),
    ),
)
