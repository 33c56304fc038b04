"""What a step holds: every part of a model measured on fake tensors, for one process's share.

Fake tensors have shapes and no numbers, so a block of a 70B model takes a tenth of a second.
docs/planning.md says how the parts are put together, and what is left out.
"""

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longfire.block_execution import as_it_is
from longfire.config.settings import ActivationCheckpoint, Attention, Remat
from longfire.data.pack import NO_LABEL
from longfire.mixers import mixer
from longfire.model import Block, Layers, Model
from longfire.ops.attention_choice import local_sequence
from longfire.ops.bf16 import native_bf16
from longfire.ops.cross_entropy import LossRules, chunk_size, fused
from longfire.ops.pretending import pretending_cuda
from longfire.parallel.activation_offload import ActivationOffload
from longfire.parallel.context_cost import LayerTraffic
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.remat import save_memory
from longfire.parallel.tensor import split
from longfire.planner.cut_sequence import CutSequence
from longfire.planner.listener import Listener
from longfire.planner.part import EMBED, HEAD, Entering, Part, traced


def through(
    block: nn.Module,
    seq: mixer.Sequence,
    box: list[Tensor],
) -> Tensor:
    """The block's outputs, of the one tensor in the box."""
    outputs = block(box[0], seq)
    return outputs[0] if isinstance(outputs, tuple) else outputs


class OtherProcesses:
    """Stands for the group of processes that share matrices with this one, none of which is
    there."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.group_name = f"planned for {count}"

    def size(self) -> int:
        return self.count


class PlannedMesh(Mesh):
    """The first process of a mesh that nobody has joined."""

    def rank(self, *axes: str) -> int:
        return 0

    def group(self, axis: str) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, OtherProcesses(self.size(axis)))


def share_of(model: Model, tp: int, sequence_parallel: bool) -> Model:
    """What the first of `tp` processes holds of a whole model on meta, in place."""
    split(model, PlannedMesh({**ALONE.degrees, "tp": tp}), sequence_parallel)
    vocabulary = model.regions.vocabulary
    if vocabulary is not None:
        vocabulary = vocabulary._replace(
            add_up=as_it_is,
            take_highest=as_it_is,
            sum_for_all=as_it_is,
            sum_for_parts=as_it_is,
        )
        model.regions = replace(model.regions, vocabulary=vocabulary)
    return model


@dataclass(frozen=True)
class Keeping:
    """What of the settings decides what blocks keep, beside the mode, which is a plan's."""

    attention: Attention = field(default_factory=Attention)
    remat: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    mlp_chunk_size: int = 0

    def apply(self, block: Block, mode: Remat) -> None:
        save_memory(block, replace(self.remat, mode=mode), self.mlp_chunk_size)


