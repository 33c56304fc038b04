"""How long a step of a plan takes: what is computed, what is sent and not hidden behind it, idle
pipeline stages, the optimizer. parallel/cost.py has the formulas."""

from collections.abc import Iterator, Sequence

from longfire.config.settings import Parallelism, Remat
from longfire.parallel import cost, stages
from longfire.parallel.context_cost import CommunicationCost
from longfire.parallel.plan import reshards
from longfire.planner.forecast import MLP_AGAIN, Collective, Plan
from longfire.planner.measured_run import MeasuredRun
from longfire.planner.part import HEAD, MASTER_BYTES

# Recomputed regions of a block between whose matrices tensor-parallel processes communicate.
REGIONS_AGAIN = {
    "none": 0,
    "mlp": 1,
    "attention": 1,
    "attention+mlp": 2,
    "block": 2,
}


class StepCommunication:
    """What a process with the most layers sends in a step of a plan."""

    def __init__(self, measured: MeasuredRun, plan: Plan) -> None:
        self.measured = measured
        self.plan = plan
        self.settings = measured.run.parallelism
        self.names: list[int | str] = []
        for process in range(plan.pp):
            names = measured.names_of(plan, process)
            if len(names) > len(self.names):
                self.names = names
        self.stream_bytes = measured.stream_bytes(plan)
        self.sharding_axis = "dp_shard x cp"
        if plan.cp == 1:
            self.sharding_axis = "dp_shard"
        elif plan.dp_shard == 1:
            self.sharding_axis = "cp"

    def collectives(self) -> Iterator[Collective]:
        """All of it, axis by axis."""
        yield from self.tensor_parallel()
        yield from self.context_parallel()
        yield from self.fully_sharded()
        yield from self.replicated()
        yield from self.pipeline_parallel()

    def over(
        self,
        axis: str,
        what: str,
        inner: int,
        sent: float,
        hidden: str = "",
    ) -> Collective:
        """So many bytes over one axis, whose processes are `inner` ranks apart."""
        if axis == self.sharding_axis:
            size = self.plan.shards
        else:
            size = getattr(self.plan, axis)
        seconds = sent / cost.bandwidth(self.measured.device, size, inner)
        return Collective(axis, what, size, sent, seconds, hidden)

    def numbers(self) -> int:
        """Parameters of this process's share of matrices; those that are tied once."""
        tied = self.measured.model_config.tie_word_embeddings
        groups = self.measured.groups_of(self.plan.tp, self.plan.shards)
        total = 0
        for name in self.names:
            if not (tied and name == HEAD):
                total += groups[name].whole
        return total

    def tensor_parallel(self) -> Iterator[Collective]:
        """Activations between the matrices that processes share."""
        plan = self.plan
        if plan.tp == 1:
            return
        in_chunks = self.measured.run.training.mlp_chunk_size > 0
        times = 0
        for name in self.names:
            remat = self.measured.remat_of(plan, name)
            again = REGIONS_AGAIN[remat] + int(in_chunks and remat not in MLP_AGAIN)
            # in and out of each region, and back
            times += 2 if isinstance(name, str) else 4 + again
        what = "rows: all-reduce"
        if self.settings.sequence_parallel:
            what = "rows: all-gather, reduce-scatter"
        sent = plan.microbatches * times * cost.reduced_bytes(self.stream_bytes, plan.tp) / 2
        yield self.over("tp", what, 1, sent)

    def context_parallel(self) -> Iterator[Collective]:
        """What layers send to those who hold other pieces of their sequences, kind by kind."""
        plan = self.plan
        kinds: dict[str, list[CommunicationCost]] = {}
        for name in self.names:
            for one in self.measured.exchanges(plan, name):
                kinds.setdefault(one.what, []).append(one)
        for what, ones in kinds.items():
            hidden = ones[0].hidden_by
            waits = 0.0
            if hidden:
                waits = plan.microbatches * sum(one.waits for one in ones)
            yield Collective(
                "cp",
                what,
                plan.cp,
                plan.microbatches * sum(one.bytes for one in ones),
                plan.microbatches * sum(one.seconds for one in ones),
                hidden,
                waits,
            )

    def fully_sharded(self) -> Iterator[Collective]:
        """Parameters to where they are used, and gradients to where they are updated."""
        plan = self.plan
        if plan.shards == 1:
            return
        numbers = self.numbers()
        each = self.measured.sent_bytes(plan)
        gathers = gatherings(self.settings, plan)
        sent = gathers * cost.gathered_bytes(each * numbers, plan.shards)
        yield self.over(
            self.sharding_axis,
            "parameters: all-gather",
            plan.tp,
            sent,
            "compute",
        )
        of_teacher = self.measured.teacher_cost(plan)
        if of_teacher.parameters:
            whole = of_teacher.ends + plan.microbatches * of_teacher.blocks
            yield self.over(
                self.sharding_axis,
                "teacher: all-gather",
                plan.tp,
                cost.gathered_bytes(whole, plan.shards),
                "compute",
            )
        scatters = 1 if plan.pp > 1 else plan.microbatches
        sent = scatters * cost.gathered_bytes(MASTER_BYTES * numbers, plan.shards)
        yield self.over(
            self.sharding_axis,
            "gradients: reduce-scatter",
            plan.tp,
            sent,
            "compute",
        )

    def replicated(self) -> Iterator[Collective]:
        """Gradients between the processes that have the same parameters."""
        plan = self.plan
        if plan.dp_replicate == 1:
            return
        shard_bytes = MASTER_BYTES * self.numbers() / plan.shards
        yield self.over(
            "dp_replicate",
            "gradients: all-reduce",
            plan.tp * plan.shards,
            cost.reduced_bytes(shard_bytes, plan.dp_replicate),
            "last backward",
        )

    def pipeline_parallel(self) -> Iterator[Collective]:
        """Activations and their gradients between stages."""
        plan = self.plan
        if plan.pp == 1:
            return
        each = stages.STAGES_EACH.get(self.settings.pipeline_parallel_schedule, 1)
        sent: float = 2 * each * plan.microbatches * self.stream_bytes
        if self.settings.sequence_parallel:
            sent /= plan.tp
        yield self.over(
            "pp",
            "rows: to the next stage and back",
            plan.tp * plan.cp * plan.data,
            sent,
            "compute",
        )


