"""Layers shared among processes: a whole model on meta is cut into stages, and micro-batches pass
through them as a schedule says.

    pipeline = cut(model, mesh, settings.parallelism, seq_len)
    loss = pipeline.step(microbatches, noises, loss_of_hidden)
    nats_BT, greedy_BT = pipeline.losses(batch, chunk_tokens)

After `cut` the model keeps what is on this process, under its global names. `step` is the forward
and backward of all micro-batches, instead of a loop over them; `losses` is for evaluation.

Every process along pp has the same sequences: a stage looks its micro-batch up by its number, and
hidden states alone travel (and what layers leave for later ones, `Mixer.carried`). Orders, sends
and receives are those of torch.distributed.pipelining.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from longfire.config.settings import Parallelism
from longfire.data.batch import Batch
from longfire.errors import SettingsError
from longfire.loss import losses_of
from longfire.model import Model
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import Mesh
from longfire.parallel.pipeline_loss import Loss, with_gradients
from longfire.parallel.pipeline_schedule import (
    Numbered,
    Schedule,
    on_meta,
    torch_schedule,
    whole,
)
from longfire.parallel.pipeline_stage import End, Stage, costs, hold
from longfire.parallel.sharding import local, placed_parameters, set_sharding
from longfire.parallel.stages import DEGREE, SCHEDULE, StageLayout, layout

# What a schedule is made for: the number of micro-batches, their shape and device.
Wanted = tuple[int, torch.Size, torch.device]


def cut(
    model: Model,
    mesh: Mesh,
    parallelism: Parallelism,
    seq_len: int,
    halves: bool = True,
) -> "Pipeline":
    """Keep of a whole model (on meta) what is on this process; the others' layers, embedding,
    norm and head become None.

    halves: whether the backward of schedules that ask for it may be done in two halves, which
    neither recomputation nor compilation allows: then the first half does it all. Parameters
    here that another process owns say so (`ShardSpec.is_copy`). Raises SettingsError where stages
    of one process would share a sharded parameter.
    """
    placed = layout(costs(model, seq_len), mesh.size("pp"), parallelism)
    stages = [Stage(model, placed, number) for number in range(placed.stages)]
    holders: dict[str, list[int]] = {}
    for stage in stages:
        for name, _ in stage.named_parameters():
            holders.setdefault(name, []).append(placed.processes[stage.number])
    here = mesh.rank("pp")
    sharded = mesh.size(*DATA, "cp") > 1
    for name, processes in holders.items():
        has_several_here = len(processes) > len(set(processes))
        if has_several_here and sharded:
            raise SettingsError(
                f"{SCHEDULE} = {parallelism.pipeline_parallel_schedule!r} puts two stages with "
                f"{name} on one process, which sharded parameters do not allow: take a schedule "
                f"with one stage a process, as 1F1B, or {DEGREE} = 1"
            )
        holders[name] = list(dict.fromkeys(processes))
    hold(model, model, set(placed.on(here)), placed)
    for name, _, spec in list(placed_parameters(model)):
        if here != holders[name][0]:
            set_sharding(model, name, replace(spec, is_copy=True))
    return Pipeline(
        mesh,
        parallelism,
        [stages[number] for number in placed.on(here)],
        placed,
        holders,
        halves,
    )


class Pipeline:
    """The stages of this process and how micro-batches pass through all of them. Everything here is
    collective over pp."""

    def __init__(
        self,
        mesh: Mesh,
        parallelism: Parallelism,
        stages: list[Stage],
        placed: StageLayout,
        holders: dict[str, list[int]],
        halves: bool,
    ) -> None:
        self.mesh = mesh
        self.parallelism = parallelism
        self.stages = stages
        self.placed = placed
        self.halves = halves
        self.copies: dict[str, list[int]] = {}
        for name, processes in holders.items():
            if len(processes) > 1:
                self.copies[name] = processes
        self.made: tuple[Wanted, Schedule] | None = None

    def step(
        self,
        microbatches: Sequence[Batch],
        noises: Sequence[Tensor | None],
        loss: Loss,
    ) -> Tensor:
        """Forward and backward of all micro-batches (equal in shape, on the device); their losses'
        sum, detached, on every process.

        loss: of a micro-batch's hidden states, divided by the real tokens of the whole step.
        Gradients are added to `.grad`, those of parameters with copies on other stages already
        summed; noises: of dropout, one a micro-batch.
        """
        ids_BT = microbatches[0].ids_BT
        losses: list[Tensor] = []
        schedule = self.schedule(len(microbatches), ids_BT)

        def end(
            model: Model,
            hidden_BTD: Tensor,
            batch: Batch,
        ) -> Tensor:
            mean = with_gradients(loss, model, hidden_BTD, batch)
            losses.append(mean.detach())
            return mean

        self.begin(list(zip(microbatches, noises)), end)
        # The target is that of torch's own loss, which has nothing left to do; its dim is cut into
        # micro-batches.
        schedule.step(target=torch.empty(len(microbatches)), return_outputs=False)
        self.begin((), None)
        self.sum_copies()
        total = ids_BT.new_zeros((), dtype=self.loss_dtype)
        if losses:
            total = torch.cat(losses).sum()
        return self.from_last(total)

    def begin(
        self,
        microbatches: Sequence[tuple[Batch, Tensor | None]],
        end: End | None,
    ) -> None:
        """What the stages compute next, and what the last one makes of hidden states."""
        for stage in self.stages:
            stage.microbatches = microbatches
            stage.end = end

    def schedule(
        self,
        count: int,
        ids_BT: Tensor,
    ) -> Schedule:
        """torch's schedule for so many micro-batches of this shape: made anew when they change,
        since its buffers have their shape."""
        wanted = (count, ids_BT.shape, ids_BT.device)
        if self.made is None or self.made[0] != wanted:
            stages = [self.torch_stage(stage, ids_BT) for stage in self.stages]
            self.made = wanted, torch_schedule(stages, self.parallelism, count)
        return self.made[1]

    def torch_stage(
        self,
        stage: Stage,
        ids_BT: Tensor,
    ) -> PipelineStage:
        """What torch has to know of a stage, so that it does not try it out with a micro-batch."""
        inputs: tuple[Tensor, ...] = ()
        if not stage.is_first:
            inputs = on_meta(self.passed(stage, stage.taken, ids_BT))
        if stage.is_last:
            outputs = on_meta([((1,), torch.get_default_dtype())])
        else:
            outputs = on_meta(self.passed(stage, stage.given, ids_BT))
        return Numbered(
            stage,
            stage.number,
            self.placed.stages,
            ids_BT.device,
            group=self.group,
            input_args=inputs,
            output_args=outputs,
            dw_builder=None if self.halves else whole,
        )

    def passed(
        self,
        stage: Stage,
        keys: tuple[str, ...],
        ids_BT: Tensor,
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Sizes and types of what goes from stage to stage: with sequence parallel a part of each
        sequence, of what else a part of its channels (Mixer.carried)."""
        sequences, tokens = ids_BT.shape
        size = stage.config.hidden_size
        tp = self.mesh.size("tp")
        tokens_here = tokens
        if self.parallelism.sequence_parallel:
            tokens_here = tokens // tp
        hidden = ((sequences, tokens_here, size), stage.stream_dtype)
        of_a_key = ((sequences, tokens, size // tp), stage.compute_dtype)
        return [hidden, *[of_a_key] * len(keys)]

    def sum_copies(self) -> None:
        """Add up the gradients of parameters that several processes use, on all of them to the same
        bits: the first one that has it adds and sends the sum to the others."""
        here = self.mesh.rank("pp")
        parameters = self.parameters()
        for name, (owner, *others) in self.copies.items():
            if here not in (owner, *others) or not parameters[name].requires_grad:
                continue
            whole_gradient = parameters[name].grad
            assert whole_gradient is not None, "a backward came before"
            gradient = local(whole_gradient)
            if here != owner:
                dist.send(gradient, self.rank_of(owner), self.group)
                dist.recv(gradient, self.rank_of(owner), self.group)
                continue
            for other in others:
                part = torch.empty_like(gradient)
                dist.recv(part, self.rank_of(other), self.group)
                gradient += part
            for other in others:
                dist.send(gradient, self.rank_of(other), self.group)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, those of all stages here."""
        found: dict[str, nn.Parameter] = {}
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                found[name] = parameter
        return found

    @torch.no_grad()
    def losses(
        self,
        batch: Batch,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """What loss.losses says, on every process along pp. Sequences go in as many parts as keep
        the processes busy, if they divide. Sharded parameters stay gathered: apply.reshard is the
        caller's, after the last batch."""
        parts = batch.split(gcd(batch.sequences, self.mesh.size("pp")))

        def end(
            model: Model,
            hidden_BTD: Tensor,
            part: Batch,
        ) -> tuple[Tensor, ...]:
            return losses_of(model, hidden_BTD, part.labels_BT, chunk_tokens)

        self.begin([(part, None) for part in parts], end)
        nats: list[Tensor] = []
        greedy: list[Tensor] = []
        sends: list[tuple[dist.Work, Tensor]] = []
        outputs: tuple[Tensor, ...] = ()
        for number, part in enumerate(parts):
            for stage in self.stages:
                stage.microbatch = number
                outputs = stage(*self.received(stage, outputs, part.ids_BT))
                if stage.is_last:
                    nats.append(outputs[0])
                    greedy.append(outputs[1])
                else:
                    sends += self.sent(stage, outputs)
        for send, _ in sends:
            send.wait()
        self.begin((), None)
        if nats:
            nats_BT = torch.cat(nats)
            greedy_BT = torch.cat(greedy).to(torch.uint8)
        else:
            nats_BT = torch.empty_like(batch.ids_BT, dtype=self.loss_dtype)
            greedy_BT = torch.empty_like(batch.ids_BT, dtype=torch.uint8)
        return self.from_last(nats_BT), self.from_last(greedy_BT).bool()

    def received(
        self,
        stage: Stage,
        outputs: tuple[Tensor, ...],
        ids_BT: Tensor,
    ) -> tuple[Tensor, ...]:
        """What the stage before passes on: `outputs` where it is on this process too."""
        if stage.is_first:
            return ()
        before = self.placed.processes[stage.number - 1]
        if before == self.mesh.rank("pp"):
            return outputs
        found: list[Tensor] = []
        for size, dtype in self.passed(stage, stage.taken, ids_BT):
            tensor = torch.empty(size, dtype=dtype, device=ids_BT.device)
            dist.recv(tensor, self.rank_of(before), self.group)
            found.append(tensor)
        return tuple(found)

    def sent(
        self,
        stage: Stage,
        outputs: tuple[Tensor, ...],
    ) -> list[tuple[dist.Work, Tensor]]:
        """Begun sends with what they send, which must live as long; none where the next stage is
        on this process too."""
        after = self.placed.processes[stage.number + 1]
        if after == self.mesh.rank("pp"):
            return []
        found: list[tuple[dist.Work, Tensor]] = []
        for tensor in outputs:
            work = dist.isend(tensor, self.rank_of(after), self.group)
            assert work is not None, "this process is in the group"
            found.append((work, tensor))
        return found

    def from_last(self, tensor: Tensor) -> Tensor:
        """The tensor of the process that has the last stage."""
        dist.broadcast(tensor, self.rank_of(self.placed.processes[-1]), self.group)
        return tensor

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes along pp."""
        return self.mesh.group("pp")

    @property
    def loss_dtype(self) -> torch.dtype:
        """At least fp32."""
        return torch.promote_types(self.stages[0].compute_dtype, torch.float32)

    def rank_of(self, process: int) -> int:
        """The rank in the world of a process along pp."""
        return dist.get_global_rank(self.group, process)


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """What computes a model whose layers are on several processes; None where all are here."""
    assert model.pipeline is None or isinstance(model.pipeline, Pipeline)
    return model.pipeline
