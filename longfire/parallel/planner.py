"""`longfire plan`: what a run will hold, send and take on devices that are not here, and which plans would do better.

A plan is chosen degrees, recomputation and rows; `Planner.forecast` says what it costs one process: bytes from parallel/memory.py,
seconds from parallel/cost.py. docs/planning.md has every formula once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import nn

from longfire.errors import SettingsError
from longfire.model import Model
from longfire.parallel import cost
from longfire.parallel.cost import Device
from longfire.parallel.memory import EMBED, HEAD, MASTER_BYTES, Meter, Part, share_of
from longfire.run import Run
from longfire.settings import Parallelism
from longfire.shape import ForeignShape

REMATS = ("none", "mlp", "attention", "block")
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

    whole: int  # numbers, of this process's share of tensor parallelism
    shard: int  # of those, one process's rows


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
    """Forecasts of a run on `processes` devices of one kind. Raises SettingsError for what cannot be planned."""

    def __init__(self, run: Run, processes: int, device: Device) -> None:
        if isinstance(run.shape, ForeignShape):
            raise SettingsError(
                "model.backend = 'transformers' knows nothing of the model's inside, which `longfire plan` counts; set it to longfire"
            )
        self.run, self.processes, self.device = run, processes, device
        self.shape = run.shape.with_vocabulary(run.words)
        self.dtype = "float32" if run.model.compute_dtype == "float32" else "bfloat16"
        self.meters: dict[tuple[int, int], Meter] = {}
        self.groups: dict[tuple[int, int], tuple[list[Group], dict[str, Group]]] = {}

    @cached_property
    def model(self) -> Model:
        """The whole model, on meta."""
        return self.made()

    def made(self) -> Model:
        with torch.device("meta"):
            return Model(self.shape, getattr(torch, self.dtype))

    @cached_property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        training, parallelism = self.run.training, self.run.parallelism
        degrees = degrees_of(parallelism, self.processes)
        at_once = training.batch_size * degrees["dp_replicate"] * degrees["dp_shard"]
        rows = training.global_batch_size or at_once * (training.gradient_accumulation_steps or 1)
        if rows % at_once:
            raise SettingsError(
                f"training.global_batch_size = {rows} is no multiple of batch_size x processes with rows of their own = {at_once}, "
                f"and it is never rounded: take {ceil(rows / at_once) * at_once}, or another training.batch_size"
            )
        return rows

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.run.training.seq_len

    @property
    def budget(self) -> int:
        """Tokens of the run."""
        return self.run.training.tokens or self.run.training.steps * self.tokens

    def of_recipe(self) -> Plan:
        """The plan that the settings say. Raises SettingsError for one that cannot be."""
        training, parallelism = self.run.training, self.run.parallelism
        degrees = degrees_of(parallelism, self.processes)
        tp, pp, replicas, shards = (degrees[axis] for axis in ("tp", "pp", "dp_replicate", "dp_shard"))
        problems = list(refusals(self.model, tp, pp, self.run))
        if problems:
            raise SettingsError("\n".join(problems))
        batch_size, microbatches = training.batch_size, self.rows // (replicas * shards * training.batch_size)
        if pp > 1 and (parallelism.pipeline_parallel_microbatches or microbatches == 1):
            whole, microbatches = batch_size * microbatches, parallelism.pipeline_parallel_microbatches or pp
            if whole % microbatches:
                raise SettingsError(
                    f"parallelism.pipeline_parallel_microbatches = {microbatches} do not divide the {whole} rows of a process; "
                    f"set it, or training.batch_size, to a divisor"
                )
            batch_size = whole // microbatches
        return Plan(replicas, shards, tp, pp, self.run.activation_checkpoint.mode, batch_size, microbatches)

    def meter(self, tp: int, seq_len: int) -> Meter:
        if (tp, seq_len) not in self.meters:
            parts_of_row = tp if self.run.parallelism.sequence_parallel else 1
            chunk = self.run.training.loss_chunk_tokens
            self.meters[tp, seq_len] = Meter(share_of(self.made(), tp), seq_len, chunk, self.is_cuda, parts_of_row)
        return self.meters[tp, seq_len]

    is_cuda = True

    # Memory

    def groups_of(self, tp: int, shards: int) -> tuple[list[Group], dict[str, Group]]:
        """The blocks' parameters, and those of the two ends, of one process of `tp` x `shards`."""
        if (tp, shards) not in self.groups:
            model = self.meter(tp, self.run.training.seq_len).model
            ends = {EMBED: [model.embed, model.positions, model.embed_norm, model.shared], HEAD: [model.norm, model.head]}
            self.groups[tp, shards] = (
                [group_of([block], shards) for block in model.layers],
                {name: group_of([m for m in modules if m is not None], shards) for name, modules in ends.items()},
            )
        return self.groups[tp, shards]

    @cached_property
    def flops_of(self) -> list[dict[str, float]]:
        """Forward FLOPs a token of each layer: its mixer and its MLP."""
        return [
            {
                "mixer": block.mixer.flops_per_token(self.run.training.seq_len),
                "mlp": 2.0 * sum(p.numel() for p in block.mlp.parameters() if p.dim() >= 2) if block.mlp else 0.0,
            }
            for block in self.model.layers
        ]

    @property
    def flops_of_head(self) -> float:
        return 2.0 * self.shape.hidden_size * self.shape.vocab_size

    def stages(self, pp: int) -> list[list[int]]:
        """The layers of each stage, of nearly equal cost; the head counts with the last."""
        points = [int(p.removeprefix("layers.")) for p in self.run.parallelism.pipeline_parallel_split_points if "." in p]
        layers = range(len(self.flops_of))
        if len(points) == pp - 1 and points:
            bounds = [0, *points, len(layers)]
            return [list(range(*pair)) for pair in zip(bounds, bounds[1:])]
        costs = [sum(layer.values()) for layer in self.flops_of]
        total, passed, stages = sum(costs) + self.flops_of_head, 0.0, [[] for _ in range(pp)]
        for layer, flops in zip(layers, costs):
            wanted = int((passed + flops / 2) / total * pp)
            at_least = max((n for n, stage in enumerate(stages) if stage), default=0)
            left = len(layers) - layer  # each later stage needs one
            stage = max(at_least, min(wanted, pp - 1), pp - left)
            stages[min(stage, at_least + 1) if layer else 0].append(layer)
            passed += flops
        return stages

    def peak(self, plan: Plan, seq_len: int = 0) -> Moment:
        """The fullest moment of the fullest stage."""
        seq_len = seq_len or self.run.training.seq_len
        moments = (m for stage in range(plan.pp) for m in self.moments(plan, stage, seq_len))
        return max(moments, key=lambda moment: moment.total)

    def moments(self, plan: Plan, stage: int, seq_len: int) -> Iterator[Moment]:
        """What a process of this stage holds, moment by moment, in the steady state of a step after the first."""
        settings, layers = self.run.parallelism, self.stages(plan.pp)[stage]
        meter, (blocks, ends) = self.meter(plan.tp, seq_len), self.groups_of(plan.tp, plan.dp_shard)
        sharded, first, last = plan.dp_shard > 1, stage == 0, stage == plan.pp - 1
        accumulated = plan.microbatches > 1 and not sharded
        names = [*([EMBED] if first else []), *layers, *([HEAD] if last else [])]
        parts = {name: meter.part(name, plan.remat, plan.batch_size, accumulated) for name in names}
        group = {name: ends[name] if isinstance(name, str) else blocks[name] for name in names}
        if self.shape.tie_word_embeddings and first and last:
            group[HEAD] = Group(0, 0)
        held = sum(g.shard for g in group.values()) * MASTER_BYTES * (not settings.cpu_offload)
        buckets = held if plan.dp_replicate > 1 and not sharded else 0  # DDP's: a copy of the gradients
        optimizer = 2.0 * held
        logits = min(plan.batch_size * seq_len, self.run.training.loss_chunk_tokens) * meter.model.head.weight.shape[0] * 4

        def moment(where: str, gradients: float, activations: float, gathered: float = 0.0) -> Moment:
            seen = min(logits, activations) if where.endswith(HEAD) else 0.0
            return Moment(where, held, gradients + buckets, optimizer, activations - seen, gathered, seen)

        gathers = Gathers(plan, settings, names, group)
        flying = cost.in_flight(stage, plan.pp, plan.microbatches, settings.pipeline_parallel_schedule) - 1
        kept = flying * sum(p.kept for p in parts.values()) + plan.batch_size * seq_len * LABELS
        kept += 2 * flying * parts[names[0]].passed  # what a stage was given, and what it gave
        gradients = held if plan.microbatches > 1 else 0.0
        for name in names:
            yield moment(f"forward of {told(name)}", gradients, kept + parts[name].forward_peak, gathers.forward(name))
            kept += parts[name].kept
        for name in reversed(names):
            kept -= parts[name].kept
            now = kept + parts[name].kept  # its instants count from where it began
            yield moment(f"backward of {told(name)}", gradients, now - parts[name].kept + parts[name].backward_peak,
                         gathers.backward(name))  # fmt: skip
            if sharded:
                yield moment(f"gradients of {told(name)}", gradients, kept + parts[name].passed, gathers.reduction(name))
            if plan.microbatches == 1:
                gradients += group[name].shard * MASTER_BYTES * (not settings.cpu_offload)
        unfused = held if not self.run.optimizer.fused else 0.0  # torch's foreach form
        yield moment("optimizer", held, unfused, gathers.always)

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
        T = self.run.training.seq_len
        one, two = (self.peak(plan, length).total for length in (T, 2 * T))
        step = plan.tp * (64 if T >= 64 else 1)
        return self.largest(lambda tokens: one + (two - one) * (tokens / T - 1), step)

    # Time

    def collectives(self, plan: Plan) -> Iterator[Collective]:
        """What a process of the costliest stage sends in a step."""
        layers = max(self.stages(plan.pp), key=len)
        blocks, ends = self.groups_of(plan.tp, plan.dp_shard)
        rows_bytes = plan.batch_size * self.run.training.seq_len * self.shape.hidden_size * (2 if self.dtype == "bfloat16" else 4)
        numbers = sum(blocks[layer].whole for layer in layers) + ends[EMBED].whole  # an end of the pipeline, or both if it has one
        numbers += ends[HEAD].whole if plan.pp == 1 and not self.shape.tie_word_embeddings else 0
        settings = self.run.parallelism

        def over(axis: str, what: str, inner: int, sent: float, hidden: str = "") -> Collective:
            size = plan.pp if axis == "pp" else getattr(plan, axis)
            return Collective(axis, what, size, sent, sent / cost.bandwidth(self.device, size, inner), hidden)

        if plan.tp > 1:
            again = {"none": 0, "mlp": 1, "attention": 1, "block": 2}[plan.remat]
            times = len(layers) * (4 + again) + 2  # mixer and MLP, forward and backward; the embedding and the head
            what = "all-gathers and reduce-scatters of rows" if settings.sequence_parallel else "all-reduces of rows"
            yield over("tp", what, 1, plan.microbatches * times * cost.reduced_bytes(rows_bytes, plan.tp))
        if plan.dp_shard > 1:
            each = 2 if settings.param_gather_dtype == "bfloat16" else 4
            kept = keeps_gathered(settings, plan.pp)
            gathers = 1 if kept else 2 * plan.microbatches
            sent = gathers * cost.gathered_bytes(each * numbers, plan.dp_shard)
            yield over("dp_shard", "all-gathers of parameters", plan.tp, sent, "compute")
            sent = plan.microbatches * cost.gathered_bytes(MASTER_BYTES * numbers, plan.dp_shard)
            yield over("dp_shard", "reduce-scatters of gradients", plan.tp, sent, "compute")
        if plan.dp_replicate > 1:
            sent = cost.reduced_bytes(MASTER_BYTES * numbers / plan.dp_shard, plan.dp_replicate)
            yield over("dp_replicate", "all-reduces of gradients", plan.tp * plan.dp_shard, sent, "last backward")
        if plan.pp > 1:
            inner = plan.tp * plan.dp_shard * plan.dp_replicate
            sent = 2 * plan.microbatches * rows_bytes / (plan.tp if settings.sequence_parallel else 1)
            yield over("pp", "rows to the next stage and back", inner, sent, "compute")

    def forecast(self, plan: Plan) -> Forecast:
        """Everything about one plan but the largest batch and length, which `with_largest` adds."""
        peak, collectives = self.peak(plan), tuple(self.collectives(plan))
        tokens, layers, schedule = self.tokens, self.flops_of, self.run.parallelism.pipeline_parallel_schedule
        again = {"none": (), "mlp": ("mlp",), "attention": ("mixer",), "block": ("mixer", "mlp")}[plan.remat]
        of_layer = [3 * sum(layer.values()) + sum(layer[part] for part in again) for layer in layers]
        per_token = [sum(of_layer[layer] for layer in stage) for stage in self.stages(plan.pp)]
        per_token[-1] += 3 * self.flops_of_head
        compute = cost.compute_seconds(max(per_token) / plan.tp * tokens / plan.data, self.device, self.dtype)
        exposed = sum(c.seconds for c in collectives if not c.hidden)
        hidden = sum(c.seconds for c in collectives if c.hidden == "compute")
        of_last = compute * 2 / 3 / plan.microbatches
        shown = exposed + max(0.0, hidden - compute - exposed)
        shown += max(0.0, sum(c.seconds for c in collectives if c.hidden == "last backward") - of_last)
        idle = cost.bubble(plan.pp, plan.microbatches, schedule)
        blocks, ends = self.groups_of(plan.tp, plan.dp_shard)
        numbers = sum(blocks[layer].shard for layer in self.stages(plan.pp)[0]) + ends[EMBED].shard
        optimizer = cost.optimizer_seconds(numbers, self.device, self.run.parallelism.cpu_offload)
        parts = {"compute": compute, "network": shown, "pipeline bubble": (compute + shown) * idle / (1 - idle),
                 "optimizer": optimizer}  # fmt: skip
        seconds = sum(parts.values())
        flops = 3 * self.model.flops_per_token(self.run.training.seq_len) * tokens
        whole = (sum(of_layer) + 3 * self.flops_of_head) * tokens
        fits = peak.total <= self.device.usable_bytes
        hours = self.budget / tokens * seconds / 3600
        return Forecast(
            plan, peak, fits, seconds, parts, collectives, flops, max(0.0, whole - flops), tokens / seconds,
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
        """Every plan on these processes with the recipe's rows a step: tensor parallel inside a node, pipelines of at most
        MOST_STAGES stages, context parallel 1."""
        for tp in divisors(self.processes, self.device.node):
            for pp in divisors(self.processes // tp, min(MOST_STAGES, len(self.flops_of))):
                if any(refusals(self.model, tp, pp, self.run)):
                    continue
                data = self.processes // tp // pp
                if self.rows % data:
                    continue
                for shards in divisors(data, data):
                    for batch_size in divisors(self.rows // data, self.rows // data):
                        for remat in REMATS:
                            if remat == "mlp" and self.shape.mlp == "none":
                                continue
                            yield Plan(data // shards, shards, tp, pp, remat, batch_size, self.rows // data // batch_size)

    def alternatives(self, count: int = 8) -> list[Forecast]:
        """The best plan of each mesh, fastest first; among those within a hundredth the one that holds least."""
        best: dict[tuple, Forecast] = {}
        for plan in self.candidates():
            forecast = self.forecast(plan)
            known = best.get(plan.mesh)
            if forecast.fits and (known is None or rank_of(forecast) < rank_of(known)):
                best[plan.mesh] = forecast
        return sorted(best.values(), key=rank_of)[:count]


class Gathers:
    """Bytes that FSDP2 holds beside the shards of a stage, in each part's forward and backward.

    A block's parameters lie there twice while it runs, as they arrived and as they are used (in the backward the second is the next
    block's arriving); what is in no block stays whole from its first use to the end of the step. Gradients are copied once to be
    sent, and the copy lives until the next block's is made.
    """

    def __init__(self, plan: Plan, settings: Parallelism, names: Sequence[int | str], group: dict[int | str, Group]) -> None:
        self.sharded, self.names, self.group = plan.dp_shard > 1, names, group
        self.each = 2 if settings.param_gather_dtype == "bfloat16" else 4
        self.stays = keeps_gathered(settings, plan.pp)
        self.always = self.whole(*(name for name in names if self.stays or isinstance(name, str)))

    def whole(self, *names: int | str) -> float:
        return self.each * sum(self.group[name].whole for name in names) if self.sharded else 0.0

    def forward(self, name: int | str) -> float:
        of_block = 0.0 if isinstance(name, str) or self.stays else 2 * self.whole(name)
        return self.always + of_block

    def backward(self, name: int | str) -> float:
        return self.forward(name) + self.sent(self.after(name))

    def reduction(self, name: int | str) -> float:
        """When its gradients, whole, have been copied for sending."""
        of_block = 0.0 if isinstance(name, str) or self.stays else self.whole(name)
        return self.always + of_block + 2 * self.sent(name)

    def sent(self, name: int | str | None) -> float:
        return MASTER_BYTES * self.group[name].whole if self.sharded and name is not None else 0.0

    def after(self, name: int | str) -> int | str | None:
        """The block whose backward went before."""
        place = self.names.index(name)
        return next((n for n in self.names[place + 1 :] if not isinstance(n, str)), None)


def keeps_gathered(settings: Parallelism, pp: int) -> bool:
    """Whether gathered parameters stay until the step ends."""
    return settings.reshard_after_forward == "never" or (settings.reshard_after_forward == "auto" and pp > 1)


def rank_of(forecast: Forecast) -> tuple[float, float]:
    return round(forecast.seconds, 2 - len(str(int(forecast.seconds * 100)))), forecast.peak.total


def told(name: int | str) -> str:
    return name if isinstance(name, str) else f"layer {name}"


def divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def group_of(modules: list[nn.Module], shards: int) -> Group:
    parameters = {p for module in modules for p in module.parameters()}
    shard = sum(-(-p.shape[0] // shards) * prod(p.shape[1:]) if p.dim() else 1 for p in parameters)
    return Group(sum(p.numel() for p in parameters), shard)


# Until plan.resolve_degrees and plan.refusals are here, which take the place of the next two functions.


def degrees_of(parallelism: Parallelism, processes: int) -> dict[str, int]:
    """axis -> degree; one that is -1 takes what remains. Raises SettingsError."""
    names = {"pp": "pipeline_parallel", "dp_replicate": "data_parallel_replicate", "dp_shard": "data_parallel_shard",
             "cp": "context_parallel", "tp": "tensor_parallel"}  # fmt: skip
    degrees = {axis: getattr(parallelism, f"{name}_degree") for axis, name in names.items()}
    if parallelism.mesh_dim:
        given = [int(word) for word in parallelism.mesh_dim.split(",")]
        degrees |= dict(zip(("dp_replicate", "dp_shard", "tp", "cp"), given))
    free = [axis for axis, degree in degrees.items() if degree == -1]
    if len(free) > 1:
        raise SettingsError(f"parallelism: {' and '.join(names[a] for a in free)} are both -1: give one of them a number")
    known = prod(degree for degree in degrees.values() if degree != -1)
    if processes % known or (not free and processes != known):
        said = ", ".join(f"{names[axis]}_degree = {degree}" for axis, degree in degrees.items())
        raise SettingsError(
            f"parallelism: {said} make {known} processes, but --gpus = {processes}: set data_parallel_shard_degree = -1 "
            "for what remains, or degrees whose product is that"
        )
    return {**degrees, **dict.fromkeys(free, processes // known)}


def refusals(model: Model, tp: int, pp: int, run: Run) -> Iterator[str]:
    """Why this model cannot be shared so, each with its mend."""
    if run.parallelism.context_parallel_degree > 1:
        yield "parallelism.context_parallel_degree: context parallel is not planned yet; set it to 1"
    if pp > len(model.layers):
        yield f"parallelism.pipeline_parallel_degree = {pp} is more than the model's {len(model.layers)} layers: lower it"
    key = f"parallelism.tensor_parallel_degree = {tp}"
    if tp > 1 and run.parallelism.sequence_parallel and run.training.seq_len % tp:
        yield f"{key} does not divide training.seq_len = {run.training.seq_len}, which sequence_parallel asks for: change one of them"
    found = {
        (name, number)
        for block in model.layers
        for name, number in heads_of(block)
        if number % tp
    }
    for name, number in sorted(found):
        yield f"{key} does not divide {name} = {number} of model.config: take a divisor"


def heads_of(block: nn.Module) -> Iterator[tuple[str, int]]:
    """What tensor parallelism shares whole pieces of."""
    shape, hidden_size = block.mixer.shape, block.mixer.hidden_size
    for name in ("num_heads", "num_kv_heads", "num_v_heads"):
        if getattr(shape, name, 0):
            yield name, getattr(shape, name)
    if isinstance(getattr(block.mixer, "heads", None), int):
        yield "heads", block.mixer.heads
    for name in ("head_dim", "expand_ratio"):
        size = getattr(shape, name, 0)
        if size and not hasattr(shape, "num_heads") and isinstance(size, int):
            yield f"hidden_size / {name}", hidden_size // size


def as_data(forecast: Forecast) -> dict[str, Any]:
    """For --json."""
    return {**asdict(forecast), "peak": {**asdict(forecast.peak), "total": forecast.peak.total}}
