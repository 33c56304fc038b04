"""Layers shared among processes: a whole model on meta is cut into stages, and microbatches pass
through them as a schedule says.

pipeline = cut(model, mesh, settings.parallelism, seq_len)      the model keeps what lies on this process, under its global names
loss = pipeline.step(microbatches, noises, loss_of_hidden)      forward and backward of all of them, instead of a loop
nats_BT, greedy_BT = pipeline.losses(batch, chunk_tokens)       for evaluation

Every process along pp has the same rows: a stage looks its microbatch up by its number, and hidden
states alone travel (and what layers leave for later ones, `Mixer.carried`). Orders, sends and
receives are those of torch.distributed.pipelining.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    # the one that runs any order; torch has no public name for it, nor for reading a file
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from longfire.config.model_config import mixer_of
from longfire.config.settings import Parallelism
from longfire.data.batch import Batch
from longfire.errors import SettingsError
from longfire.loss import losses_of
from longfire.mixers import MIXERS
from longfire.mixers import mixer as mixers
from longfire.model import Layers, Model
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import Mesh
from longfire.parallel.sharding import local, placed_parameters, set_sharding
from longfire.parallel.stages import DEGREE, SCHEDULE, StageLayout, layout

Loss = Callable[[Model, Tensor, Batch], Tensor]  # (model, hidden states, batch) -> scalar


class Stage(Model):
    """A view of some layers of a model: what the pipeline runs, and what is sharded as one
    (`fully_shard(stage)`).

    The first stage has the embedding, the last one norm and head, and says what `end` makes of a
    microbatch's hidden states.
    """

    def __init__(self, model: Model, placed: StageLayout, number: int) -> None:
        nn.Module.__init__(self)
        self.of = (
            model,
        )  # not a submodule: whose ways in and out tensor parallelism may have changed
        self.config = model.config
        self.compute_dtype = model.compute_dtype
        self.number = number
        self.is_first = number == 0
        self.is_last = number == placed.stages - 1
        self.local_ops = model.local_ops
        self.saved_activations = model.saved_activations
        hold(self, model, {number}, placed)
        self.taken = carried(model, placed, number)
        self.given = carried(model, placed, number + 1)
        self.microbatches: Sequence[tuple[Batch, Tensor | None]] = ()  # with the noise of dropout
        self.microbatch = 0  # the number of the one that comes next
        self.end: Callable[[Model, Tensor, Batch], Any] | None = None

    def forward(  # type: ignore[override]  # called by torch's stage, with what travels
        self, *passed: Tensor
    ) -> Any:
        """(hidden states, then what `taken` names) of the stage before -> the same for the next
        one."""
        (model,), (batch, noise_BT) = self.of, self.microbatches[self.microbatch]
        seq = mixers.Sequence(batch.positions_BT, batch.documents, noise_BT=noise_BT, ops=batch.ops)
        self.prepare(seq)
        seq.shared |= zip(self.taken, passed[1:])
        x_BTD = self.blocks(
            model.embed_tokens(batch.ids_BT, seq) if self.is_first else passed[0], seq
        )
        if self.is_last:
            assert self.end is not None, "a step says what becomes of hidden states"
            return self.end(model, model.final_norm(x_BTD), batch)
        given = [seq.shared[key] for key in self.given]
        return tuple(x.contiguous() for x in (x_BTD, *given))


def hold(part: Model, model: Model, stages: set[int], placed: StageLayout) -> None:
    """Give `part` (it may be the model itself) the modules of these stages, and None for the
    others.

    A head that shares the embedding's parameter lies beside the embedding, so that the parameter
    has the same name everywhere.
    """
    is_first = 0 in stages
    is_last = placed.stages - 1 in stages
    numbers = [layer for stage in stages for layer in placed.layers[stage]]
    used = {mixer_of(model.config.layer_types[layer]) for layer in numbers}
    has_embedding = is_first or (is_last and model.config.tie_word_embeddings)
    layers = {layer: model.layers[layer] for layer in numbers}
    shared = {name: module for name, module in model.shared.items() if name in used}
    # in the order of Model, since parameters come in the order in which modules are registered
    modules = {
        "embed": model.embed if has_embedding else None,
        "positions": model.positions if is_first else None,
        "embed_norm": model.embed_norm if is_first else None,
        "layers": Layers(layers),
        "shared": nn.ModuleDict(shared),
        "norm": model.norm if is_last else None,
        "head": model.head if is_last else None,
    }
    for name, module in modules.items():
        setattr(part, name, module)


def carried(model: Model, placed: StageLayout, stage: int) -> tuple[str, ...]:
    """What a stage takes from those before it: keys that the first layer of a mixer has left there
    and that a later one reads."""
    if stage >= placed.stages:
        return ()
    names = [mixer_of(name) for name in model.config.layer_types]
    begin = placed.layers[stage].start
    alive = dict.fromkeys(name for name in names[:begin] if name in names[begin:])
    return tuple(key for name in alive for key in MIXERS[name].carried)


def costs(model: Model, seq_len: int) -> list[float]:
    """Floating-point operations of a token in the embedding (which adds its row), each layer, and
    the head; of the whole model."""
    with torch.device("meta"):
        whole = Model(
            model.config
        )  # that of the run may be split already, and not into equal parts
    size = model.config.hidden_size
    return [
        2 * size,
        *(block.flops_per_token(seq_len) for block in whole.layers),
        2 * size * model.config.vocab_size,
    ]


def cut(
    model: Model, mesh: Mesh, parallelism: Parallelism, seq_len: int, halves: bool = True
) -> "Pipeline":
    """Keep of a whole model (on meta) what lies on this process; the others' layers, embedding,
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
    for name, processes in holders.items():
        if len(processes) > len(set(processes)) and mesh.size(*DATA, "cp") > 1:
            raise SettingsError(
                f"{SCHEDULE} = {parallelism.pipeline_parallel_schedule!r} puts two stages with "
                f"{name} on one process, which sharded parameters do not allow: take a schedule "
                f"with one stage a process, as 1F1B, or {DEGREE} = 1"
            )
    holders = {name: list(dict.fromkeys(processes)) for name, processes in holders.items()}
    hold(model, model, set(placed.on(here)), placed)
    for name, _, spec in list(placed_parameters(model)):
        if here != holders[name][0]:
            set_sharding(model, name, replace(spec, is_copy=True))
    return Pipeline(
        mesh, parallelism, [stages[number] for number in placed.on(here)], placed, holders, halves
    )


