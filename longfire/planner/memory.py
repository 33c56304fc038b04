"""What a step holds: every part of a model run forward and backward on fake tensors, and its live
bytes added up over a step.

A part is the embedding, a kind of block, or the head with the loss. Fake tensors have shapes and no
numbers, so a block of a 70B model takes a tenth of a second. docs/planning.md says how the parts
are put together, and what is left out.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longfire.block_execution import as_it_is
from longfire.config.settings import ActivationCheckpoint, Attention, Remat
from longfire.data.pack import NO_LABEL
from longfire.mixers import mixer
from longfire.model import Block, Layers, Model
from longfire.ops import pretending_cuda
from longfire.ops.attention_choice import local_sequence
from longfire.ops.bf16 import native_bf16
from longfire.ops.cross_entropy import fused
from longfire.ops.delta_rule import delta_rule
from longfire.ops.documents import Documents
from longfire.ops.dplr import dplr
from longfire.ops.selective_scan import selective_scan
from longfire.ops.sequence_ops import LocalSequence, RecurrenceOp
from longfire.parallel.context_cost import AttentionHeads, LayerTraffic
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.remat import kept_on, save_memory
from longfire.parallel.tensor import split

MASTER_BYTES = 4  # of a parameter and of its gradient
# Operators of ours that are not opened: loops that hold a token's numbers beside their results
# (opening them would take minutes), and those that need other processes.
CLOSED = {
    f"longfire::{name}"
    for name in ("scan_tokens", "scan_tokens_backward", "summed", "gathered", "scattered")
}
EMBED = "embedding"
HEAD = "head and loss"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, after each operation: of fake tensors as of real
    ones."""

    def __init__(self, *there: Any, owners: Iterable[Tensor] = ()) -> None:
        """there: what lives already. owners: whose gradients are counted apart too."""
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = 0
        self.owners = list(owners)
        self.instants: list[tuple[int, int]] = []  # all bytes, and those of the owners' gradients
        self.operations: list[str] = []
        self.note((there, self.owners))

    def note(self, tensors: Any) -> None:
        """Count the storages of these (any nesting) until they die."""
        for tensor in tree_leaves(tensors):
            if (
                isinstance(tensor, Tensor) and tensor.device.type != "meta"
            ):  # meta stands for the host's memory
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    weakref.finalize(storage, self.forget, key)
                    self.sizes[key] = 0
                self.now += storage.nbytes() - self.sizes[key]
                self.sizes[key] = storage.nbytes()

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        own = OPDEFS.get(operation.name())
        if own is None or operation.name() in CLOSED:
            out = operation(*args, **(kwargs or {}))
        else:
            with self:  # an operator of ours: what it holds while it works counts too
                out = own._init_fn(*args, **(kwargs or {}))
        if operation.namespace == "prim":  # a question about a tensor
            return out
        self.note((args, kwargs, out))
        self.operations.append(operation.name())
        self.instants.append(
            (self.now, sum(p.grad.nbytes for p in self.owners if p.grad is not None))
        )
        return out

    @property
    def peak(self) -> int:
        return max(now for now, _ in self.instants)


