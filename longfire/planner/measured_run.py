"""What plans of one run are made of, each measured once: the bytes of parts, parameters that are
gathered together, the layers of each process, and what context parallelism sends."""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Self

import torch
from torch import nn

from longfire.config.rules.model import LANGUAGE_MODELING
from longfire.config.run import Run
from longfire.config.settings import Parallelism, Remat
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.model import on_meta
from longfire.ops.cross_entropy import chunk_size
from longfire.ops.pretending import pretending_cuda
from longfire.ops.rounded_weights import pays
from longfire.optim import rule_of, updates_of
from longfire.parallel import context, float8_layers, stages, strategy, tensor_refusals
from longfire.parallel.context_cost import (
    BYTES,
    AttentionHeads,
    CommunicationCost,
    LayerTraffic,
    Workload,
)
from longfire.parallel.cost import Device
from longfire.parallel.parameter_gather import float8_bytes, gathers_float8, gathers_rounded
from longfire.parallel.pipeline_stage import costs
from longfire.parallel.remat import is_recomputed
from longfire.parallel.strategy import Ranked
from longfire.planner.forecast import MIXER_AGAIN, Plan
from longfire.planner.holding import Group
from longfire.planner.memory import Keeping, Meter, ends_of
from longfire.planner.part import EMBED, HEAD, MASTER_BYTES, Part
from longfire.planner.teacher import TeacherCost, teacher_cost, teacher_model

CLASSES = 1000  # of a classifier whose data will decide
MEASURED_TOKENS = 8192  # longer sequences are read off a straight line through these and half


