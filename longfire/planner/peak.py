"""What a process of a plan holds in a step, moment by moment, and the largest batch and length
that fit."""

from collections.abc import Callable, Iterator, Sequence

import torch

from longfire.parallel import cost
from longfire.parallel.activation_offload import WINDOW_BYTES
from longfire.planner.forecast import MIXER_AGAIN, Moment, Plan
from longfire.planner.holding import NOTHING, FSDPMemory, Group, Shards
from longfire.planner.measured_run import MeasuredRun
from longfire.planner.part import EMBED, HEAD, MASTER_BYTES, Part
from longfire.planner.teacher import teacher_cost

LABELS = 3 * 8  # bytes of a token's id, label and position
MOST = 2**24  # no larger number of sequences or tokens is tried


class ProcessMemory:
    """One process of a plan along pp, in a step that is not the first."""

    def __init__(
        self,
        measured: MeasuredRun,
        plan: Plan,
        process: int,
        seq_len: int,
    ) -> None:
        run = measured.run
        self.schedule = run.parallelism.pipeline_parallel_schedule
        self.plan = plan
        self.process = process
        self.here = plan.here(seq_len)
        self.names = measured.names_of(plan, process)
        self.on_device = not run.parallelism.cpu_offload
        self.group = groups_on(measured, plan, self.names)
        self.shards = Shards(
            plan,
            run.parallelism,
            self.names,
            self.group,
            measured.sent_bytes(plan),
        )
        self.parts: dict[int | str, Part] = {}
        self.cuts: dict[int | str, FSDPMemory] = {}
        for name in self.names:
            self.parts[name] = measured.part(plan, name, self.here)
            exchanges = measured.exchanges(plan, name, seq_len)
            self.cuts[name] = FSDPMemory.of(
                exchanges, again=measured.remat_of(plan, name) in MIXER_AGAIN
            )
        self.teacher = teacher_cost(measured, plan, self.here)
        self.rounded = 0
        if measured.keeps_rounded(plan):
            itemsize = getattr(torch, measured.dtype).itemsize
            self.rounded = itemsize * sum(group.rounded for group in self.group.values())
        self.masters = 0.0
        self.parameters = 0.0
        self.checkpoint = run.checkpoint
        self.state = 0.0
        if self.on_device:
            self.masters = float(MASTER_BYTES * sum(group.shard for group in self.group.values()))
            self.parameters = self.masters + self.teacher.parameters
            self.state = sum(group.state for group in self.group.values())
        chunk = min(plan.batch_size * self.here, measured.chunk_tokens)
        vocabulary_here = -(-measured.model_config.vocab_size // plan.tp)
        self.logits = 4 * chunk * vocabulary_here + self.teacher.logits  # in fp32

    def moments(self) -> Iterator[Moment]:
        """What it holds, moment by moment: forward and backward of the micro-batch for which most
        is kept, and the optimizer.

        Gathered counts the rounded copies of weights too, which are gone when the optimizer works.
        While the optimizer works, gradients are sharded as parameters are, and what its updates
        hold for a while counts as activations."""
        keeps: dict[int | str, float] = {}
        for name in self.names:
            keeps[name] = self.parts[name].kept + self.cuts[name].kept
        kept = self.kept_of_others(keeps)
        shards = self.shards
        gradients = shards.gradients_before
        if self.teacher.parameters:
            yield self.moment(
                "forward of the teacher",
                gradients,
                activations=kept + self.teacher.kept + self.teacher.activations,
                gathered=shards.always + self.teacher.block,
            )
            kept += self.teacher.kept
        for name in self.names:
            peak = max(self.parts[name].forward_peak, self.offloaded_at_once(name))
            peak += self.cuts[name].forward
            yield self.moment(
                f"forward of {describe(name)}",
                gradients,
                activations=kept + peak,
                gathered=shards.forward(name) + self.rounded,
            )
            kept += keeps[name]
        for name in reversed(self.names):
            kept -= keeps[name]
            part = self.parts[name]
            peak = part.backward_peak(further=shards.accumulates)
            peak = max(peak, self.offloaded_at_once(name)) + self.cuts[name].backward
            yield self.moment(
                f"backward of {describe(name)}",
                gradients,
                activations=kept + peak,
                gathered=shards.backward(name) + self.rounded,
            )
            yield self.moment(
                f"gradients of {describe(name)}",
                gradients,
                activations=kept + part.passed,
                gathered=shards.reduction(name) + self.rounded,
            )
            gradients += shards.gradient(name)
        temporary = sum(group.temporary for group in self.group.values())
        yield self.moment(
            "optimizer",
            gradients=self.masters,
            activations=temporary * self.on_device,
            gathered=shards.always,
        )

    def host_bytes(self) -> float:
        """What it holds in the host's memory: the copies of parameters and optimizer that a save in
        the background writes, with cpu_offload its shards of both and of gradients, with
        activation_checkpoint.offload what the blocks of the micro-batches on their way keep."""
        plan = self.plan
        in_flight = cost.in_flight(self.process, plan.pp, plan.microbatches, self.schedule)
        pinned = sum(part.pinned_on_host for part in self.parts.values())
        held = in_flight * pinned + self.copied_for_checkpoint
        if not self.on_device:
            for group in self.group.values():
                held += 2 * MASTER_BYTES * group.shard + group.state
            held += self.teacher.parameters
        return held

    @property
    def kept_on_host(self) -> float:
        """What a micro-batch keeps in the host's memory."""
        return float(sum(part.kept_on_host for part in self.parts.values()))

    @property
    def copied_for_checkpoint(self) -> float:
        """Bytes of the copies that a save in the background writes (checkpoint/host_copies.py)."""
        mode = self.checkpoint.async_mode
        if not self.checkpoint.enable_checkpoint or mode == "disabled":
            return 0.0
        groups = self.group.values()
        if mode == "async_with_pinned_mem":
            return sum(group.pinned for group in groups)
        return sum(MASTER_BYTES * group.shard + group.state for group in groups)

    def kept_of_others(self, keeps: dict[int | str, float]) -> float:
        """The bytes that are kept for other micro-batches, those of tokens, of what one stage
        passes to the next, and of what is in transit to the host's memory or back."""
        plan = self.plan
        others = cost.in_flight(self.process, plan.pp, plan.microbatches, self.schedule) - 1
        one_tensor = max(part.passed for part in self.parts.values())
        # received from one stage and given to the next
        passes = 2 * one_tensor if plan.pp > 1 else 0
        kept = others * (passes + sum(keeps.values()))
        kept += passes + LABELS * plan.batch_size * plan.microbatches * self.here
        kept += min(WINDOW_BYTES + one_tensor, self.kept_on_host)
        return kept

    def offloaded_at_once(self, name: int | str) -> float:
        """What a block keeps in the host's memory, with a gradient before it and one after: a
        compiled block lets go of all of it at its end, and is given all at its beginning."""
        part = self.parts[name]
        if not part.kept_on_host:
            return 0.0
        return part.kept_on_host + 2 * part.passed

    def moment(
        self,
        where: str,
        gradients: float,
        activations: float,
        gathered: float,
    ) -> Moment:
        """The head's logits are counted apart from its other activations."""
        logits: float = 0
        if where.endswith(HEAD):
            activations += self.teacher.logits
            logits = min(self.logits, activations)
        return Moment(
            where,
            self.parameters,
            gradients,
            self.state,
            activations - logits,
            gathered + self.teacher.ends,
            logits,
        )


def groups_on(
    measured: MeasuredRun,
    plan: Plan,
    names: list[int | str],
) -> dict[int | str, Group]:
    """What is gathered together, of the parts of one process. A head that is tied to the embedding
    of the same process has nothing of its own."""
    groups = measured.groups_of(plan.tp, plan.shards)
    found: dict[int | str, Group] = {}
    for name in names:
        found[name] = groups[name]
    tied = measured.model_config.tie_word_embeddings and EMBED in names
    if tied and HEAD in found:
        found[HEAD] = NOTHING
    return found


def describe(name: int | str) -> str:
    """A part's name as it is shown."""
    if isinstance(name, str):
        return name
    return f"layer {name}"


def fullest_moment(memories: Sequence[ProcessMemory]) -> Moment:
    """Of the fullest process."""
    moments: list[Moment] = []
    for memory in memories:
        moments += memory.moments()
    return max(moments, key=lambda moment: moment.total)


def most_on_host(memories: Sequence[ProcessMemory]) -> float:
    """The bytes in the host's memory of the process that holds most there."""
    return max(memory.host_bytes() for memory in memories)


def largest(
    measure: Callable[[int], float],
    limit: float,
    least: int = 1,
) -> int:
    """The largest number, a multiple of `least`, whose measure is at most the limit; 0 if none. The
    measure grows with the number."""
    if measure(least) > limit:
        return 0
    low = 1
    high = 2
    while measure(high * least) <= limit and high < MOST:
        low = high
        high = 2 * high
    while high - low > max(1, low // 512):
        middle = (low + high) // 2
        if measure(middle * least) <= limit:
            low = middle
        else:
            high = middle
    return low * least