class Meter:
    """Measures the parts of one process's share of a model, for sequences of `seq_len` tokens.

    as_cuda: fake tensors are on the CPU whatever they stand for; this leaves out what only a CPU
    would do (ops.pretending.pretending_cuda). kernels: ops hold what the kernels of fla and Triton
    hold, which run on CUDA where `model.kernels` is auto. is_cut: these tokens are a process's
    piece of longer sequences.
    """

    def __init__(
        self,
        model: Model,
        seq_len: int,
        chunk_tokens: int,
        as_cuda: bool = True,
        tp: int = 1,
        sequence_parallel: bool = True,
        keeping: Keeping = Keeping(),
        kernels: bool = False,
        is_cut: bool = False,
    ) -> None:
        """model: the whole one, on meta; it stays as it is."""
        self.seq_len = seq_len
        self.chunk_tokens = chunk_tokens
        self.as_cuda = as_cuda
        self.kernels = kernels
        self.is_cut = is_cut
        native_bf16(torch.device("cpu"))  # may be measured, which fake tensors cannot do
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.keeping = keeping
        self.kinds: dict[Hashable, int] = {}  # what a block is made of -> the first such layer
        self.kind_of: list[int] = []
        for layer, block in enumerate(model.layers):
            self.kind_of.append(self.kinds.setdefault(made_of(block), layer))
        self.model = share_of(copy.deepcopy(model), tp, sequence_parallel)
        self.small = with_layers(model, [model.layers[layer] for layer in self.kinds.values()])
        self.known: dict[tuple[int | str, Remat, int], Part] = {}
        self.heads: dict[tuple[int, int], Part] = {}  # by sequences and tokens of each

    def part(
        self,
        which: int | str,
        remat: Remat,
        rows: int,
    ) -> Part:
        """The embedding, the head, or layer `which` (layers of one kind are one)."""
        if which == HEAD:
            return self.head_part(rows, self.seq_len)
        if isinstance(which, str):
            remat = "none"
        else:
            which = self.kind_of[which]
        key = which, remat, rows
        if key not in self.known and (rows <= 2 or not self.as_cuda):
            self.measure(remat, rows)
        elif key not in self.known:
            one = self.part(which, remat, 1)
            two = self.part(which, remat, 2)
            self.known[key] = Part.of_sequences(one, two, rows)
        return self.known[key]

    @contextmanager
    def without_numbers(self) -> Iterator[None]:
        """Inside, tensors have a type and a shape only, and ops hold what those of CUDA would,
        where this run's device is one."""
        with (
            pretending_cuda(self.as_cuda, self.kernels),
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.device("cpu"),
        ):
            yield

    def measure(self, remat: Remat, rows: int) -> None:
        """All blocks, since one may use what an earlier one left in `seq.shared`; and the
        embedding, which no remat changes."""
        model = share_of(copy.deepcopy(self.small), self.tp, self.sequence_parallel)
        here = self.tokens_here(self.seq_len)
        enters = (rows, here, model.config.hidden_size), model.stream_dtype
        with self.without_numbers():
            make_fake(model)
            seq = self.sequence(rows)
            model.prepare(seq)
            offload = ActivationOffload("meta", window_bytes=0)
            for layer, block in zip(self.kinds.values(), model.layers):
                self.keeping.apply(block, remat)
                existing = seq.positions_BT, seq.noise_BT, list(seq.shared.values())
                with offload() if self.keeping.remat.offload else nullcontext():
                    self.known[layer, remat, rows] = traced(
                        partial(through, block, seq),
                        enters,
                        block,
                        existing,
                    )
                seq.shared = detached(seq.shared)
            if (EMBED, "none", rows) not in self.known:
                self.known[EMBED, "none", rows] = self.embedding(model, rows)

    def head_part(self, rows: int, seq_len: int) -> Part:
        """The head with the loss, for so many sequences of so many tokens.

        What the logits of a chunk hold grows with the tokens up to a whole chunk, and from there on
        no more: more than two chunks are read off the straight line through one and two."""
        if self.small.config.num_classes:
            return self.measured_head(rows, seq_len)
        tokens = rows * seq_len
        with pretending_cuda(self.as_cuda, self.kernels):
            chunk = chunk_size(self.chunk_tokens, torch.device("cpu"))
        if tokens <= 2 * chunk or not self.as_cuda:
            return self.measured_head(1, tokens)
        one = self.measured_head(1, chunk)
        two = self.measured_head(1, 2 * chunk)
        return Part.of_sequences(one, two, tokens / chunk)

    def measured_head(self, rows: int, seq_len: int) -> Part:
        """The same, not read off a line."""
        seq_len -= seq_len % self.tp  # each process has whole tokens
        if (rows, seq_len) not in self.heads:
            model = share_of(copy.deepcopy(self.small), self.tp, self.sequence_parallel)
            size = rows, self.tokens_here(seq_len), model.config.hidden_size
            with self.without_numbers():
                make_fake(model)
                enters = size, model.stream_dtype
                self.heads[rows, seq_len] = self.head(model, enters, rows, seq_len)
        return self.heads[rows, seq_len]

    def tokens_here(self, tokens: int) -> int:
        """Of a sequence, those whose activations between the split matrices are on this process."""
        return tokens // self.tp if self.sequence_parallel else tokens

    def sequence(self, rows: int) -> mixer.Sequence:
        """A batch of sequences without numbers."""
        tokens_BT = torch.zeros(rows, self.seq_len, dtype=torch.int64)
        config = self.small.config
        ops = local_sequence(self.keeping.attention)
        if config.direction == "both":
            ops = self.small.local_ops
        if self.is_cut:
            ops = CutSequence(ops.attend, ops.chunks)
        noise_BT = None
        if config.drops:
            noise_BT = torch.zeros(rows, self.seq_len, dtype=torch.int32)
        pixels_BCHW = None
        if config.image_size:
            shape = (rows, config.image_channels, config.image_size, config.image_size)
            pixels_BCHW = torch.zeros(shape)
        return mixer.Sequence(tokens_BT, noise_BT=noise_BT, ops=ops, pixels_BCHW=pixels_BCHW)

    @cached_property
    def crossings(self) -> list[LayerTraffic]:
        """What of each layer looks over a cut of its sequences: what it asks of `seq.ops` in a
        forward of a few tokens."""
        model = share_of(copy.deepcopy(self.small), self.tp, self.sequence_parallel)
        tokens = 2 * self.tp
        of_kind: dict[int, LayerTraffic] = {}
        with self.without_numbers(), torch.no_grad():
            make_fake(model)
            listener = Listener()
            seq = mixer.Sequence(torch.zeros(1, tokens, dtype=torch.int64), ops=listener)
            model.prepare(seq)
            size = (1, self.tokens_here(tokens), model.config.hidden_size)
            x_BTD = torch.empty(size, dtype=model.stream_dtype)
            for layer, block in zip(self.kinds.values(), model.layers):
                block(x_BTD, seq)
                of_kind[layer] = listener.crossing()
        return [of_kind[layer] for layer in self.kind_of]

    def embedding(self, model: Model, rows: int) -> Part:
        """With what all layers share. A tied head has left its gradient in the embedding."""
        seq = self.sequence(rows)

        def forward(_: list[Tensor]) -> Tensor:
            model.prepare(seq)
            ids_BT = seq.positions_BT
            if seq.pixels_BCHW is not None:
                ids_BT = ids_BT[:, :1]  # the class token
            return model.embed_tokens(ids_BT, seq)

        tied = [model.embed.weight] if model.config.tie_word_embeddings else []
        return traced(
            forward,
            None,
            ends_of(model)[EMBED],
            (seq.positions_BT, seq.noise_BT),
            tied,
        )

    def head(
        self,
        model: Model,
        enters: Entering,
        rows: int,
        seq_len: int,
    ) -> Part:
        """With the loss."""
        labels_N = torch.zeros(rows * seq_len, dtype=torch.int64)

        def of_classes(box: list[Tensor]) -> Tensor:
            hidden_BTD = model.final_norm(box.pop())
            logits_BN = model.head(hidden_BTD[:, 0]).float()
            return F.cross_entropy(logits_BN, labels_N[:rows], reduction="sum")

        def forward(box: list[Tensor]) -> Tensor:
            hidden_BTD = model.final_norm(box.pop())
            hidden_ND = model.regions.enter(hidden_BTD).flatten(0, 1)
            config = model.config
            rules = LossRules(
                NO_LABEL,
                model.regions.vocabulary,
                config.final_logit_softcapping,
                config.use_l2warp,
                correct=None,
            )
            return fused(hidden_ND, model.head.weight, labels_N, self.chunk_tokens, rules)

        if model.config.num_classes:
            return traced(of_classes, enters, ends_of(model)[HEAD], labels_N)
        return traced(forward, enters, ends_of(model)[HEAD], labels_N)