class Pipeline:
    """The stages of this process and how microbatches pass through all of them. Everything here is
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
        self.copies = {name: processes for name, processes in holders.items() if len(processes) > 1}
        self.made: tuple[Any, PipelineScheduleSingle | PipelineScheduleMulti] | None = (
            None  # for which microbatches
        )

    def step(
        self, microbatches: Sequence[Batch], noises: Sequence[Tensor | None], loss: Loss
    ) -> Tensor:
        """Forward and backward of all microbatches (equal in shape, on the device); their losses'
        sum, detached, on every process.

        loss: of a microbatch's hidden states, divided by the real tokens of the whole step.
        Gradients are added to `.grad`, those of parameters with copies on other stages already
        summed; noises: of dropout, one a microbatch.
        """
        ids_BT = microbatches[0].ids_BT
        losses = []
        schedule = self.schedule(len(microbatches), ids_BT)

        def end(model: Model, hidden_BTD: Tensor, batch: Batch) -> Tensor:
            mean = with_gradients(loss, model, hidden_BTD, batch)
            losses.append(mean.detach())
            return mean

        self.begin(list(zip(microbatches, noises)), end)
        # The target is that of torch's own loss, which has nothing left to do; its dim is cut into
        # microbatches.
        schedule.step(target=torch.empty(len(microbatches)), return_outputs=False)
        self.begin((), None)
        self.sum_copies()
        return self.from_last(
            torch.cat(losses).sum() if losses else ids_BT.new_zeros((), dtype=self.loss_dtype)
        )

    def begin(
        self, microbatches: Sequence[tuple[Batch, Tensor | None]], end: Callable | None
    ) -> None:
        for stage in self.stages:
            stage.microbatches = microbatches
            stage.end = end

    def schedule(
        self, count: int, ids_BT: Tensor
    ) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """torch's schedule for so many microbatches of this shape: made anew when they change,
        since its buffers have their shape."""
        wanted = (count, ids_BT.shape, ids_BT.device)
        if self.made is None or self.made[0] != wanted:
            stages = [self.torch_stage(stage, ids_BT) for stage in self.stages]
            more = {"n_microbatches": count, "loss_fn": lambda mean, _: mean, "scale_grads": False}
            if self.parallelism.pipeline_parallel_schedule_csv:
                schedule = _PipelineScheduleRuntime(stages, **more)
                schedule._load_csv(self.parallelism.pipeline_parallel_schedule_csv)
            else:
                made = get_schedule_class(self.parallelism.pipeline_parallel_schedule)
                schedule = made(
                    stages[0] if issubclass(made, PipelineScheduleSingle) else stages, **more
                )
            self.made = wanted, schedule
        return self.made[1]

    def torch_stage(self, stage: Stage, ids_BT: Tensor) -> PipelineStage:
        """What torch has to know of a stage: told, so that it does not try it out with a
        microbatch."""
        meta = []
        for passed in (
            self.passed(stage, stage.taken, ids_BT),
            self.passed(stage, stage.given, ids_BT),
        ):
            meta.append(
                tuple(
                    torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
                    for size, dtype in passed
                )
            )
        outputs = (torch.empty(1, device="meta", requires_grad=True),)
        return Numbered(
            stage,
            stage.number,
            self.placed.stages,
            ids_BT.device,
            group=self.group,
            input_args=() if stage.is_first else meta[0],
            output_args=outputs if stage.is_last else meta[1],
            dw_builder=None if self.halves else whole,
        )

    def passed(
        self, stage: Stage, keys: tuple[str, ...], ids_BT: Tensor
    ) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Sizes and types of what goes from stage to stage: with sequence parallel a part of the
        row, of what else a part of its channels (Mixer.carried)."""
        (rows, tokens), size, tensors = ids_BT.shape, stage.config.hidden_size, self.mesh.size("tp")
        here = tokens // tensors if self.parallelism.sequence_parallel else tokens
        hidden = ((rows, here, size), stage.stream_dtype)
        return [hidden, *[((rows, tokens, size // tensors), stage.compute_dtype)] * len(keys)]

    def sum_copies(self) -> None:
        """Add up the gradients of parameters that several processes use, on all of them to the same
        bits: the first one that has it adds and tells the others."""
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
                dist.recv(part := torch.empty_like(gradient), self.rank_of(other), self.group)
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
    def losses(self, batch: Batch, chunk_tokens: int) -> tuple[Tensor, Tensor]:
        """What loss.losses says, on every process along pp. Rows go in as many parts as keep the
        processes busy, if they divide. Sharded parameters stay gathered: apply.reshard is the
        caller's, after the last batch."""
        parts = batch.split(gcd(batch.rows, self.mesh.size("pp")))
        self.begin(
            [(part, None) for part in parts],
            lambda model, hidden_BTD, part: losses_of(
                model, hidden_BTD, part.labels_BT, chunk_tokens
            ),
        )
        found = []
        sends = []
        outputs = ()
        for number, part in enumerate(parts):
            for stage in self.stages:
                stage.microbatch = number
                outputs = stage(*self.received(stage, outputs, part.ids_BT))
                if stage.is_last:
                    found.append(outputs)
                else:
                    sends += self.sent(stage, outputs)
        for send, _ in sends:
            send.wait()
        self.begin((), None)
        empty = (
            torch.empty_like(batch.ids_BT, dtype=dtype) for dtype in (self.loss_dtype, torch.uint8)
        )
        nats_BT, greedy_BT = map(torch.cat, zip(*found)) if found else empty
        return self.from_last(nats_BT), self.from_last(greedy_BT.to(torch.uint8)).bool()

    def received(
        self, stage: Stage, outputs: tuple[Tensor, ...], ids_BT: Tensor
    ) -> tuple[Tensor, ...]:
        """What the stage before passes on: `outputs` where it is on this process too."""
        if stage.is_first:
            return ()
        before = self.placed.processes[stage.number - 1]
        if before == self.mesh.rank("pp"):
            return outputs
        found = []
        for size, dtype in self.passed(stage, stage.taken, ids_BT):
            tensor = torch.empty(size, dtype=dtype, device=ids_BT.device)
            dist.recv(tensor, self.rank_of(before), self.group)
            found.append(tensor)
        return tuple(found)

    def sent(self, stage: Stage, outputs: tuple[Tensor, ...]) -> list[tuple[dist.Work, Tensor]]:
        """Begun sends with what they send, which must live as long; none where the next stage lies
        here too."""
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
        return self.mesh.group("pp")

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.stages[0].compute_dtype, torch.float32)

    def rank_of(self, process: int) -> int:
        """The rank in the world of a process along pp."""
        return dist.get_global_rank(self.group, process)


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """What computes a model whose layers are on several processes; None where all are here."""
    assert model.pipeline is None or isinstance(model.pipeline, Pipeline)
    return model.pipeline


class Numbered(PipelineStage):
    """torch's stage, which tells ours the number of the microbatch. (As an argument it would be a
    tensor, to be read back from the device, which FSDP moves it to.)"""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self.submod, Stage)
        self.submod.microbatch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


def whole() -> Callable[[], None]:
    """torch's `dw_builder` for a backward that is whole in its first half: nothing remains for the
    second."""
    return lambda: None


def with_gradients(loss: Loss, model: Model, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """The loss (1,), with its gradients made at once and kept for the backward.

    The fused loss gives all its gradients together and once. Schedules that halve the backward ask
    for those of hidden states first and for those of parameters later: so each has a node of its
    own in the graph.
    """
    leaf_BTD = hidden_BTD.detach().requires_grad_()
    value = loss(model, leaf_BTD, batch)
    parameters = []
    if model.head.weight.requires_grad:
        parameters.append(model.head.weight)
    for_hidden_BTD, *for_parameters = torch.autograd.grad(value, [leaf_BTD, *parameters])
    total = _Known.apply(hidden_BTD, for_hidden_BTD, value.detach()[None])
    for parameter, gradient in zip(parameters, for_parameters):
        total = total + _Known.apply(parameter, gradient, torch.zeros_like(total))
    return total


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_value, None, None