class MeasuredRun:
    """A run on devices of one kind, as many as it was composed for. Raises SettingsError for what
    cannot be planned.

    as_cuda: false for a CPU, which bench/planner.py measures.
    """

    def __init__(
        self,
        run: Run,
        device: Device,
        dtype: str = "",
        as_cuda: bool = True,
    ) -> None:
        model_config = run.known_model_config
        if isinstance(model_config, TransformersConfig):
            raise SettingsError(
                "model.backend = 'transformers' knows nothing of the model's inside, which "
                "`longfire plan` counts; set it to longfire"
            )
        self.run = run
        self.device = device
        self.as_cuda = as_cuda
        self.kernels = as_cuda and run.model.kernels == "auto"
        self.processes = run.world.size
        self.seq_len = run.training.seq_len
        self.sequences = run.sequences_per_step
        self.tokens = run.tokens_per_step
        self.model_config = model_config.with_vocabulary(run.vocab_size)
        if run.job.task != LANGUAGE_MODELING:
            # where the data will decide how many classes there are
            self.model_config = self.model_config.with_classes(model_config.num_classes or CLASSES)
        self.rule = rule_of(run.optimizer)
        self.dtype = dtype or "bfloat16"
        if not dtype and run.model.compute_dtype == "float32":
            self.dtype = "float32"
        self.model = on_meta(self.model_config, getattr(torch, self.dtype))
        self.teacher = teacher_model(run, getattr(torch, self.dtype))
        self.flops_of: list[dict[str, float]] = []
        length = self.model.length_of_flops(self.seq_len)
        for block in self.model.layers:
            flops = {
                "mixer": block.mixer.flops_per_token(length),
                "block": block.flops_per_token(length),
            }
            self.flops_of.append(flops)
        self.costs = costs(self.model, self.seq_len)
        self.flops_of_head = self.costs[-1]
        self.meters: dict[tuple[int, int, bool], Meter] = {}
        self.teacher_meters: dict[tuple[int, int], Meter] = {}
        self.groups: dict[tuple[int, int], dict[int | str, Group]] = {}
        self.layouts: dict[int, list[list[int]]] = {}
        self.exchanged: dict[tuple, tuple[CommunicationCost, ...]] = {}
        self.lines: dict[tuple, Part] = {}

    def on(self, device: Device) -> Self:
        """The same run on other devices; what has been measured stays."""
        other = copy(self)
        other.device = device
        other.exchanged = {}
        return other

    def refusals(self, tp: int, tokens: int) -> Iterator[str]:
        """Why processes cannot share this model's matrices so. (Run.compose has looked at the
        recipe's own pipeline.)"""
        sequence_parallel = self.run.parallelism.sequence_parallel
        yield from tensor_refusals.refusals(self.model, tp, sequence_parallel, tokens)
        if self.teacher is not None:
            for reason in tensor_refusals.refusals(self.teacher, tp, sequence_parallel, tokens):
                yield f"distillation.teacher: {reason}"

    def teacher_cost(self, plan: Plan) -> TeacherCost:
        """What a teacher adds to the plan."""
        return teacher_cost(self, plan, plan.here(self.seq_len))

    @property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at one time."""
        with pretending_cuda(self.as_cuda):
            return chunk_size(self.run.training.loss_chunk_tokens, torch.device("cpu"))

    def teacher_meter(self, tp: int, seq_len: int) -> Meter:
        """Of the teacher's share that one of `tp` processes has."""
        assert self.teacher is not None, "asked for where there is one"
        key = tp, seq_len
        if key not in self.teacher_meters:
            self.teacher_meters[key] = Meter(
                self.teacher,
                seq_len,
                self.run.training.loss_chunk_tokens,
                self.as_cuda,
                tp,
                self.run.parallelism.sequence_parallel,
                kernels=self.kernels,
            )
        return self.teacher_meters[key]

    def meter(self, tp: int, seq_len: int, is_cut: bool = False) -> Meter:
        """Of the share that one of `tp` processes has. is_cut: of pieces of sequences."""
        key = tp, seq_len, is_cut
        if key not in self.meters:
            keeping = Keeping(
                self.run.attention,
                self.run.activation_checkpoint,
                self.run.training.mlp_chunk_size,
            )
            self.meters[key] = Meter(
                self.model,
                seq_len,
                self.run.training.loss_chunk_tokens,
                self.as_cuda,
                tp,
                self.run.parallelism.sequence_parallel,
                keeping,
                self.kernels,
                is_cut,
            )
        return self.meters[key]

    # Sequences that processes share

    @property
    def has_recurrences(self) -> bool:
        """Whether a piece of a sequence holds more than a whole one: the maps of its states."""
        return any(getattr(block.mixer, "recurrences", ()) for block in self.model.layers)

    @property
    def layout(self) -> str:
        """Of sequences that are shared, as the run cuts them."""
        softmax = any("attention" in block.mixer.context for block in self.model.layers)
        return context.layout_kind(
            self.run.parallelism.context_parallel_layout,
            softmax,
            self.run.data.varlen,
        )

    def crossings(self, tp: int) -> list[LayerTraffic]:
        """What each layer looks at beyond a cut of its sequences."""
        return self.meter(tp, min(self.seq_len, MEASURED_TOKENS)).crossings

    def softmax(self, plan: Plan) -> list[AttentionHeads]:
        """Of every softmax layer, a teacher's too, the heads that are on one process."""
        found: list[AttentionHeads] = []
        for crossing in self.crossings(plan.tp):
            for heads in crossing.attends:
                found.append(heads)
        if self.teacher is not None:  # its layers see whole sequences in the same way
            tokens = min(self.seq_len, MEASURED_TOKENS)
            for crossing in self.teacher_meter(plan.tp, tokens).crossings:
                found += crossing.attends
        return found

    def cut(self, plan: Plan, seq_len: int = 0) -> Workload:
        """The sequences that the plan's processes share. seq_len: 0 for the recipe's."""
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
        """The ways of the plan's softmax layers, best first; empty where sequences are whole.

        What fits is decided by what must be held in any case: parameters, gradients, moments, and
        what enters the blocks that are recomputed, or all that they keep."""
        if plan.cp == 1:
            return []
        groups = self.groups_of(plan.tp, plan.shards)
        names = self.names_of(plan, 0)
        masters = 2 * MASTER_BYTES * sum(groups[name].shard for name in names)
        state = sum(groups[name].state for name in names)
        room = self.device.usable_bytes - masters - state
        streams = len(names) * self.stream_bytes(plan)
        return strategy.rank_strategies(
            self.softmax(plan),
            self.cut(plan),
            self.device,
            room - streams,
        )

    def stream_bytes(self, plan: Plan) -> int:
        """The bytes that one block gives to the next, of a micro-batch on a process."""
        return (
            plan.batch_size
            * plan.here(self.seq_len)
            * self.model_config.hidden_size
            * BYTES[self.dtype]
        )

    def sent_bytes(self, plan: Plan) -> float:
        """Of a parameter on its way to where it is used, on average over those of the blocks."""
        if self.run.parallelism.param_gather_dtype == "bfloat16":
            return 2.0
        others = 4
        if gathers_rounded(self.run.parallelism, getattr(torch, self.dtype), plan.shards):
            others = 2
        of_8_bits = 4
        if gathers_float8(self.run.float8, plan.shards):
            of_8_bits = float8_bytes(self.run.float8.recipe_name)
        return others + (of_8_bits - others) * self.float8_share

    @cached_property
    def float8_share(self) -> float:
        """The part of the blocks' parameters that multiplies 8-bit numbers."""
        chosen = float8_layers.choose_matrices(self.model, self.run.float8).chosen
        numbers = sum(
            self.model.get_submodule(name).get_parameter("weight").numel() for name in chosen
        )
        return numbers / sum(parameter.numel() for parameter in self.model.layers.parameters())

    def keeps_rounded(self, plan: Plan) -> bool:
        """Whether a step rounds each weight once, which parameters that are gathered cannot be."""
        is_whole = plan.data * plan.cp == 1 and not self.run.parallelism.cpu_offload
        choice = self.run.training.keep_rounded_weights
        return is_whole and pays(choice, self.as_cuda, plan.microbatches)

    def with_strategy(self, plan: Plan) -> Plan:
        """The same with the best strategy."""
        ranked = self.strategies(plan)
        if ranked:
            return replace(plan, strategy=ranked[0].strategy)
        return plan

    def exchanges(
        self,
        plan: Plan,
        name: int | str,
        seq_len: int = 0,
    ) -> tuple[CommunicationCost, ...]:
        """What a part sends to those who hold other pieces of its sequences, in a micro-batch."""
        if plan.cp == 1 or isinstance(name, str):
            return ()
        key = self.crossings(plan.tp)[name], plan.strategy, self.cut(plan, seq_len)
        if key not in self.exchanged:
            self.exchanged[key] = tuple(strategy.exchanges(*key, self.device))
        return self.exchanged[key]

    # Parts, and who has them

    def part(
        self,
        plan: Plan,
        name: int | str,
        here: int,
    ) -> Part:
        """What one process runs of a part, `here` tokens of each sequence.

        Sequences of another length than the recipe's, and long ones, are read off a straight line,
        several of them as one: what holds a number for each token grows so."""
        remat = self.remat_of(plan, name)
        is_cut = plan.cp > 1 and self.has_recurrences
        if here <= MEASURED_TOKENS and here == plan.here(self.seq_len):
            return self.meter(plan.tp, here, is_cut).part(name, remat, plan.batch_size)
        short = min(MEASURED_TOKENS // 2, self.seq_len)
        meter = self.meter(plan.tp, short, is_cut)
        if name == HEAD:
            return meter.head_part(plan.batch_size, here)
        which = name
        if isinstance(name, int):
            which = meter.kind_of[name]
        key = plan.tp, is_cut, which, remat, plan.batch_size * here
        if key not in self.lines:
            one = meter.part(which, remat, 1)
            two = self.meter(plan.tp, 2 * short, is_cut).part(which, remat, 1)
            self.lines[key] = Part.of_sequences(one, two, plan.batch_size * here / short)
        return self.lines[key]

    def remat_of(self, plan: Plan, name: int | str) -> Remat:
        """What of a part is recomputed: nothing of a block that the settings leave out."""
        is_left_out = isinstance(name, int) and not is_recomputed(
            self.run.activation_checkpoint, name
        )
        return "none" if is_left_out else plan.remat

    def groups_of(
        self,
        tp: int,
        shards: int,
    ) -> dict[int | str, Group]:
        """What is gathered together, of one process of `tp` x `shards`: blocks by number, the two
        ends by name."""
        if (tp, shards) not in self.groups:
            model = self.meter(tp, min(self.seq_len, MEASURED_TOKENS)).model
            parts: dict[int | str, nn.Module] = dict(enumerate(model.layers))
            parts.update(ends_of(model))
            updates = updates_of(model, self.rule)
            chosen = float8_layers.choose_matrices(model, self.run.float8).chosen
            of_8_bits = [model.get_submodule(name) for name in chosen]
            groups: dict[int | str, Group] = {}
            for name, part in parts.items():
                rounded_to = torch.float32 if name == HEAD else getattr(torch, self.dtype)
                groups[name] = Group.of(part, shards, updates, rounded_to, of_8_bits)
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
        """The recipe's, without what is written for its own degree."""
        return replace(
            self.run.parallelism,
            pipeline_parallel_schedule_csv="",
            pipeline_parallel_split_points=(),
        )

    def names_of(self, plan: Plan, process: int) -> list[int | str]:
        """The parts of a process along pp, in the order in which a micro-batch meets them. (Where
        stages lie in a V, the first process has the head as well.)"""
        v_shaped = self.run.parallelism.pipeline_parallel_schedule in stages.V_SHAPED
        last = 0 if v_shaped else plan.pp - 1
        names: list[int | str] = [*self.layers_of(plan.pp)[process]]
        if process == 0:
            names.insert(0, EMBED)
        if process == last:
            names.append(HEAD)
        return names
