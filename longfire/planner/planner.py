"""`longfire plan`: what a run will hold, send and take on devices that are not here, and which
plans would do better.

A plan is chosen degrees, recomputation and rows; `Planner.forecast` says what it costs one process:
bytes from planner/memory.py, seconds from parallel/cost.py. docs/planning.md has every formula
once.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import product
from math import log

import torch
from torch import nn

from longfire.config.model_config import TransformersConfig
from longfire.config.run import Run
from longfire.config.settings import Parallelism, Remat
from longfire.errors import SettingsError
from longfire.mlps import auxiliary
from longfire.model import on_meta
from longfire.optim import rule_of, updates_of
from longfire.parallel import context, cost, stages, strategy, tensor
from longfire.parallel.axes import AXES
from longfire.parallel.context_cost import (
    BYTES,
    AttentionHeads,
    CommunicationCost,
    LayerTraffic,
    Workload,
    tokens_here,
)
from longfire.parallel.cost import Device
from longfire.parallel.pipeline import costs
from longfire.parallel.plan import reshards
from longfire.parallel.strategy import Ranked
from longfire.planner.forecast import Collective, Forecast, Moment, Plan
from longfire.planner.holding import NOTHING, FSDPMemory, Group, Shards
from longfire.planner.memory import EMBED, HEAD, MASTER_BYTES, Keeping, Meter, Part, ends_of

REMATS: tuple[Remat, ...] = ("none", "mlp", "attention", "attention+mlp", "block")
MIXER_AGAIN = (
    "attention",
    "attention+mlp",
    "block",
)  # of those, what runs the mixer's forward once more
MLP_AGAIN = ("mlp", "attention+mlp")
REGIONS_AGAIN = {"none": 0, "mlp": 1, "attention": 1, "attention+mlp": 2, "block": 2}
MOST_STAGES = 16  # pipelines that alternatives try
# of a row on a process, in alternatives: shorter pieces are better shared as rows, or not at all
LEAST_TOKENS = 8192
MEASURED_TOKENS = 8192  # longer rows are read off a straight line through these and half of them
LABELS = 3 * 8  # bytes of a token's id, label and position


class Planner:
    """Forecasts of a run on devices of one kind; as many as the run was composed for. Raises
    SettingsError for what cannot be planned.

    as_cuda: false for a CPU, which bench/planner.py measures.
    """

    def __init__(self, run: Run, device: Device, dtype: str = "", as_cuda: bool = True) -> None:
        model_config = run.known_model_config
        if isinstance(model_config, TransformersConfig):
            raise SettingsError(
                "model.backend = 'transformers' knows nothing of the model's inside, which "
                "`longfire plan` counts; set it to longfire"
            )
        self.run = run
        self.device = device
        self.as_cuda = as_cuda
        self.processes = run.world.size
        self.seq_len = run.training.seq_len
        self.rows = run.sequences_per_step
        self.tokens = run.tokens_per_step
        self.model_config = model_config.with_vocabulary(run.vocab_size)
        self.rule = rule_of(run.optimizer)
        self.dtype = dtype or ("float32" if run.model.compute_dtype == "float32" else "bfloat16")
        self.model = on_meta(self.model_config, getattr(torch, self.dtype))
        self.flops_of: list[dict[str, float]] = []
        for block in self.model.layers:
            mixer = block.mixer.flops_per_token(self.seq_len)
            self.flops_of.append({"mixer": mixer, "block": block.flops_per_token(self.seq_len)})
        self.costs = costs(self.model, self.seq_len)
        self.flops_of_head = self.costs[-1]
        self.meters: dict[tuple[int, int], Meter] = {}
        self.groups: dict[tuple[int, int], dict[int | str, Group]] = {}
        self.layouts: dict[int, list[list[int]]] = {}
        self.exchanged: dict[tuple, tuple[CommunicationCost, ...]] = {}
        self.lines: dict[tuple, Part] = {}

    def on(self, device: Device) -> "Planner":
        """The same run on other devices; what has been measured stays."""
        other = copy(self)
        other.device = device
        other.exchanged = {}
        return other

    def of_recipe(self) -> Plan:
        """The plan that the settings say. Raises SettingsError for one that cannot be."""
        run = self.run
        rows = self.rows // run.data_processes
        asked = run.parallelism.context_parallel_strategy
        plan = Plan(
            run.degrees["dp_replicate"],
            run.degrees["dp_shard"],
            run.degrees["cp"],
            run.degrees["tp"],
            run.degrees["pp"],
            remat=run.activation_checkpoint.mode,
            batch_size=rows // run.microbatches,
            microbatches=run.microbatches,
        )
        if plan.cp > 1:
            plan = replace(plan, layout=self.layout)
        problems = list(self.refusals(plan.tp, plan.here(self.seq_len)))
        if problems:
            raise SettingsError("\n".join(problems))
        if asked == "auto":
            return self.with_strategy(plan)
        refused = {strategy.refusal(asked, heads, plan.cp) for heads in self.softmax(plan)}
        if refused - {""}:
            raise SettingsError("\n".join(sorted(refused - {""})))
        return replace(plan, strategy=asked)

    def refusals(self, tp: int, tokens: int) -> Iterator[str]:
        """Why processes cannot share this model's matrices so. (Run.compose has looked at the
        recipe's own pipeline.)"""
        return tensor.refusals(self.model, tp, self.run.parallelism.sequence_parallel, tokens)

    def meter(self, tp: int, seq_len: int) -> Meter:
        """Of the share that one of `tp` processes has."""
        if (tp, seq_len) not in self.meters:
            self.meters[tp, seq_len] = Meter(
                self.model,
                seq_len,
                self.run.training.loss_chunk_tokens,
                self.as_cuda,
                tp,
                self.run.parallelism.sequence_parallel,
                Keeping(
                    self.run.attention,
                    self.run.activation_checkpoint,
                    self.run.training.mlp_chunk_size,
                ),
            )
        return self.meters[tp, seq_len]

    # Rows that processes share

    @property
    def layout(self) -> str:
        """Of rows that are shared, as the run cuts them."""
        softmax = any("attention" in block.mixer.context for block in self.model.layers)
        return context.layout_kind(
            self.run.parallelism.context_parallel_layout, softmax, self.run.data.varlen
        )

    def crossings(self, tp: int) -> list[LayerTraffic]:
        return self.meter(tp, min(self.seq_len, MEASURED_TOKENS)).crossings

    def softmax(self, plan: Plan) -> list[AttentionHeads]:
        """Of every softmax layer, what lies in one process."""
        found: list[AttentionHeads] = []
        for crossing in self.crossings(plan.tp):
            for heads in crossing.attends:
                found.append(heads)
        return found

    def cut(self, plan: Plan, seq_len: int = 0) -> Workload:
        again = int(plan.remat in MIXER_AGAIN)
        return Workload(
            seq_len or self.seq_len,
            plan.batch_size,
            plan.cp,
            plan.layout,
            self.dtype,
            plan.tp,
            again,
        )

    def strategies(self, plan: Plan) -> list[Ranked]:
        """The ways of the plan's softmax layers, best first; empty where rows are whole. What fits
        is told by what must lie there in any case: parameters, gradients, moments, and what enters
        the blocks that are recomputed, or all that they keep."""
        if plan.cp == 1:
            return []
        groups = self.groups_of(plan.tp, plan.shards)
        names = self.names_of(plan, 0)
        masters = 2 * MASTER_BYTES * sum(groups[name].shard for name in names)
        state = sum(groups[name].state for name in names)
        room = self.device.usable_bytes - masters - state
        stream = (
            plan.batch_size
            * plan.here(self.seq_len)
            * self.model_config.hidden_size
            * BYTES[self.dtype]
        )
        return strategy.rank_strategies(
            self.softmax(plan), self.cut(plan), self.device, room - len(names) * stream
        )

    def with_strategy(self, plan: Plan) -> Plan:
        """The same with the best strategy."""
        ranked = self.strategies(plan)
        if ranked:
            return replace(plan, strategy=ranked[0].strategy)
        return plan

    def exchanges(
        self, plan: Plan, name: int | str, seq_len: int = 0
    ) -> tuple[CommunicationCost, ...]:
        """Of a part, for one microbatch."""
        if plan.cp == 1 or isinstance(name, str):
            return ()
        key = self.crossings(plan.tp)[name], plan.strategy, self.cut(plan, seq_len)
        if key not in self.exchanged:
            self.exchanged[key] = tuple(strategy.exchanges(*key, self.device))
        return self.exchanged[key]

    # Memory

    def part(self, plan: Plan, name: int | str, here: int) -> Part:
        """What one process runs of a part, `here` tokens of each row. Rows of another length than
        the recipe's, and long ones, are read off a straight line, several of them as one: what
        holds a number for each token grows so."""
        if here <= MEASURED_TOKENS and here == plan.here(self.seq_len):
            return self.meter(plan.tp, here).part(name, plan.remat, plan.batch_size)
        short = min(MEASURED_TOKENS // 2, self.seq_len)
        which = name if isinstance(name, str) else self.meter(plan.tp, short).kind_of[name]
        key = plan.tp, which, plan.remat, plan.batch_size * here
        if key not in self.lines:
            one = self.meter(plan.tp, short).part(which, plan.remat, 1)
            two = self.meter(plan.tp, (2 * short)).part(which, plan.remat, 1)
            self.lines[key] = Part.of_rows(one, two, plan.batch_size * here / short)
        return self.lines[key]

    def groups_of(self, tp: int, shards: int) -> dict[int | str, Group]:
        """What is gathered together, of one process of `tp` x `shards`: blocks by number, the two
        ends by name."""
        if (tp, shards) not in self.groups:
            model = self.meter(tp, min(self.seq_len, MEASURED_TOKENS)).model
            parts: dict[int | str, nn.Module] = dict(enumerate(model.layers))
            parts.update(ends_of(model))
            updates = updates_of(model, self.rule)
            groups: dict[int | str, Group] = {}
            for name, part in parts.items():
                groups[name] = Group.of(part, shards, updates)
            self.groups[tp, shards] = groups
        return self.groups[tp, shards]

    def layers_of(self, pp: int) -> list[list[int]]:
        """The layers of each process of a pipeline."""
        if pp not in self.layouts:
            # named split points and orders in files are those of the recipe's own degree
            schedule = self.plain_schedule
            if pp == self.run.degrees["pp"]:
                schedule = self.run.parallelism
            placed = stages.layout(self.costs, pp, schedule)
            self.layouts[pp] = []
            for process in range(pp):
                layers: list[int] = []
                for stage in placed.on(process):
                    layers += placed.layers[stage]
                self.layouts[pp].append(layers)
        return self.layouts[pp]

    @property
    def plain_schedule(self) -> Parallelism:
        return replace(
            self.run.parallelism,
            pipeline_parallel_schedule_csv="",
            pipeline_parallel_split_points=(),
        )

    def names_of(self, plan: Plan, process: int) -> list[int | str]:
        """The parts of a process along pp, in the order in which a microbatch meets them. (Where
        stages lie in a V, the first process has the head as well.)"""
        v_shaped = self.run.parallelism.pipeline_parallel_schedule in stages.V_SHAPED
        last = 0 if v_shaped else plan.pp - 1
        names: list[int | str] = [*self.layers_of(plan.pp)[process]]
        if process == 0:
            names.insert(0, EMBED)
        if process == last:
            names.append(HEAD)
        return names

    def peak(self, plan: Plan, seq_len: int = 0) -> Moment:
        """The fullest moment of the fullest process."""
        moments: list[Moment] = []
        for process in range(plan.pp):
            moments += self.moments(plan, process, seq_len or self.seq_len)
        return max(moments, key=lambda moment: moment.total)

    def moments(self, plan: Plan, process: int, seq_len: int) -> Iterator[Moment]:
        """What a process along pp holds in a step that is not the first, moment by moment."""
        run = self.run
        names = self.names_of(plan, process)
        here = plan.here(seq_len)
        groups = self.groups_of(plan.tp, plan.shards)
        tied = self.model_config.tie_word_embeddings and EMBED in names
        group = {name: groups[name] for name in names}
        if tied and HEAD in group:
            group[HEAD] = NOTHING
        shards = Shards(plan, run.parallelism, names, group)
        parts: dict[int | str, Part] = {}
        cuts: dict[int | str, FSDPMemory] = {}
        for name in names:
            parts[name] = self.part(plan, name, here)
            exchanges = self.exchanges(plan, name, seq_len)
            cuts[name] = FSDPMemory.of(exchanges, again=plan.remat in MIXER_AGAIN)
        on_device = not run.parallelism.cpu_offload
        lying = MASTER_BYTES * sum(g.shard for g in group.values()) * on_device
        state = sum(g.state for g in group.values()) * on_device
        chunk = min(plan.batch_size * here, run.training.loss_chunk_tokens)
        logits = 4 * chunk * -(-self.model_config.vocab_size // plan.tp)

        def moment(where: str, gradients: float, activations: float, gathered: float) -> Moment:
            seen = min(logits, activations) if where.endswith(HEAD) else 0
            return Moment(where, lying, gradients, state, activations - seen, gathered, seen)

        schedule = run.parallelism.pipeline_parallel_schedule
        others = cost.in_flight(process, plan.pp, plan.microbatches, schedule) - 1
        passes = 0.0
        if plan.pp > 1:
            # received from one stage and given to the next
            passes = 2 * max(part.passed for part in parts.values())
        keeps = {name: parts[name].kept + cuts[name].kept for name in names}
        kept = others * (passes + sum(keeps.values()))
        kept += passes + LABELS * plan.batch_size * plan.microbatches * here
        gradients = shards.gradients_before
        for name in names:
            peak = parts[name].forward_peak + cuts[name].forward
            yield moment(
                f"forward of {describe(name)}", gradients, kept + peak, shards.forward(name)
            )
            kept += keeps[name]
        for name in reversed(names):
            kept -= keeps[name]
            peak = parts[name].backward_peak(further=shards.accumulates) + cuts[name].backward
            yield moment(
                f"backward of {describe(name)}", gradients, kept + peak, shards.backward(name)
            )
            yield moment(
                f"gradients of {describe(name)}",
                gradients,
                kept + parts[name].passed,
                shards.reduction(name),
            )
            gradients += shards.gradient(name)
        temporary = sum(g.temporary for g in group.values()) * on_device
        yield moment("optimizer", lying, temporary, shards.always)

    def largest(self, measure: Callable[[int], float], least: int = 1) -> int:
        """The largest number, a multiple of `least`, whose bytes fit; 0 if none. The bytes grow
        with the number."""
        if measure(least) > self.device.usable_bytes:
            return 0
        low = 1
        high = 2
        while measure(high * least) <= self.device.usable_bytes and high < 2**24:
            low = high
            high = 2 * high
        while high - low > max(1, low // 512):
            middle = (low + high) // 2
            if measure(middle * least) <= self.device.usable_bytes:
                low = middle
            else:
                high = middle
        return low * least

    def largest_batch_size(self, plan: Plan) -> int:
        return self.largest(lambda rows: self.peak(replace(plan, batch_size=rows)).total)

    def largest_seq_len(self, plan: Plan) -> int:
        step = plan.tp * plan.cp * (64 if self.seq_len >= 64 else 1)
        return self.largest(lambda tokens: self.peak(plan, tokens).total, step)

    # Time

    def collectives(self, plan: Plan) -> Iterator[Collective]:
        """What a process with the most layers sends in a step."""
        settings = self.run.parallelism
        groups = self.groups_of(plan.tp, plan.shards)
        names = max((self.names_of(plan, process) for process in range(plan.pp)), key=len)
        tied = self.model_config.tie_word_embeddings
        numbers = sum(groups[name].whole for name in names if not (tied and name == HEAD))
        row_bytes = (
            plan.batch_size
            * plan.here(self.seq_len)
            * self.model_config.hidden_size
            * BYTES[self.dtype]
        )
        across = "dp_shard x cp"
        if plan.cp == 1:
            across = "dp_shard"
        elif plan.dp_shard == 1:
            across = "cp"

        def over(axis: str, what: str, inner: int, sent: float, hidden: str = "") -> Collective:
            size = plan.shards if axis == across else getattr(plan, axis)
            return Collective(
                axis, what, size, sent, sent / cost.bandwidth(self.device, size, inner), hidden
            )

        if plan.tp > 1:
            again = REGIONS_AGAIN[plan.remat]
            if self.run.training.mlp_chunk_size > 0 and plan.remat not in MLP_AGAIN:
                again += 1
            # in and out of each region, and back
            times = sum(2 if isinstance(name, str) else 4 + again for name in names)
            if settings.sequence_parallel:
                what = "rows: all-gather, reduce-scatter"
            else:
                what = "rows: all-reduce"
            yield over(
                "tp",
                what,
                1,
                plan.microbatches * times * cost.reduced_bytes(row_bytes, plan.tp) / 2,
            )
        yield from self.over_cuts(plan, names)
        if plan.shards > 1:
            each = 2 if settings.param_gather_dtype == "bfloat16" else 4
            gathers = 2 * plan.microbatches if reshards(settings, plan.pp, plan.shards) else 1
            sent = gathers * cost.gathered_bytes(each * numbers, plan.shards)
            yield over(across, "parameters: all-gather", plan.tp, sent, "compute")
            scatters = 1 if plan.pp > 1 else plan.microbatches
            sent = scatters * cost.gathered_bytes(MASTER_BYTES * numbers, plan.shards)
            yield over(across, "gradients: reduce-scatter", plan.tp, sent, "compute")
        if plan.dp_replicate > 1:
            sent = cost.reduced_bytes(MASTER_BYTES * numbers / plan.shards, plan.dp_replicate)
            yield over(
                "dp_replicate",
                "gradients: all-reduce",
                plan.tp * plan.shards,
                sent,
                "last backward",
            )
        if plan.pp > 1:
            each = stages.STAGES_EACH.get(settings.pipeline_parallel_schedule, 1)
            sent = 2 * each * plan.microbatches * row_bytes
            if settings.sequence_parallel:
                sent /= plan.tp
            yield over(
                "pp",
                "rows: to the next stage and back",
                plan.tp * plan.cp * plan.data,
                sent,
                "compute",
            )

    def over_cuts(self, plan: Plan, names: Sequence[int | str]) -> Iterator[Collective]:
        """What layers send to those who hold other pieces of their rows, kind by kind."""
        kinds: dict[str, list[CommunicationCost]] = {}
        for name in names:
            for one in self.exchanges(plan, name):
                kinds.setdefault(one.what, []).append(one)
        for what, ones in kinds.items():
            sent = plan.microbatches * sum(one.bytes for one in ones)
            seconds = plan.microbatches * sum(one.seconds for one in ones)
            hidden = ones[0].hidden_by
            waits = 0.0
            if hidden:
                waits = plan.microbatches * sum(one.waits for one in ones)
            yield Collective("cp", what, plan.cp, sent, seconds, hidden, waits)

    def parts_of_step(self, plan: Plan, collectives: Sequence[Collective]) -> dict[str, float]:
        """Seconds of a step: what is computed, what of the network is not hidden behind it, idle
        stages, the optimizer."""
        flops = [self.flops_on(plan, process) for process in range(plan.pp)]
        compute = cost.compute_seconds(
            max(flops) * self.tokens / plan.data / plan.cp / plan.tp, self.device, self.dtype
        )
        uneven = plan.microbatches * max(self.uneven_seconds(plan, p) for p in range(plan.pp))
        waited = sum(c.seconds for c in collectives if c.hidden == "")
        behind = sum(c.seconds for c in collectives if c.hidden == "compute")
        behind_last = sum(c.seconds for c in collectives if c.hidden == "last backward")
        waited += sum(c.waits for c in collectives)
        network = waited + max(0.0, behind - compute - waited)
        network += max(0.0, behind_last - compute * 2 / 3 / plan.microbatches)
        idle = cost.bubble(
            plan.pp, plan.microbatches, self.run.parallelism.pipeline_parallel_schedule
        )
        groups = self.groups_of(plan.tp, plan.shards)
        numbers = 0.0
        for process in range(plan.pp):
            here = sum(groups[name].shard for name in self.names_of(plan, process))
            numbers = max(numbers, here)
        return {
            "compute": compute,
            "uneven rows": uneven,
            "network": network,
            "pipeline bubble": (compute + uneven + network) * idle / (1 - idle),
            "optimizer": cost.optimizer_seconds(
                numbers, self.device, self.run.parallelism.cpu_offload
            ),
        }

    def uneven_seconds(self, plan: Plan, process: int) -> float:
        """What a process along pp waits for in a micro-batch, where context parallelism gives
        processes unequal work."""
        seconds = 0.0
        for name in self.names_of(plan, process):
            seconds += sum(one.uneven for one in self.exchanges(plan, name))
        return seconds

    def flops_on(self, plan: Plan, process: int) -> float:
        """FLOPs a token of a process along pp, forward, backward and again, of all that share its
        matrices."""
        total = 0.0
        for name in self.names_of(plan, process):
            if name == HEAD:
                total += 3 * self.flops_of_head
            elif isinstance(name, int):
                mixer = self.flops_of[name]["mixer"]
                block = self.flops_of[name]["block"]
                total += 3 * block + self.flops_again(plan.remat, mixer, block - mixer)
        return total

    def flops_again(self, remat: Remat, mixer: float, mlp: float) -> float:
        """FLOPs a token that a block recomputes; MLPs in chunks are recomputed by
        themselves. A policy that keeps matrix products leaves nothing that counts, one that names
        operations is counted as if it kept nothing."""
        kept = "matmuls" in self.run.activation_checkpoint.policy
        parts = {
            "none": 0.0,
            "attention": mixer,
            "mlp": mlp,
            "attention+mlp": mixer + mlp,
            "block": mixer + mlp,
        }
        flops = 0.0
        if not kept:
            flops += parts[remat]
        if self.run.training.mlp_chunk_size > 0 and remat not in MLP_AGAIN:
            flops += mlp
        return flops

    def forecast(self, plan: Plan) -> Forecast:
        """Everything about one plan but the largest batch and length, which `with_largest` adds."""
        peak = self.peak(plan)
        collectives = tuple(self.collectives(plan))
        parts = self.parts_of_step(plan, collectives)
        seconds = sum(parts.values())
        fits = peak.total <= self.device.usable_bytes
        of_blocks = sum(flops["block"] for flops in self.flops_of)
        flops = 3 * self.tokens * (of_blocks + self.flops_of_head)
        computed = self.tokens * sum(self.flops_on(plan, process) for process in range(plan.pp))
        hours = self.run.steps * seconds / 3600
        return Forecast(
            plan,
            peak,
            fits,
            seconds,
            parts,
            collectives,
            flops,
            computed - flops,
            self.tokens / seconds,
            flops / seconds / self.processes / self.device.flops[self.dtype],
            hours / 24,
            hours * self.processes,
            max(parts, key=parts.__getitem__) if fits else "memory",
        )

    def with_largest(self, forecast: Forecast) -> Forecast:
        plan = forecast.plan
        return replace(
            forecast,
            largest={
                "batch_size": self.largest_batch_size(plan),
                "seq_len": self.largest_seq_len(plan),
            },
        )

    # Alternatives

    def candidates(self) -> Iterator[Plan]:
        """Every plan on these processes with the recipe's rows a step: matrices shared inside a
        node, pipelines of at most MOST_STAGES processes, pieces of rows of at least LEAST_TOKENS
        (or as the recipe cuts them)."""
        for tp, cp in product(divisors(self.processes, self.device.node), self.degrees_of_rows()):
            layout = self.layout if cp > 1 else "contiguous"
            here = tokens_here(self.seq_len, cp, layout)
            if self.processes % (tp * cp) or any(self.refusals(tp, here)):
                continue
            for pp in divisors(self.processes // tp // cp, MOST_STAGES):
                data = self.processes // tp // cp // pp
                if self.rows % data:
                    continue
                for shards, rows, remat in product(
                    divisors(data), divisors(self.rows // data), REMATS
                ):
                    plan = Plan(
                        data // shards,
                        shards,
                        cp,
                        tp,
                        pp,
                        remat,
                        rows,
                        self.rows // data // rows,
                        layout=layout,
                    )
                    if self.can_be(plan):
                        yield self.with_strategy(plan)

    def degrees_of_rows(self) -> list[int]:
        """How many processes may share a row."""
        most = max(1, self.seq_len // LEAST_TOKENS)
        return sorted({*divisors(self.processes, most), self.run.degrees["cp"]})

    def can_be(self, plan: Plan) -> bool:
        if plan.remat in ("mlp", "attention+mlp") and not self.model_config.has_mlps:
            return False
        if max(plan.tp, plan.cp, plan.pp) > 1 and any(
            auxiliary.refusals(self.model_config, {"": ""})
        ):
            return False
        degrees = zip(AXES, plan.mesh)
        if any(degree > 1 and axis not in self.rule.proven_axes for axis, degree in degrees):
            return False
        schedule = self.plain_schedule
        return plan.pp == 1 or not any(
            stages.refusals(self.model_config, plan.pp, schedule, plan.microbatches)
        )

    def alternatives(self, count: int = 8) -> list[Forecast]:
        """The best plan of each mesh, fastest first; among those within a hundredth the one that
        holds least."""
        best: dict[tuple, Forecast] = {}
        for plan in self.candidates():
            forecast = self.forecast(plan)
            known = best.get(plan.mesh)
            if forecast.fits and (known is None or rank_of(forecast) < rank_of(known)):
                best[plan.mesh] = forecast
        return sorted(best.values(), key=rank_of)[:count]


def rank_of(forecast: Forecast) -> tuple[float, float]:
    """Seconds to a hundredth of themselves, then bytes."""
    return round(log(forecast.seconds) * 100), forecast.peak.total


def describe(name: int | str) -> str:
    if isinstance(name, str):
        return name
    return f"layer {name}"


def divisors(number: int, most: int | None = None) -> list[int]:
    found: list[int] = []
    for d in range(1, min(number, most or number) + 1):
        if number % d == 0:
            found.append(d)
    return found
