"""What a step holds: every part of a model run forward and backward on fake tensors, and its live bytes added up over a step.

A part is the embedding, a kind of block, or the head with the loss. Fake tensors have shapes and no numbers, so a block of a 70B
model takes a tenth of a second. docs/planning.md says how the parts are put together, and what is left out.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longfire.data.pack import NO_LABEL
from longfire.mixers.mixer import Sequence
from longfire.model import Block, Model
from longfire.ops import pretending_cuda
from longfire.ops.cross_entropy import fused
from longfire.parallel.apply import recompute

MASTER_BYTES = 4  # of a parameter, its gradient and each of Adam's two moments
# Operators of ours whose loops hold no more than a token's numbers beside their results; opening them would take minutes.
ONE_TOKEN_AT_A_TIME = ("longfire::scan_tokens", "longfire::scan_tokens_backward")
EMBED, HEAD = "embedding", "head and loss"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, after each operation: of fake tensors as of real ones."""

    def __init__(self, *there: Any) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now, self.instants = 0, []
        self.note(there)

    def note(self, tensors: Any) -> None:
        """Count the storages of these (any nesting) until they die."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    weakref.finalize(storage, self.forget, key)
                    self.sizes[key] = 0
                self.now += storage.nbytes() - self.sizes[key]
                self.sizes[key] = storage.nbytes()

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = OPDEFS.get(operation.name())
        if own is None or operation.name() in ONE_TOKEN_AT_A_TIME:
            out = operation(*args, **(kwargs or {}))
        else:
            with self:  # an operator of ours: what it holds while it works counts too
                out = own._init_fn(*args, **(kwargs or {}))
        self.note((args, kwargs, out))
        self.instants.append(self.now)
        return out


@dataclass(frozen=True)
class Part:
    """The bytes of one part above what lay there before it, for so many rows.

    forward, backward: after each operation; what enters is counted, and gradients of the parameters unless they were added to some
    that lay there. kept: from forward to backward, without what the next part is given. passed: that.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    kept: int
    passed: int

    @property
    def forward_peak(self) -> int:
        return max(self.forward)

    @property
    def backward_peak(self) -> int:
        return max(self.backward)

    def without(self, kept: float) -> "Part":
        """The part, with so much less held from forward to backward."""
        forward, backward = (tuple(x - kept for x in instants) for instants in (self.forward, self.backward))
        return replace(self, forward=forward, backward=backward, kept=self.kept - kept)

    def passing(self, share: float) -> "Part":
        """The part, giving the next one only a share of the row."""
        return replace(self, passed=self.passed * share)

    @classmethod
    def of_rows(cls, one: "Part", two: "Part", rows: int) -> "Part":
        """The part for any number of rows, from one row and two: each instant is a straight line, though their maximum is not.
        Where the number of operations grows with the rows (the chunks of the loss), the maximum is all there is."""

        def line(a: int, b: int) -> int:
            return a + (b - a) * (rows - 1)

        def instants(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
            return (max(map(line, a, b)),) if len(a) == len(b) else (line(max(a), max(b)),)

        return cls(
            instants(one.forward, two.forward),
            instants(one.backward, two.backward),
            line(one.kept, two.kept),
            line(one.passed, two.passed),
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
    """What comes after a part: takes its output, and gives back a gradient that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.size, ctx.dtype = y.shape, y.dtype
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Tensor:
        return d_loss.new_empty(ctx.size, dtype=ctx.dtype)


def traced(
    forward: Callable[[list[Tensor]], Tensor], enters: tuple[Any, ...], module: nn.Module, accumulated: bool, there: Any
) -> Part:
    """Run a part on fake tensors. `forward` gets what enters, (size, dtype) or nothing, in a list that it may empty.

    accumulated: gradients lie there already, from an earlier microbatch. there: other tensors that are no part's.
    """
    parameters, leaf = list(module.parameters()), torch.zeros((), requires_grad=True)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if accumulated else None
    live = LiveBytes(leaf, parameters, [p.grad for p in parameters], there)
    before = live.now
    with live:
        box = [Entry.apply(leaf, *enters)] if enters else []
        y = forward(box)
        del box
        passed = y.untyped_storage().nbytes() if y.dim() else 0
        kept, operations = live.now - before - passed, len(live.instants)
        loss = Exit.apply(y) if y.dim() else y
        del y
        loss.backward()
    instants = tuple(now - before for now in live.instants)
    return Part(instants[:operations], instants[operations:], kept, passed)


class Meter:
    """Measures the parts of one process's model: its share of a model of `shape`, rows of `seq_len` tokens.

    as_cuda: fake tensors lie on the CPU whatever they stand for; this leaves out what only a CPU would do (ops.pretending_cuda).
    parts_of_row: sequence parallel: between mixers and MLPs a process holds one of so many parts of the row.
    """

    def __init__(self, model: Model, seq_len: int, chunk_tokens: int, as_cuda: bool, parts_of_row: int = 1) -> None:
        self.model, self.seq_len, self.chunk_tokens, self.as_cuda = model, seq_len, chunk_tokens, as_cuda
        self.parts_of_row = parts_of_row
        self.kinds: dict[Any, int] = {}  # what a block is made of -> the first such layer
        self.kind_of = [self.kinds.setdefault(made_of(block), layer) for layer, block in enumerate(model.layers)]
        self.known: dict[tuple, Part] = {}

    def part(self, which: int | str, remat: str, rows: int, accumulated: bool = False) -> Part:
        """The embedding, the head, or layer `which` (layers of one kind are one)."""
        which = which if isinstance(which, str) else self.kind_of[which]
        key = which, "none" if isinstance(which, str) else remat, rows, accumulated
        if key not in self.known and (rows <= 2 or not self.as_cuda):
            self.measure(*key[1:])
        elif key not in self.known:
            one, two = (self.part(which, remat, n, accumulated) for n in (1, 2))
            self.known[key] = Part.of_rows(one, two, rows)
        return self.known[key]

    def measure(self, remat: str, rows: int, accumulated: bool) -> None:
        """All blocks, since one may use what an earlier one left in `seq.shared`; and the ends, which no remat changes."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        ends = copy.deepcopy(with_layers(self.model, []))
        blocks = {layer: copy.deepcopy(self.model.layers[layer]) for layer in self.kinds.values()}
        with pretending_cuda(self.as_cuda), mode, torch.device("cpu"):
            for module in (ends, *blocks.values()):
                make_fake(module)
            seq = self.sequence(rows)
            self.prepare(ends, seq)
            size = (rows, self.seq_len, self.model.shape.hidden_size)
            enters = size, torch.float32 if self.model.shape.residual_in_fp32 else self.model.compute_dtype
            for layer, block in blocks.items():
                if remat != "none" and not (remat == "mlp" and block.mlp is None):
                    recompute(block, remat)
                there = seq.positions_BT, seq.noise_BT, seq.shared
                part = traced(lambda box: block(box[0], seq), enters, block, accumulated, there)
                if self.parts_of_row > 1:
                    shared = part.kept if remat == "block" else between_regions(block, enters, seq)
                    part = part.without(shared * (1 - 1 / self.parts_of_row)).passing(1 / self.parts_of_row)
                self.known[layer, remat, rows, accumulated] = part
                seq.shared = {name: detached(shared) for name, shared in seq.shared.items()}
            if (HEAD, "none", rows, accumulated) not in self.known:
                embedding = self.embedding(ends, rows, accumulated).passing(1 / self.parts_of_row)
                self.known[EMBED, "none", rows, accumulated] = embedding
                self.known[HEAD, "none", rows, accumulated] = self.head(ends, enters, accumulated)

    def sequence(self, rows: int) -> Sequence:
        tokens_BT, noise_BT = (torch.zeros(rows, self.seq_len, dtype=kind) for kind in (torch.int64, torch.int32))
        return Sequence(tokens_BT, noise_BT=noise_BT if self.model.shape.drops else None)

    def prepare(self, ends: Model, seq: Sequence) -> None:
        ends.prepare(seq)
        for layer in self.kinds.values():
            self.model.layers[layer].mixer.prepare(seq)

    def embedding(self, ends: Model, rows: int, accumulated: bool) -> Part:
        """With what all layers share. A tied head has left its gradient there."""
        seq = self.sequence(rows)

        def forward(_: list[Tensor]) -> Tensor:
            self.prepare(ends, seq)
            return ends.embedded(seq.positions_BT, seq)

        embed = nn.ModuleList([m for m in (ends.embed, ends.positions, ends.embed_norm, ends.shared) if m is not None])
        accumulated = accumulated or self.model.shape.tie_word_embeddings
        return traced(forward, (), embed, accumulated, (seq.positions_BT, seq.noise_BT))

    def head(self, ends: Model, enters: tuple[Any, ...], accumulated: bool) -> Part:
        labels_N = torch.zeros(enters[0][0] * enters[0][1], dtype=torch.int64)

        def forward(box: list[Tensor]) -> Tensor:
            hidden_BTD = ends.norm(box.pop()).to(self.model.compute_dtype)
            return fused(hidden_BTD.flatten(0, 1), ends.head.weight, labels_N, self.chunk_tokens, NO_LABEL)

        return traced(forward, enters, nn.ModuleList([ends.norm, ends.head]), accumulated, labels_N)


def made_of(block: nn.Module) -> Any:
    """Blocks of which this is equal hold the same."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return type(block.mixer), str(getattr(block.mixer, "shape", "")), shapes


class Nothing(torch.autograd.Function):
    """Like what it is given, keeping nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        return torch.empty_like(d_y)


def between_regions(block: nn.Module, enters: tuple[Any, ...], seq: Sequence) -> int:
    """What a block keeps outside its mixer and its MLP: the sums, the norms."""
    bare = copy.copy(block)
    bare._modules = dict(block._modules)
    bare.mixer = Apart()
    bare.mlp = None if block.mlp is None else Apart()
    return traced(lambda box: Block.forward(bare, box[0], seq), enters, bare, False, seq.positions_BT).kept


class Apart(nn.Module):
    """In the place of a mixer or an MLP."""

    def forward(self, x_BTD: Tensor, *_: Any) -> Tensor:
        return Nothing.apply(x_BTD)


def share_of(model: Model, tp: int) -> Model:
    """What one of `tp` processes holds of a model on meta: each parameter cut as the roles beside the layers say.

    Until parallel/tensor.py is here, whose `split` takes this function's place.
    """
    if tp == 1:
        return model
    for block in model.layers:
        mixer, mlp = block.mixer, block.mlp
        roles = {**mixer.roles}
        wide = max((m.in_features for n, m in mixer.named_modules() if roles.get(n) == "row"), default=0)
        for name, module in mixer.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                role = roles.get(name) or roles.get(f"{name}.{leaf}".strip("."), "replicate")
                whole_norm = leaf == "weight" and parameter.dim() == 1 and len(parameter) == wide
                dim = {"column": 0, "head": 0, "row": 1 if parameter.dim() > 1 else None}.get(role, 0 if whole_norm else None)
                narrow(module, leaf, dim, tp)
        if isinstance(getattr(mixer, "heads", None), int):
            mixer.heads //= tp
        for name, module in mlp.named_children() if mlp is not None else ():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                into = name in ("down_proj", "value")
                narrow(module, leaf, (1 if parameter.dim() > 1 else None) if into else 0, tp)
    for module in model.shared.values():
        for leaf, _ in list(module.named_parameters(recurse=False)):
            narrow(module, leaf, 1, tp)
    tied = model.head.weight is model.embed.weight
    narrow(model.embed, "weight", 0, tp)
    narrow(model.head, "weight", 0, tp)
    if tied:
        model.head.weight = model.embed.weight
    return model


def narrow(module: nn.Module, leaf: str, dim: int | None, parts: int) -> None:
    """Keep one of so many parts of a parameter, rounded up."""
    parameter = getattr(module, leaf)
    if dim is not None and parameter is not None and parameter.shape[dim] >= parts:
        size = list(parameter.shape)
        size[dim] = -(-size[dim] // parts)
        setattr(module, leaf, nn.Parameter(parameter.new_empty(size)))


def with_layers(model: Model, layers: list[nn.Module]) -> Model:
    """The same model with these blocks, its parameters shared."""
    made = copy.copy(model)
    made._modules = {**model._modules, "layers": nn.ModuleList(layers)}
    return made


def make_fake(module: nn.Module) -> None:
    """Give it fake parameters on the CPU; what is tied stays tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(owner, name, made[parameter])


def detached(shared: Any) -> Any:
    return shared.detach().requires_grad_(shared.requires_grad) if isinstance(shared, Tensor) else shared