def parts_of_step(
    measured: MeasuredRun,
    plan: Plan,
    collectives: Sequence[Collective],
) -> dict[str, float]:
    """Seconds of a step: what is computed, what of the network is not hidden behind it, idle
    stages, the optimizer."""
    parallelism = measured.run.parallelism
    flops = max(flops_on(measured, plan, process) for process in range(plan.pp))
    flops += measured.teacher_cost(plan).flops
    compute = cost.compute_seconds(
        flops * measured.tokens / plan.data / plan.cp / plan.tp,
        measured.device,
        measured.dtype,
    )
    uneven = max(uneven_seconds(measured, plan, process) for process in range(plan.pp))
    uneven *= plan.microbatches
    network = network_seconds(plan, collectives, compute)
    idle = cost.bubble(plan.pp, plan.microbatches, parallelism.pipeline_parallel_schedule)
    return {
        "compute": compute,
        "uneven rows": uneven,
        "network": network,
        "pipeline bubble": (compute + uneven + network) * idle / (1 - idle),
        "activations to the host and back": offload_seconds(measured, plan, compute),
        "parameters from the host": parameter_copy_seconds(measured, plan, compute),
        "optimizer": cost.optimizer_seconds(
            most_numbers(measured, plan),
            measured.device,
            parallelism.cpu_offload,
        ),
    }


