"""What tests of several processes share: plans by name, and a tiny model trained for some steps under one of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from conftest import tiny_config

from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.device import Clock
from longfire.initialise import materialise
from longfire.model import on_meta
from longfire.ops.documents import Documents
from longfire.optim import make_optimizer
from longfire.optim.contract import OptimizerRule
from longfire.parallel.apply import parallelize
from longfire.parallel.axes import AXES, DATA
from longfire.parallel.mesh import Mesh
from longfire.parallel.plan import DEGREES
from longfire.training.step import LossSum, train_step

CPU = torch.device("cpu")
T, ROWS, ALL_ROWS, MICROBATCHES = 16, 16, 96, 2
HYBRID = ("gla", "attention")


@dataclass(frozen=True)
class Plan:
    """Processes along each axis, and the settings that are not the defaults."""

    degrees: dict[str, int] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    remat: str = "none"
    offload: bool = False
    compiled: bool = False
    lean: dict[str, Any] = field(
        default_factory=dict
    )  # `attention` and `mlp_chunk_size` of parallelize

    @property
    def processes(self) -> int:
        return prod(self.degrees.values())


PLANS = {
    "one": Plan(),
    "ddp 2": Plan({"dp_replicate": 2}),
    "fsdp 2": Plan({"dp_shard": 2}),
    "fsdp 4": Plan({"dp_shard": 4}),
    "fsdp 8": Plan({"dp_shard": 8}),
    "hsdp 2x2": Plan({"dp_replicate": 2, "dp_shard": 2}),
    "one, offloaded": Plan({"dp_shard": 1}, {"cpu_offload": True}),
    "fsdp 2, offloaded": Plan({"dp_shard": 2}, {"cpu_offload": True}),
    "fsdp 2, never resharded": Plan({"dp_shard": 2}, {"reshard_after_forward": "never"}),
    "tp 2": Plan({"tp": 2}, {"sequence_parallel": False}),
    "tp 2, sequence": Plan({"tp": 2}),
    "fsdp 2 x tp 2": Plan({"dp_shard": 2, "tp": 2}),
    "pp 2": Plan({"pp": 2}),
    "pp 2 x fsdp 2": Plan({"pp": 2, "dp_shard": 2}),
    "pp 2 x tp 2": Plan({"pp": 2, "tp": 2}),
    "pp 2 x fsdp 2 x tp 2": Plan({"pp": 2, "dp_shard": 2, "tp": 2}),
    "cp 2": Plan({"cp": 2}),
    "cp 4": Plan({"cp": 4}),
    "cp 8": Plan({"cp": 8}),
    "fsdp 2 x cp 2": Plan({"dp_shard": 2, "cp": 2}),
    "hsdp 2x1 x cp 2": Plan({"dp_replicate": 2, "cp": 2}),
    "cp 2 x tp 2": Plan({"cp": 2, "tp": 2}),
    "cp 2 x tp 2, not sequence": Plan({"cp": 2, "tp": 2}, {"sequence_parallel": False}),
    "pp 2 x cp 2": Plan({"pp": 2, "cp": 2}),
    "pp 2 x cp 2 x tp 2": Plan({"pp": 2, "cp": 2, "tp": 2}),
}


def rows_of(first: int, count: int) -> Batch:
    """Rows of the run by their number, with documents and unequal numbers of labels."""
    chance = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(97, (ALL_ROWS, T + 1), generator=chance)
    starts_BT = torch.rand(ALL_ROWS, T, generator=chance) < 0.2
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[torch.rand(ALL_ROWS, T, generator=chance) < 0.3] = NO_LABEL
    first_BT = torch.where(starts_BT, torch.arange(T), 0).cummax(1).values
    mine = slice(first, first + count)
    documents = Documents.from_ids(starts_BT[mine].long().cumsum(1))
    return Batch(ids_BT[mine, :-1], labels_BT[mine], (torch.arange(T) - first_BT)[mine], documents)


OPTIMIZER = settings.Optimizer(lr=1e-3, eps=1e-5)


def state_of(
    mixers: tuple[str, ...],
    /,
    plan: Plan,
    mesh: Mesh,
    dtype: torch.dtype = torch.float32,
    optimizer: settings.Optimizer = OPTIMIZER,
    **changes: Any,
) -> State:
    """A tiny model at step 0 under the plan, parameters and all else in this type."""
    model = on_meta(tiny_config(*mixers, **{"initializer_range": 0.05, **changes}), dtype).to(dtype)
    remat, parallelism = (
        settings.ActivationCheckpoint(plan.remat, offload=plan.offload),
        settings.Parallelism(**plan.given),
    )
    model = parallelize(model, remat, plan.compiled, mesh, parallelism, T, **plan.lean)
    materialise(model, 0, CPU)
    return State(model, make_optimizer(model, optimizer, CPU), mesh=mesh)


def steps(
    state: State,
    count: int,
    max_norm: float = 0,
    rows: Callable[[int, int], Batch] = rows_of,
    microbatches: int = MICROBATCHES,
    loss_function: LossSum | None = None,
) -> list[dict[str, float]]:
    """Loss and gradient norm of so many steps on the rows that come next; rows(first, count) gives them."""
    each, said = ROWS // state.mesh.size(*DATA), []
    for _ in range(count):
        batch = rows(state.rows_consumed + state.mesh.rank(*DATA) * each, each)
        numbers = train_step(
            state,
            batch.split(microbatches),
            1e-3,
            settings.Training(max_norm=max_norm),
            Clock(CPU),
            loss_function,
        )
        said.append({name: numbers[name] for name in ("loss", "grad_norm")})
    return said


def parts(state: State) -> dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]:
    """Everything on this process: by name, (where in the whole, the numbers)."""
    return {
        name: [(box.begin, box.of_local(held.tensor).clone()) for box in held.slices]
        for name, held in state.held().items()
        if not name.startswith("rng/")
    }


def whole(held: list[dict], like: dict) -> dict[str, torch.Tensor]:
    """The parts of all processes put together; NaN where a number lies nowhere. `like`: the parts of one process."""
    tensors = {name: torch.full_like(boxes[0][1], torch.nan) for name, boxes in like.items()}
    for one in held:
        for name, boxes in one.items():
            for begin, numbers in boxes:
                tensors[name][tuple(slice(b, b + n) for b, n in zip(begin, numbers.shape))] = (
                    numbers
                )
    return tensors


# What tests/contracts/test_03_plans.py runs, and docs/parallelism.md shows.
ANY_MIXER = {
    "FSDP": "fsdp 2",
    "TP, sequence": "tp 2, sequence",
    "PP": "pp 2",
    "FSDP x TP": "fsdp 2 x tp 2",
    "context": "cp 2",
}


def capability_table(mixers: list[str]) -> str:
    """The table of docs/parallelism.md: each cell that says yes is a test of test_03_plans.py, which fails if it is not so."""
    head = ["mixer", *ANY_MIXER]
    rows = [[name, *("yes" for _ in ANY_MIXER)] for name in sorted(mixers)]
    return markdown(head, rows)


def plans_table() -> str:
    """The plans of the hybrid of gla and attention."""
    rows = [
        [
            name,
            str(plan.processes),
            ", ".join(f"{key} = {value}" for key, value in plan.given.items()),
        ]
        for name, plan in PLANS.items()
        if plan.processes > 1
    ]
    return markdown(["plan", "processes", "settings"], rows)


def optimizers_table(rules: dict[str, type[OptimizerRule]]) -> str:
    """Each cell that says yes is a test of test_03_plans.py."""
    rows = []
    for name, rule in rules.items():
        proven = ["yes" if axis in rule.proven_axes else "" for axis in AXES]
        rows.append([name, *proven])
    return markdown(["optimizer", *(DEGREES[axis] for axis in AXES)], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]) + "\n"
    )