@dataclass(frozen=True)
class Part:
    """The bytes of one part above what lay there before it, for so many rows.

    forward, backward: after each operation; what enters is counted, and so are the parameters'
    gradients. further: the backward of a microbatch whose gradients are added to those of an
    earlier one, which lie there before it. kept: from forward to backward, without what the next
    part is given. passed: that.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    further: tuple[int, ...]
    kept: int
    passed: int
    operations: tuple[str, ...] = ()  # of the forward

    @cached_property
    def forward_peak(self) -> int:
        return max(self.forward)

    def backward_peak(self, further: bool) -> int:
        return self.peaks[further]

    @cached_property
    def peaks(self) -> tuple[int, int]:
        return max(self.backward), max(self.further)

    @classmethod
    def of_rows(cls, one: "Part", two: "Part", rows: float) -> "Part":
        """The part for any number of rows, from one row and two (or for rows of any length, from a
        length and twice it): each instant is a straight line, though their maximum is not. Where
        the number of operations grows (the chunks of the loss), instants are paired from the front
        and from the back as long as they are the same operations; of what lies between, the maximum
        is all there is."""

        def line(a: int, b: int) -> int:
            return round(a + (b - a) * (rows - 1))

        def peak(a: tuple[int, ...], b: tuple[int, ...], same: tuple[int, int]) -> tuple[int, ...]:
            if len(a) == len(b):
                return (max(map(line, a, b)),)
            front, back = same
            pairs = [
                *zip(a[:front], b[:front]),
                *zip(a[len(a) - back :], b[len(b) - back :]),
                (max(a), max(b)),
            ]
            return (max(line(*pair) for pair in pairs),)

        same = (
            alike(one.operations, two.operations),
            alike(one.operations[::-1], two.operations[::-1]),
        )
        return cls(
            peak(one.forward, two.forward, same),
            peak(one.backward, two.backward, (0, 0)),
            peak(one.further, two.further, (0, 0)),
            line(one.kept, two.kept),
            line(one.passed, two.passed),
        )


def alike(some: Sequence, others: Sequence) -> int:
    """How many at the front are the same."""
    return next(
        (n for n, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others))
    )


class Entry(torch.autograd.Function):
    """What a part is given by the one before: a tensor that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return leaf.new_empty(size, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        return d_x.new_empty(()), None, None


class Exit(torch.autograd.Function):
    """What comes after a part: takes its output, and gives back a gradient that nobody else
    holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.size = y.shape
        ctx.dtype = y.dtype
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Tensor:
        return d_loss.new_empty(ctx.size, dtype=ctx.dtype)


def traced(
    forward: Callable[[list[Tensor]], Tensor],
    enters: tuple[Any, ...],
    module: nn.Module,
    there: Any,
    with_gradient: Any = (),
) -> Part:
    """Run a part on fake tensors. `forward` gets what enters, (size, dtype) or nothing, in a list
    that it may empty.

    there: tensors that are no part's. with_gradient: parameters that another part has given theirs
    already.
    """
    leaf = torch.zeros((), requires_grad=True)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter in set(with_gradient) else None
    lying = [parameter.grad for parameter in with_gradient]
    live = LiveBytes(leaf, there, lying, owners=module.parameters())
    before = live.now
    with live:
        box = [Entry.apply(leaf, *enters)] if enters else []
        y = forward(box)
        del box
        passed = y.untyped_storage().nbytes() if y.dim() else 0
        kept = live.now - before - passed
        operations = len(live.instants)
        loss = Exit.apply(y) if y.dim() else y
        del y
        loss.backward()
    theirs = sum(gradient.nbytes for gradient in lying)
    all_bytes = tuple(now - before for now, _ in live.instants)
    further = tuple(now - before - (gradients - theirs) for now, gradients in live.instants)
    names = tuple(live.operations[:operations])
    return Part(
        all_bytes[:operations], all_bytes[operations:], further[operations:], kept, passed, names
    )


class Listener:
    """Local SequenceOps that take note of what is asked of them: so a mixer need not say twice what
    crosses a cut of its sequence. An operation's map of the state is K x K where it mixes the key's
    channels, else a diagonal."""

    def __init__(self) -> None:
        self.local = LocalSequence()
        self.attends: list[AttentionHeads] = []
        self.states: list[tuple[int, int]] = []
        self.halos: list[int] = []

    def crossing(self) -> LayerTraffic:
        """What one block asked, of which nothing is kept."""
        asked = LayerTraffic(tuple(self.attends), tuple(self.states), sum(self.halos))
        for notes in (self.attends, self.states, self.halos):
            notes.clear()
        return asked

    def attention(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        *,
        window: int | None = None,
        **options: Any,
    ) -> Tensor:
        heads, (kv_heads, key_size) = q_BTHK.shape[2], k_BSGK.shape[2:]
        self.attends.append(AttentionHeads(heads, kv_heads, key_size, v_BSGV.shape[3], window or 0))
        return self.local.attention(q_BTHK, k_BSGK, v_BSGV, window=window, **options)

    def recurrence(
        self,
        op: RecurrenceOp,
        *inputs: Tensor | None,
        documents: Documents | None = None,
        **options: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        out, state = self.local.recurrence(op, *inputs, documents=documents, **options)
        if op in (delta_rule, dplr):
            transition = state.shape[1] * state.shape[2] ** 2
        elif op is selective_scan:
            transition = state.numel()
        else:
            transition = state.shape[1] * state.shape[3 if options.get("gv") is not None else 2]
        self.states.append((transition, state.numel()))
        return out, state

    def convolution(
        self,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        self.halos.append(x_BTD.shape[-1] * (weight_DW.shape[1] - 1))
        return self.local.convolution(x_BTD, weight_DW, bias_D, **options)

    def token_shift(self, x_BTD: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        self.halos.append(x_BTD.shape[-1])
        return self.local.token_shift(x_BTD, **options)

    def document_lengths(self, positions_BT: Tensor, documents: Documents | None) -> Tensor:
        return self.local.document_lengths(positions_BT, documents)

    def cut(self, x_BT: Tensor, fill: float = 0) -> Tensor:
        return x_BT

    def to(self, device: torch.device | str) -> "Listener":
        return self

    def of(self, rows: slice | Tensor) -> "Listener":
        return self


def through(block: nn.Module, seq: mixer.Sequence, box: list[Tensor]) -> Tensor:
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
        vocabulary = vocabulary._replace(add_up=as_it_is, take_highest=as_it_is)
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
    """Measures the parts of one process's share of a model, for rows of `seq_len` tokens.

    as_cuda: fake tensors lie on the CPU whatever they stand for; this leaves out what only a CPU
    would do (ops.pretending_cuda).
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
    ) -> None:
        """model: the whole one, on meta; it stays as it is."""
        self.seq_len = seq_len
        self.chunk_tokens = chunk_tokens
        self.as_cuda = as_cuda
        native_bf16(torch.device("cpu"))  # may be measured, which fake tensors cannot do
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.keeping = keeping
        self.kinds: dict[Any, int] = {}  # what a block is made of -> the first such layer
        self.kind_of = [
            self.kinds.setdefault(made_of(block), layer) for layer, block in enumerate(model.layers)
        ]
        self.model = share_of(copy.deepcopy(model), tp, sequence_parallel)
        self.small = with_layers(model, [model.layers[layer] for layer in self.kinds.values()])
        self.known: dict[tuple, Part] = {}

    def part(self, which: int | str, remat: Remat, rows: int) -> Part:
        """The embedding, the head, or layer `which` (layers of one kind are one)."""
        which = which if isinstance(which, str) else self.kind_of[which]
        key = which, "none" if isinstance(which, str) else remat, rows
        if key not in self.known and (rows <= 2 or not self.as_cuda):
            self.measure(*key[1:])
        elif key not in self.known:
            one = self.part(which, remat, 1)
            two = self.part(which, remat, 2)
            self.known[key] = Part.of_rows(one, two, rows)
        return self.known[key]

    def measure(self, remat: Remat, rows: int) -> None:
        """All blocks, since one may use what an earlier one left in `seq.shared`; and the ends,
        which no remat changes."""
        model = share_of(copy.deepcopy(self.small), self.tp, self.sequence_parallel)
        here = self.seq_len // self.tp if self.sequence_parallel else self.seq_len
        enters = (rows, here, model.config.hidden_size), model.stream_dtype
        with (
            pretending_cuda(self.as_cuda),
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.device("cpu"),
        ):
            make_fake(model)
            seq = self.sequence(rows)
            model.prepare(seq)
            for layer, block in zip(self.kinds.values(), model.layers):
                self.keeping.apply(block, remat)
                there = seq.positions_BT, seq.noise_BT, list(seq.shared.values())
                with kept_on("meta") if self.keeping.remat.offload else nullcontext():
                    self.known[layer, remat, rows] = traced(
                        partial(through, block, seq), enters, block, there
                    )
                seq.shared = mixer.Shared({name: detached(x) for name, x in seq.shared.items()})
            if (HEAD, "none", rows) not in self.known:
                self.known[EMBED, "none", rows] = self.embedding(model, rows)
                self.known[HEAD, "none", rows] = self.head(model, enters, rows)

    def sequence(self, rows: int) -> mixer.Sequence:
        tokens_BT = torch.zeros(rows, self.seq_len, dtype=torch.int64)
        ops = local_sequence(self.keeping.attention)
        noise_BT = None
        if self.small.config.drops:
            noise_BT = torch.zeros(rows, self.seq_len, dtype=torch.int32)
        return mixer.Sequence(tokens_BT, noise_BT=noise_BT, ops=ops)

    @cached_property
    def crossings(self) -> list[LayerTraffic]:
        """What of each layer looks over a cut of its rows: what it asks of `seq.ops` in a forward
        of a few tokens."""
        model = share_of(copy.deepcopy(self.small), self.tp, self.sequence_parallel)
        tokens = 2 * self.tp
        of_kind = {}
        with (
            pretending_cuda(self.as_cuda),
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.device("cpu"),
            torch.no_grad(),
        ):
            make_fake(model)
            listener = Listener()
            seq = mixer.Sequence(torch.zeros(1, tokens, dtype=torch.int64), ops=listener)
            model.prepare(seq)
            here = tokens // self.tp if self.sequence_parallel else tokens
            x_BTD = torch.empty(1, here, model.config.hidden_size, dtype=model.stream_dtype)
            for layer, block in zip(self.kinds.values(), model.layers):
                block(x_BTD, seq)
                of_kind[layer] = listener.crossing()
        return [of_kind[layer] for layer in self.kind_of]

    def embedding(self, model: Model, rows: int) -> Part:
        """With what all layers share. A tied head has left its gradient there."""
        seq = self.sequence(rows)

        def forward(_: list[Tensor]) -> Tensor:
            model.prepare(seq)
            return model.embed_tokens(seq.positions_BT, seq)

        tied = [model.embed.weight] if model.config.tie_word_embeddings else []
        return traced(forward, (), ends_of(model)[EMBED], (seq.positions_BT, seq.noise_BT), tied)

    def head(self, model: Model, enters: tuple[Any, ...], rows: int) -> Part:
        labels_N = torch.zeros(rows * self.seq_len, dtype=torch.int64)

        def forward(box: list[Tensor]) -> Tensor:
            hidden_BTD = model.final_norm(box.pop())
            hidden_ND = model.regions.enter(hidden_BTD).flatten(0, 1)
            options = (
                model.regions.vocabulary,
                model.config.final_logit_softcapping,
                model.config.use_l2warp,
            )
            return fused(
                hidden_ND, model.head.weight, labels_N, self.chunk_tokens, NO_LABEL, *options
            )

        return traced(forward, enters, ends_of(model)[HEAD], labels_N)


def ends_of(model: Model) -> dict[str, nn.ModuleList]:
    """What lies before the blocks and after them."""
    ends = {
        EMBED: (model.embed, model.positions, model.embed_norm, model.shared),
        HEAD: (model.norm, model.head),
    }
    found: dict[str, nn.ModuleList] = {}
    for name, modules in ends.items():
        found[name] = nn.ModuleList([m for m in modules if m is not None])
    return found


def with_layers(model: Model, layers: list[Block]) -> Model:
    """The same model with these blocks only."""
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made.layers = Layers(dict(enumerate(layers)))
    return made


def made_of(block: Block) -> Any:
    """Blocks of which this is equal hold the same."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    mlp = (block.mlp.name, str(block.mlp.config)) if block.mlp is not None else ()
    return type(block.mixer), str(block.mixer.config), mlp, shapes


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


def detached(shared: Any) -> Any:
    if isinstance(shared, Tensor):
        return shared.detach().requires_grad_(shared.requires_grad)
    return shared