def offload_seconds(measured: MeasuredRun, plan: Plan, compute: float) -> float:
    """What a step waits for what blocks keep: it goes to the host beside the forward, a third of
    `compute` seconds, and comes back beside the backward."""
    slowest = 0.0
    for process in range(plan.pp):
        names = measured.names_of(plan, process)
        here = plan.here(measured.seq_len)
        kept = sum(measured.part(plan, name, here).kept_on_host for name in names)
        seconds_one_way = kept * plan.microbatches / cost.HOST_LINK
        waited = max(0.0, seconds_one_way - compute / 3)
        waited += max(0.0, seconds_one_way - compute * 2 / 3)
        slowest = max(slowest, waited)
    return slowest


def gatherings(parallelism: Parallelism, plan: Plan) -> int:
    """How often a step gathers each block: once, or for each forward and backward."""
    if reshards(parallelism, plan.pp, plan.shards):
        return 2 * plan.microbatches
    return 1


def parameter_copy_seconds(measured: MeasuredRun, plan: Plan, compute: float) -> float:
    """With cpu_offload, what a step waits for shards of parameters that come from the host and
    gradients that go there, beside the one copy of each that is counted with the optimizer. Copies
    run behind `compute` seconds."""
    parallelism = measured.run.parallelism
    if not parallelism.cpu_offload:
        return 0.0
    copies = gatherings(parallelism, plan) - 1 + plan.microbatches - 1
    seconds = copies * MASTER_BYTES * most_numbers(measured, plan) / cost.HOST_LINK
    return max(0.0, seconds - compute)


def network_seconds(
    plan: Plan,
    collectives: Sequence[Collective],
    compute: float,
) -> float:
    """What a process waits for the network. compute: the seconds that it can be hidden behind."""
    waited = sum(c.seconds for c in collectives if c.hidden == "")
    behind = sum(c.seconds for c in collectives if c.hidden == "compute")
    behind_last = sum(c.seconds for c in collectives if c.hidden == "last backward")
    waited += sum(c.waits for c in collectives)
    network = waited + max(0.0, behind - compute - waited)
    last_backward = compute * 2 / 3 / plan.microbatches
    network += max(0.0, behind_last - last_backward)
    return network


def most_numbers(measured: MeasuredRun, plan: Plan) -> float:
    """The parameters that a process updates, of the one that has the most."""
    groups = measured.groups_of(plan.tp, plan.shards)
    most = 0.0
    for process in range(plan.pp):
        names = measured.names_of(plan, process)
        most = max(most, sum(groups[name].shard for name in names))
    return most


def uneven_seconds(
    measured: MeasuredRun,
    plan: Plan,
    process: int,
) -> float:
    """What a process along pp waits for in a micro-batch, where context parallelism gives
    processes unequal work."""
    seconds = 0.0
    for name in measured.names_of(plan, process):
        seconds += sum(one.uneven for one in measured.exchanges(plan, name))
    return seconds


def flops_on(
    measured: MeasuredRun,
    plan: Plan,
    process: int,
) -> float:
    """FLOPs a token of a process along pp, forward, backward and again, of all that share its
    matrices."""
    total = 0.0
    for name in measured.names_of(plan, process):
        if name == HEAD:
            total += 3 * measured.flops_of_head
        elif isinstance(name, int):
            mixer = measured.flops_of[name]["mixer"]
            block = measured.flops_of[name]["block"]
            remat = measured.remat_of(plan, name)
            total += 3 * block + flops_again(measured, remat, mixer, block - mixer)
    return total


def flops_again(
    measured: MeasuredRun,
    remat: Remat,
    mixer: float,
    mlp: float,
) -> float:
    """FLOPs a token that a block recomputes; MLPs in chunks are recomputed by themselves.

    A policy that keeps matrix products leaves nothing that counts, one that names operations is
    counted as if it kept nothing."""
    run = measured.run
    parts = {
        "none": 0.0,
        "attention": mixer,
        "mlp": mlp,
        "attention+mlp": mixer + mlp,
        "block": mixer + mlp,
    }
    flops = 0.0
    if "matmuls" not in run.activation_checkpoint.policy:
        flops += parts[remat]
    if run.training.mlp_chunk_size > 0 and remat not in MLP_AGAIN:
        flops += mlp
    return flops
