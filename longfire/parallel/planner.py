"""`longfire plan`: what a run will hold, send and take on devices that are not here, and which plans would do better.

A plan is chosen degrees, recomputation and rows; `Planner.forecast` says what it costs one process: bytes from parallel/memory.py,
seconds from parallel/cost.py. docs/planning.md has every formula once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import log
from typing import NamedTuple

import torch
from torch import nn

from longfire.errors import SettingsError
from longfire.model import on_meta
from longfire.parallel import cost, stages, tensor
from longfire.parallel.cost import Device
from longfire.parallel.memory import EMBED, HEAD, MASTER_BYTES, Keeping, Meter, ends_of
from longfire.parallel.pipeline import costs
from longfire.parallel.plan import reshards
from longfire.run import Run
from longfire.settings import Parallelism
from longfire.shape import ForeignShape

REMATS = ("none", "mlp", "attention", "attention+mlp", "block")
MOST_STAGES = 16  # pipelines that alternatives try
LABELS = 3 * 8  # bytes of a token's id, label and position


@dataclass(frozen=True)
class Plan:
    """Degrees of the mesh, what is computed again, and rows: batch_size of each of `microbatches` on a process."""

    dp_replicate: int
    dp_shard: int
    tp: int
    pp: int
    remat: str
    batch_size: int
    microbatches: int

    @property
    def data(self) -> int:
        """Processes whose rows differ."""
        return self.dp_replicate * self.dp_shard

    @property
    def mesh(self) -> tuple[int, int, int, int]:
        return self.pp, self.dp_replicate, self.dp_shard, self.tp


class Group(NamedTuple):
    """Parameters that are gathered together: a block, or all that is in no block."""

    whole: int  # numbers, of this process's share of matrices
    shard: int  # of those, the first process's rows

    @classmethod
    def of(cls, module: nn.Module, shards: int) -> "Group":
        parameters = list(module.parameters())
        rows = [(-(-len(p) // shards), len(p)) if p.dim() else (1, 1) for p in parameters]
        return cls(
            sum(p.numel() for p in parameters), sum(p.numel() // of * here for p, (here, of) in zip(parameters, rows))
        )


@dataclass(frozen=True)
class Moment:
    """What a process holds at one time of a step, in bytes."""

    where: str
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    logits: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.gathered + self.logits


@dataclass(frozen=True)
class Collective:
    """What one process sends in a step, over one axis."""

    axis: str
    what: str
    processes: int
    bytes: float
    seconds: float
    hidden: str  # behind what it runs; "" if everything waits for it


@dataclass(frozen=True)
class Forecast:
    """One plan: the fullest moment of its fullest process, and where a step's time goes."""

    plan: Plan
    peak: Moment
    fits: bool
    seconds: float
    parts: dict[str, float]  # seconds of compute, network, pipeline bubble, optimizer
    collectives: tuple[Collective, ...]
    flops: float  # of a step, all processes, as the mathematics needs them
    flops_again: float  # computed again
    tokens_per_second: float
    mfu: float
    days: float
    device_hours: float
    binds: str
    largest: dict[str, int] = field(default_factory=dict)


