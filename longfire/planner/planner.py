"""`longfire plan`: what a run will hold, send and take on devices that are not here, and which
plans would do better.

A plan is chosen degrees, recomputation and sequences; `Planner.forecast` says what it costs one
process: bytes from planner/peak.py, seconds from planner/step_time.py. docs/planning.md has every
formula once.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import log

from longfire.config.rules.model import LANGUAGE_MODELING
from longfire.errors import SettingsError
from longfire.mlps import auxiliary
from longfire.parallel import stages, strategy
from longfire.parallel.axes import AXES
from longfire.parallel.context_cost import tokens_here
from longfire.planner.forecast import REMATS, Collective, Forecast, Moment, Plan
from longfire.planner.measured_run import MeasuredRun
from longfire.planner.peak import ProcessMemory, fullest_moment, largest, most_on_host
from longfire.planner.step_time import StepCommunication, flops_on, parts_of_step
from longfire.tasks.table import task_named

MOST_STAGES = 16  # pipelines that alternatives try
# Of a sequence on a process, in alternatives: shorter pieces are better shared as sequences, or not
# at all.
LEAST_TOKENS = 8192


class Planner(MeasuredRun):
    """Forecasts of plans for one run."""

    def of_recipe(self) -> Plan:
        """The plan of the settings. Raises SettingsError for one that is impossible."""
        run = self.run
        sequences = self.sequences // run.data_processes
        asked = run.parallelism.context_parallel_strategy
        plan = Plan(
            run.degrees["dp_replicate"],
            run.degrees["dp_shard"],
            run.degrees["cp"],
            run.degrees["tp"],
            run.degrees["pp"],
            remat=run.activation_checkpoint.mode,
            batch_size=sequences // run.microbatches,
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
        refused.discard("")
        if refused:
            raise SettingsError("\n".join(sorted(refused)))
        return replace(plan, strategy=asked)

    # Memory

    def peak(self, plan: Plan, seq_len: int = 0) -> Moment:
        """The fullest moment of the fullest process. seq_len: 0 for the recipe's."""
        return fullest_moment(self.memories(plan, seq_len))

    def memories(self, plan: Plan, seq_len: int = 0) -> list[ProcessMemory]:
        """What each process along pp holds. seq_len: 0 for the recipe's."""
        found: list[ProcessMemory] = []
        for process in range(plan.pp):
            found.append(ProcessMemory(self, plan, process, seq_len or self.seq_len))
        return found

    def filled(self, plan: Plan, seq_len: int = 0) -> float:
        """The share of the memory that is taken, of the device or of the host, whichever is
        fuller."""
        memories = self.memories(plan, seq_len)
        of_device = fullest_moment(memories).total / self.device.usable_bytes
        return max(of_device, most_on_host(memories) / self.device.host_bytes)

    def largest_batch_size(self, plan: Plan) -> int:
        """The most sequences of a micro-batch that fit."""

        def filled(batch_size: int) -> float:
            return self.filled(replace(plan, batch_size=batch_size))

        return largest(filled, 1.0)

    def largest_seq_len(self, plan: Plan) -> int:
        """The longest sequence that fits, in tokens; of images, whose tokens are given, these."""
        if self.model_config.image_size:
            return self.seq_len

        def filled(seq_len: int) -> float:
            return self.filled(plan, seq_len)

        step = plan.tp * plan.cp
        if self.seq_len >= 64:
            step *= 64
        return largest(filled, 1.0, step)

    # Forecasts

    def collectives(self, plan: Plan) -> Iterator[Collective]:
        """What a process with the most layers sends in a step."""
        return StepCommunication(self, plan).collectives()

    def forecast(self, plan: Plan) -> Forecast:
        """Everything about one plan but the largest batch and length, which `with_largest` adds."""
        memories = self.memories(plan)
        peak = fullest_moment(memories)
        collectives = tuple(self.collectives(plan))
        parts = parts_of_step(self, plan, collectives)
        seconds = sum(parts.values())
        host_bytes = most_on_host(memories)
        fits_on_host = host_bytes <= self.device.host_bytes
        fits_on_device = peak.total <= self.device.usable_bytes
        of_blocks = sum(flops["block"] for flops in self.flops_of)
        flops = 3 * self.tokens * (of_blocks + self.flops_of_head)
        computed = self.tokens * sum(flops_on(self, plan, process) for process in range(plan.pp))
        hours = self.run.steps * seconds / 3600
        if not fits_on_device:
            binds = "memory"
        elif not fits_on_host:
            binds = "host memory"
        else:
            binds = max(parts, key=parts.__getitem__)
        return Forecast(
            plan=plan,
            peak=peak,
            host_bytes=host_bytes,
            fits=fits_on_device and fits_on_host,
            seconds=seconds,
            parts=parts,
            collectives=collectives,
            flops=flops,
            flops_again=computed - flops,
            tokens_per_second=self.tokens / seconds,
            mfu=flops / seconds / self.processes / self.device.flops[self.dtype],
            days=hours / 24,
            device_hours=hours * self.processes,
            binds=binds,
        )

    def with_largest(self, forecast: Forecast) -> Forecast:
        """The same with the largest batch and length that fit."""
        sizes = {
            "batch_size": self.largest_batch_size(forecast.plan),
            "seq_len": self.largest_seq_len(forecast.plan),
        }
        return replace(forecast, largest=sizes)

    # Alternatives

    def candidates(self) -> Iterator[Plan]:
        """Every plan on these processes with the recipe's sequences a step: matrices shared inside
        a node, pipelines of at most MOST_STAGES processes, pieces of sequences of at least
        LEAST_TOKENS (or as the recipe cuts them)."""
        for tp, cp in product(divisors(self.processes, self.device.node), self.cp_degrees()):
            layout = self.layout if cp > 1 else "contiguous"
            here = tokens_here(self.seq_len, cp, layout)
            if self.processes % (tp * cp) or any(self.refusals(tp, here)):
                continue
            for pp in divisors(self.processes // tp // cp, MOST_STAGES):
                yield from self.candidates_on(tp, cp, pp, layout)

    def candidates_on(
        self,
        tp: int,
        cp: int,
        pp: int,
        layout: str,
    ) -> Iterator[Plan]:
        """Those with these degrees; the rest of the processes is data-parallel."""
        data = self.processes // tp // cp // pp
        if self.sequences % data:
            return
        sequences = self.sequences // data
        for shards, batch_size, remat in product(divisors(data), divisors(sequences), REMATS):
            plan = Plan(
                data // shards,
                shards,
                cp,
                tp,
                pp,
                remat,
                batch_size,
                sequences // batch_size,
                layout=layout,
            )
            if self.is_possible(plan):
                yield self.with_strategy(plan)

    def cp_degrees(self) -> list[int]:
        """How many processes may share a sequence."""
        most = max(1, self.seq_len // LEAST_TOKENS)
        return sorted({*divisors(self.processes, most), self.run.degrees["cp"]})

    def is_possible(self, plan: Plan) -> bool:
        """Whether the model and its optimizer can be run so."""
        if plan.remat in ("mlp", "attention+mlp") and not self.model_config.has_mlps:
            return False
        shared = max(plan.tp, plan.cp, plan.pp) > 1
        if shared and any(auxiliary.refusals(self.model_config, {"": ""})):
            return False
        task_axes = frozenset(AXES)
        if self.run.job.task != LANGUAGE_MODELING:
            task_axes = task_named(self.run.job.task).proven_axes
        for axis, degree in zip(AXES, plan.mesh):
            if degree > 1 and axis not in self.rule.proven_axes & task_axes:
                return False
        if plan.pp == 1:
            return True
        if self.teacher is not None:
            return False
        refusals = stages.refusals(
            self.model_config,
            plan.pp,
            self.plain_schedule,
            plan.microbatches,
        )
        return not any(refusals)

    def alternatives(self, count: int = 8) -> list[Forecast]:
        """The best plan of each mesh, fastest first; among those within a hundredth the one that
        holds least."""
        best: dict[tuple[int, ...], Forecast] = {}
        for plan in self.candidates():
            forecast = self.forecast(plan)
            if not forecast.fits:
                continue
            known = best.get(plan.mesh)
            if known is None or rank_of(forecast) < rank_of(known):
                best[plan.mesh] = forecast
        return sorted(best.values(), key=rank_of)[:count]


def rank_of(forecast: Forecast) -> tuple[float, float]:
    """Seconds to a hundredth of themselves, then bytes."""
    return round(log(forecast.seconds) * 100), forecast.peak.total


def divisors(number: int, most: int | None = None) -> list[int]:
    """In order, up to `most`."""
    found: list[int] = []
    for d in range(1, min(number, most or number) + 1):
        if number % d == 0:
            found.append(d)
    return found