def ends_of(model: Model) -> dict[str, nn.ModuleList]:
    """What is before the blocks and after them."""
    ends = {
        EMBED: (model.embed, model.patches, model.positions, model.embed_norm, model.shared),
        HEAD: (model.norm, model.head),
    }
    found: dict[str, nn.ModuleList] = {}
    for name, modules in ends.items():
        present = [module for module in modules if module is not None]
        found[name] = nn.ModuleList(present)
    return found


def with_layers(model: Model, layers: list[Block]) -> Model:
    """The same model with these blocks only."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made.layers = Layers(dict(enumerate(layers)))
    return made


def made_of(block: Block) -> Hashable:
    """Blocks of which this is equal hold the same."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, parameter in block.named_parameters():
        shapes.append((name, tuple(parameter.shape)))
    mlp: tuple[str, ...] = ()
    if block.mlp is not None:
        mlp = block.mlp.name, str(block.mlp.config)
    return type(block.mixer), str(block.mixer.config), mlp, tuple(shapes)


def make_fake(module: nn.Module) -> None:
    """Give it fake parameters on the CPU; what is tied stays tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(owner, name, made[parameter])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def detached(shared: mixer.Shared) -> mixer.Shared:
    """The same values, of which the tensors are leaves of a new graph."""
    found = mixer.Shared()
    for name, value in shared.items():
        if isinstance(value, Tensor):
            value = value.detach().requires_grad_(value.requires_grad)
        found[name] = value
    return found