class Planner:
    """Forecasts of a run on devices of one kind; as many as the run was composed for. Raises SettingsError for what cannot be planned.

    as_cuda: false for a CPU, which bench/planner.py measures.
    """

    def __init__(self, run: Run, device: Device, dtype: str = "", as_cuda: bool = True) -> None:
        if isinstance(run.shape, ForeignShape):
            raise SettingsError(
                "model.backend = 'transformers' knows nothing of the model's inside, which `longfire plan` counts; set it to longfire"
            )
        self.run, self.device, self.as_cuda = run, device, as_cuda
        self.processes, self.seq_len = run.world.size, run.training.seq_len
        self.rows, self.tokens = run.rows_per_step, run.tokens_per_step
        self.shape = run.shape.with_vocabulary(run.words)
        self.dtype = dtype or ("float32" if run.model.compute_dtype == "float32" else "bfloat16")
        self.model = on_meta(self.shape, getattr(torch, self.dtype))
        self.flops_of = [
            {"mixer": block.mixer.flops_per_token(self.seq_len), "block": block.flops_per_token(self.seq_len)}
            for block in self.model.layers
        ]
        self.costs = costs(self.model, self.seq_len)
        self.flops_of_head = self.costs[-1]
        self.meters: dict[tuple[int, int], Meter] = {}
        self.groups: dict[tuple[int, int], dict[int | str, Group]] = {}
        self.layouts: dict[int, list[list[int]]] = {}

    def of_recipe(self) -> Plan:
        """The plan that the settings say. Raises SettingsError for one that cannot be."""
        run, degrees = self.run, self.run.degrees
        if problems := list(self.refusals(degrees["tp"])):
            raise SettingsError("\n".join(problems))
        rows = self.rows // run.data_processes
        return Plan(
            *(degrees[axis] for axis in ("dp_replicate", "dp_shard", "tp", "pp")), run.activation_checkpoint.mode,
            rows // run.microbatches, run.microbatches,
        )  # fmt: skip

    def refusals(self, tp: int) -> Iterator[str]:
        """Why processes cannot share this model's matrices so. (Run.compose has looked at the recipe's own pipeline.)"""
        return tensor.refusals(self.model, tp, self.run.parallelism.sequence_parallel, self.seq_len)

    def meter(self, tp: int, seq_len: int) -> Meter:
        """Of the share that one of `tp` processes has."""
        if (tp, seq_len) not in self.meters:
            self.meters[tp, seq_len] = Meter(
                self.model, seq_len, self.run.training.loss_chunk_tokens, self.as_cuda, tp,
                self.run.parallelism.sequence_parallel,
                Keeping(self.run.attention, self.run.activation_checkpoint, self.run.training.mlp_chunk_size),
            )  # fmt: skip
        return self.meters[tp, seq_len]

    # Memory

    def groups_of(self, tp: int, shards: int) -> dict[int | str, Group]:
        """What is gathered together, of one process of `tp` x `shards`: blocks by number, the two ends by name."""
        if (tp, shards) not in self.groups:
            model = self.meter(tp, self.seq_len).model
            parts = {**dict(enumerate(model.layers)), **ends_of(model)}
            self.groups[tp, shards] = {name: Group.of(part, shards) for name, part in parts.items()}
        return self.groups[tp, shards]

    def layers_of(self, pp: int) -> list[list[int]]:
        """The layers of each process of a pipeline."""
        if pp not in self.layouts:
            own = pp == self.run.degrees["pp"]  # whose are named points, and orders in files
            placed = stages.layout(self.costs, pp, self.run.parallelism if own else self.plain_schedule)
            self.layouts[pp] = [[n for stage in placed.on(p) for n in placed.layers[stage]] for p in range(pp)]
        return self.layouts[pp]

    @property
    def plain_schedule(self) -> Parallelism:
        return replace(self.run.parallelism, pipeline_parallel_schedule_csv="", pipeline_parallel_split_points=())

    def names_of(self, plan: Plan, process: int) -> list[int | str]:
        """The parts of a process along pp, in the order in which a microbatch meets them. (Where stages lie in a V, the first process
        has the head as well.)"""
        v_shaped = self.run.parallelism.pipeline_parallel_schedule in stages.V_SHAPED
        last = 0 if v_shaped else plan.pp - 1
        return [
            *([EMBED] if process == 0 else []),
            *self.layers_of(plan.pp)[process],
            *([HEAD] if process == last else []),
        ]

    def peak(self, plan: Plan, seq_len: int = 0) -> Moment:
        """The fullest moment of the fullest process."""
        moments = (m for process in range(plan.pp) for m in self.moments(plan, process, seq_len or self.seq_len))
        return max(moments, key=lambda moment: moment.total)

    def moments(self, plan: Plan, process: int, seq_len: int) -> Iterator[Moment]:
        """What a process along pp holds in a step that is not the first, moment by moment."""
        run, names = self.run, self.names_of(plan, process)
        meter, groups = self.meter(plan.tp, seq_len), self.groups_of(plan.tp, plan.dp_shard)
        tied = self.shape.tie_word_embeddings and EMBED in names
        group = {name: Group(0, 0) if tied and name == HEAD else groups[name] for name in names}
        shards = Shards(plan, run.parallelism, names, group)
        parts = {name: meter.part(name, plan.remat, plan.batch_size) for name in names}
        lying = MASTER_BYTES * sum(g.shard for g in group.values()) * (not run.parallelism.cpu_offload)
        chunk = min(plan.batch_size * seq_len, run.training.loss_chunk_tokens)
        logits = 4 * chunk * meter.model.head.weight.shape[0]

        def moment(where: str, gradients: float, activations: float, gathered: float) -> Moment:
            seen = min(logits, activations) if where.endswith(HEAD) else 0
            return Moment(where, lying, gradients, 2.0 * lying, activations - seen, gathered, seen)

        others = cost.in_flight(process, plan.pp, plan.microbatches, run.parallelism.pipeline_parallel_schedule) - 1
        passes = (2 if plan.pp > 1 else 0) * max(
            part.passed for part in parts.values()
        )  # given by one stage, to the next
        kept = others * (passes + sum(part.kept for part in parts.values()))
        kept += passes + LABELS * plan.batch_size * plan.microbatches * seq_len
        gradients = shards.gradients_before
        for name in names:
            yield moment(f"forward of {told(name)}", gradients, kept + parts[name].forward_peak, shards.forward(name))
            kept += parts[name].kept
        for name in reversed(names):
            kept -= parts[name].kept
            peak = parts[name].backward_peak(further=shards.accumulates)
            yield moment(f"backward of {told(name)}", gradients, kept + peak, shards.backward(name))
            yield moment(f"gradients of {told(name)}", gradients, kept + parts[name].passed, shards.reduction(name))
            gradients += shards.gradient(name)
        unfused = 0.0 if run.optimizer.fused else lying  # torch's foreach form makes the updates first
        yield moment("optimizer", lying, unfused, shards.always)

    def largest(self, measure: Callable[[int], float], least: int = 1) -> int:
        """The largest number, a multiple of `least`, whose bytes fit; 0 if none. The bytes grow with the number."""
        if measure(least) > self.device.usable_bytes:
            return 0
        low, high = 1, 2
        while measure(high * least) <= self.device.usable_bytes and high < 2**24:
            low, high = high, 2 * high
        while high - low > max(1, low // 512):
            middle = (low + high) // 2
            low, high = (middle, high) if measure(middle * least) <= self.device.usable_bytes else (low, middle)
        return low * least

    def largest_batch_size(self, plan: Plan) -> int:
        return self.largest(lambda rows: self.peak(replace(plan, batch_size=rows)).total)

    def largest_seq_len(self, plan: Plan) -> int:
        """By a straight line through the lengths of the recipe and twice that: all that a block keeps grows with the tokens."""
        T = self.seq_len
        one, two = (self.peak(plan, length).total for length in (T, 2 * T))
        step = plan.tp * (64 if T >= 64 else 1)
        return self.largest(lambda tokens: one + (two - one) * (tokens / T - 1), step)

    # Time

    def collectives(self, plan: Plan) -> Iterator[Collective]:
        """What a process with the most layers sends in a step."""
        settings, groups = self.run.parallelism, self.groups_of(plan.tp, plan.dp_shard)
        names = max((self.names_of(plan, process) for process in range(plan.pp)), key=len)
        numbers = sum(groups[name].whole for name in names if not (name == HEAD and self.shape.tie_word_embeddings))
        row_bytes = plan.batch_size * self.seq_len * self.shape.hidden_size * (2 if self.dtype == "bfloat16" else 4)

        def over(axis: str, what: str, inner: int, sent: float, hidden: str = "") -> Collective:
            size = getattr(plan, axis)
            return Collective(axis, what, size, sent, sent / cost.bandwidth(self.device, size, inner), hidden)

        if plan.tp > 1:
            again = {"none": 0, "mlp": 1, "attention": 1, "attention+mlp": 2, "block": 2}[plan.remat]
            again += self.run.training.mlp_chunk_size > 0 and plan.remat not in ("mlp", "attention+mlp")
            times = sum(
                2 if isinstance(name, str) else 4 + again for name in names
            )  # in and out of each region, and back
            what = "rows: all-gather, reduce-scatter" if settings.sequence_parallel else "rows: all-reduce"
            yield over("tp", what, 1, plan.microbatches * times * cost.reduced_bytes(row_bytes, plan.tp) / 2)
        if plan.dp_shard > 1:
            each = 2 if settings.param_gather_dtype == "bfloat16" else 4
            gathers = 2 * plan.microbatches if reshards(settings, plan.pp, plan.dp_shard) else 1
            sent = gathers * cost.gathered_bytes(each * numbers, plan.dp_shard)
            yield over("dp_shard", "parameters: all-gather", plan.tp, sent, "compute")
            scatters = 1 if plan.pp > 1 else plan.microbatches
            sent = scatters * cost.gathered_bytes(MASTER_BYTES * numbers, plan.dp_shard)
            yield over("dp_shard", "gradients: reduce-scatter", plan.tp, sent, "compute")
        if plan.dp_replicate > 1:
            sent = cost.reduced_bytes(MASTER_BYTES * numbers / plan.dp_shard, plan.dp_replicate)
            yield over("dp_replicate", "gradients: all-reduce", plan.tp * plan.dp_shard, sent, "last backward")
        if plan.pp > 1:
            each = stages.STAGES_EACH.get(settings.pipeline_parallel_schedule, 1)
            sent = 2 * each * plan.microbatches * row_bytes / (plan.tp if settings.sequence_parallel else 1)
            yield over("pp", "rows: to the next stage and back", plan.tp * plan.data, sent, "compute")

    def parts_of_step(self, plan: Plan, collectives: Sequence[Collective]) -> dict[str, float]:
        """Seconds of a step: what is computed, what of the network is not hidden behind it, idle stages, the optimizer."""
        flops = [self.flops_on(plan, process) for process in range(plan.pp)]
        compute = cost.compute_seconds(max(flops) * self.tokens / plan.data / plan.tp, self.device, self.dtype)
        waited, behind, behind_last = (
            sum(c.seconds for c in collectives if c.hidden == hidden) for hidden in ("", "compute", "last backward")
        )
        network = waited + max(0.0, behind - compute - waited)
        network += max(0.0, behind_last - compute * 2 / 3 / plan.microbatches)
        idle = cost.bubble(plan.pp, plan.microbatches, self.run.parallelism.pipeline_parallel_schedule)
        groups = self.groups_of(plan.tp, plan.dp_shard)
        numbers = max(sum(groups[name].shard for name in self.names_of(plan, process)) for process in range(plan.pp))
        return {
            "compute": compute,
            "network": network,
            "pipeline bubble": (compute + network) * idle / (1 - idle),
            "optimizer": cost.optimizer_seconds(numbers, self.device, self.run.parallelism.cpu_offload),
        }

    def flops_on(self, plan: Plan, process: int) -> float:
        """FLOPs a token of a process along pp, forward, backward and again, of all that share its matrices."""
        total = 0.0
        for name in self.names_of(plan, process):
            if name == HEAD:
                total += 3 * self.flops_of_head
            elif name != EMBED:
                mixer, block = self.flops_of[name]["mixer"], self.flops_of[name]["block"]
                total += 3 * block + self.flops_again(plan.remat, mixer, block - mixer)
        return total

    def flops_again(self, remat: str, mixer: float, mlp: float) -> float:
        """FLOPs a token that a block computes again; MLPs in chunks are computed again by themselves. A policy that keeps matrix
        products leaves nothing that counts, one that names operations is counted as if it kept nothing."""
        kept = "matmuls" in self.run.activation_checkpoint.policy
        parts = {"none": 0.0, "attention": mixer, "mlp": mlp, "attention+mlp": mixer + mlp, "block": mixer + mlp}
        chunked = self.run.training.mlp_chunk_size > 0 and remat not in ("mlp", "attention+mlp")
        return (0.0 if kept else parts[remat]) + (mlp if chunked else 0.0)

    def forecast(self, plan: Plan) -> Forecast:
        """Everything about one plan but the largest batch and length, which `with_largest` adds."""
        peak, collectives = self.peak(plan), tuple(self.collectives(plan))
        parts = self.parts_of_step(plan, collectives)
        seconds, fits = sum(parts.values()), peak.total <= self.device.usable_bytes
        flops = 3 * self.tokens * (sum(flops["block"] for flops in self.flops_of) + self.flops_of_head)
        computed = self.tokens * sum(self.flops_on(plan, process) for process in range(plan.pp))
        hours = self.run.steps * seconds / 3600
        return Forecast(
            plan, peak, fits, seconds, parts, collectives, flops, computed - flops, self.tokens / seconds,
            flops / seconds / self.processes / self.device.flops[self.dtype], hours / 24, hours * self.processes,
            max(parts, key=parts.__getitem__) if fits else "memory",
        )  # fmt: skip

    def with_largest(self, forecast: Forecast) -> Forecast:
        plan = forecast.plan
        return replace(
            forecast, largest={"batch_size": self.largest_batch_size(plan), "seq_len": self.largest_seq_len(plan)}
        )

    # Alternatives

    def candidates(self) -> Iterator[Plan]:
        """Every plan on these processes with the recipe's rows a step: matrices shared inside a node, pipelines of at most
        MOST_STAGES processes, context parallel 1."""
        for tp in divisors(self.processes, self.device.node):
            if any(self.refusals(tp)):
                continue
            for pp in divisors(self.processes // tp, MOST_STAGES):
                data = self.processes // tp // pp
                if self.rows % data:
                    continue
                for shards, rows, remat in product(divisors(data), divisors(self.rows // data), REMATS):
                    plan = Plan(data // shards, shards, tp, pp, remat, rows, self.rows // data // rows)
                    if self.can_be(plan):
                        yield plan

    def can_be(self, plan: Plan) -> bool:
        if plan.remat in ("mlp", "attention+mlp") and self.shape.mlp == "none":
            return False
        schedule = self.plain_schedule
        return plan.pp == 1 or not any(stages.refusals(self.shape, plan.pp, schedule, plan.microbatches))

    def alternatives(self, count: int = 8) -> list[Forecast]:
        """The best plan of each mesh, fastest first; among those within a hundredth the one that holds least."""
        best: dict[tuple, Forecast] = {}
        for plan in self.candidates():
            forecast = self.forecast(plan)
            known = best.get(plan.mesh)
            if forecast.fits and (known is None or rank_of(forecast) < rank_of(known)):
                best[plan.mesh] = forecast
        return sorted(best.values(), key=rank_of)[:count]


class Shards:
    """What FSDP2 holds of a process's parts beside the shards themselves, in bytes; nothing where rows differ nowhere.

    A block's parameters lie there twice while it runs, as they arrived and as they are used; in the backward the second place is that
    of the next block's, which arrive meanwhile. What is in no block stays whole from its first use to the end of the step. Gradients
    are copied once to be sent, and the copy lives until the next block's is made.
    """

    def __init__(
        self, plan: Plan, settings: Parallelism, names: list[int | str], group: dict[int | str, Group]
    ) -> None:
        self.plan, self.names, self.group, self.offload = plan, names, group, settings.cpu_offload
        self.wrapped, self.sharded = plan.data > 1, plan.dp_shard > 1
        self.each = 2 if settings.param_gather_dtype == "bfloat16" else 4
        self.stays = not reshards(settings, plan.pp, plan.dp_shard)
        # Gradients are whole between microbatches where they are not scattered after each.
        self.accumulates = plan.microbatches > 1 and not (self.sharded and plan.pp == 1)
        self.always = self.whole(*(name for name in names if self.stays or isinstance(name, str)))

    @property
    def gradients_before(self) -> float:
        """What lies there when a microbatch after the first begins."""
        if self.accumulates:
            return float(MASTER_BYTES * sum(g.whole for g in self.group.values()))
        return sum(map(self.shard, self.names)) if self.plan.microbatches > 1 else 0.0

    def gradient(self, name: int | str) -> float:
        """What a part's backward adds to them."""
        return 0.0 if self.plan.microbatches > 1 else self.shard(name)

    def shard(self, name: int | str) -> float:
        return 0.0 if self.offload else float(MASTER_BYTES * self.group[name].shard)

    def whole(self, *names: int | str) -> float:
        return float(self.each * sum(self.group[name].whole for name in names)) if self.wrapped else 0.0

    def of_block(self, name: int | str) -> float:
        return 0.0 if isinstance(name, str) or self.stays else self.whole(name)

    def forward(self, name: int | str) -> float:
        return self.always + 2 * self.of_block(name)

    def backward(self, name: int | str) -> float:
        """With the gradients of the part before, on their way."""
        after = self.names[self.names.index(name) + 1 :][:1]
        return self.always + 2 * self.of_block(name) + sum(map(self.sent, after))

    def reduction(self, name: int | str) -> float:
        """When its gradients, whole, have been copied to be sent."""
        return self.always + self.of_block(name) + (1 if self.accumulates else 2) * self.sent(name) + self.shard(name)

    def sent(self, name: int | str) -> float:
        return float(MASTER_BYTES * self.group[name].whole) if self.wrapped else 0.0


def rank_of(forecast: Forecast) -> tuple[float, float]:
    """Seconds to a hundredth of themselves, then bytes."""
    return round(log(forecast.seconds) * 100), forecast.peak.total


def told(name: int | str) -> str:
    return name if isinstance(name, str) else f"layer {name}"


def divisors(number: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, most or number) + 1) if number % d == 0]
