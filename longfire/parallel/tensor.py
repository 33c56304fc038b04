"""Tensor parallelism: processes that share each matrix, and with it heads, channels and the words
of the vocabulary.

Mixers and MLPs are regions. What enters one is whole in every process; inside, a process has its
own heads or channels; a "row" matrix adds up the parts and ends it. Between regions everything is
in every process, or, with sequence parallel, each process has its own tokens of the row. The ways
across, and those of the gradients:

                  no sequence parallel              sequence parallel
    into a region same      gradients: sum          gather    gradients: scatter
    out of it     sum       gradients: same         scatter   gradients: gather

(Shoeybi 2019, Megatron-LM; Korthikanti 2022.) Layers only declare what is to be done with them
(`roles`), and know of no process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.block_execution import TensorRegions, as_it_is
from longfire.ops.linear import Linear, in_fp32, linear
from longfire.ops.norm import GroupedGatedRMSNorm, RMSNorm
from longfire.ops.vocabulary import VocabularyShard
from longfire.parallel.collectives import (
    CollectivePair,
    add_up,
    communicate,
    known_as,
    take_highest,
)
from longfire.parallel.mesh import Mesh
from longfire.parallel.sharding import (
    DimSplit,
    ShardSpec,
    keep_specs,
    local,
    placed_parameters,
    set_sharding,
    sharding_of,
)

if TYPE_CHECKING:
    from longfire.mixers.mixer import Mixer
    from longfire.mlps.contract import MLP
    from longfire.model import Model


@dataclass(frozen=True)
class TensorGroup:
    """The processes that share each matrix: how many, which one this is, and the ways between
    them."""

    size: int
    rank: int
    group: str
    sequence_parallel: bool

    @property
    def into(self) -> CollectivePair:
        if self.sequence_parallel:
            return CollectivePair("gather", "scatter", self.group)
        return CollectivePair("same", "sum", self.group)

    @property
    def out(self) -> CollectivePair:
        if self.sequence_parallel:
            return CollectivePair("scatter", "gather", self.group)
        return CollectivePair("sum", "same", self.group)

    @property
    def within(self) -> CollectivePair:
        """In the middle of a region: what is added up is used by the heads of one process, so its
        gradient is a part too."""
        return CollectivePair("sum", "sum", self.group)

    def range(self, size: int, parts: int = 1) -> tuple[tuple[int, int], ...]:
        """What of `size` numbers is on this process, in each of so many equal parts."""
        whole = size // parts
        low = whole * self.rank // self.size
        high = whole * (self.rank + 1) // self.size
        return tuple((part * whole + low, part * whole + high) for part in range(parts))

    def tokens(self, x_BT: Tensor) -> Tensor:
        """Those of each row on this process between regions."""
        return x_BT.chunk(self.size, 1)[self.rank].contiguous()

    def vocabulary(self, total: int) -> VocabularyShard:
        """The rows of the vocabulary on this process, of `total`."""
        (first, _), *_ = self.range(total)
        add = partial(add_up, group=self.group)
        return VocabularyShard(first, total, add, partial(take_highest, group=self.group))

    def regions(self, vocab_size: int) -> TensorRegions:
        """What happens between the regions of a model."""
        there, back, group = self.into
        enter = partial(communicate, there=there, back=back, group=group)
        own_tokens = self.tokens if self.sequence_parallel else as_it_is
        return TensorRegions(enter, own_tokens, self.vocabulary(vocab_size))


def split(model: "Model", mesh: Mesh, sequence_parallel: bool) -> None:
    """Leave of a whole model (on meta, or with values) what this process holds of it, in place.

    Every parameter's ShardSpec says what was split, and of which the gradient is only a part here:
    the step adds it up over tp after the backward.
    """
    if mesh.size("tp") == 1:
        return
    tp_group = TensorGroup(
        mesh.size("tp"), mesh.rank("tp"), known_as(mesh.group("tp")), sequence_parallel
    )
    inside: set[nn.Parameter] = set()  # whose gradient is that of a part of the heads
    for region, _ in named_regions(model):
        split_region(region, tp_group)
        ends = {f"{leaf}.bias" for leaf, role in region.roles.items() if role == "row"}
        inside |= {p for leaf, p in region.named_parameters() if leaf not in ends}
    for module in model.shared.values():
        dims = cast("dict[str, int]", module.split_dims)  # as every Mixer.whole_model declares
        for leaf, dim in dims.items():
            keep_range(module, leaf, dim, tp_group)
    split_vocabulary(model, tp_group)
    for name, parameter, spec in list(placed_parameters(model)):
        is_partial = sequence_parallel or parameter in inside  # of a part of the tokens, or heads
        if is_partial and spec.split is None:
            set_sharding(model, name, ShardSpec(gradient_is_partial=True))
    model.regions = tp_group.regions(model.config.vocab_size)
    for block in model.layers:
        block.regions = model.regions


def refusals(
    model: "Model",
    tp: int,
    sequence_parallel: bool,
    seq_len: int,
    distilled: bool = False,
    cp: int = 1,
) -> Iterator[str]:
    """What of a run with this whole model (on meta) so many processes cannot share, with the key,
    the number and the fix. (What rows shared by cp processes lack is filled up.)"""
    if tp == 1:
        return
    degree = f"parallelism.tensor_parallel_degree = {tp}"
    if model.head is None:
        yield (
            f"{degree} splits our own layers, not those of model.backend = 'transformers'; set it "
            "to 1"
        )
        return
    if distilled:
        yield (
            f"{degree}: a teacher's logits and hidden states are compared whole; set it to 1, or "
            "distillation.teacher to ''"
        )
    if sequence_parallel and seq_len % tp and cp == 1:
        yield (
            f"{degree} must divide training.seq_len = {seq_len}, since processes share the tokens "
            "of a row; change one of them, or set parallelism.sequence_parallel to false"
        )
    if model.config.vocab_size < tp:
        yield (
            f"{degree} is more than the vocabulary's {model.config.vocab_size} words; set it to "
            "at most that"
        )
    yield from sorted(
        {why for region, name in named_regions(model) for why in why_not_shared(region, name, tp)}
    )


def why_not_shared(region: "Mixer | MLP", name: str, tp: int) -> Iterator[str]:
    """Why tp processes cannot share a mixer or an MLP."""
    degree = f"parallelism.tensor_parallel_degree = {tp}"
    where = "in the model's config"
    missing = list(undeclared(region))
    if missing:
        yield from (f"{degree}: {name} does not say {what}; set it to 1" for what in missing)
        return
    counts = {what: getattr(region, what) for what in getattr(region, "divided", ())}
    for what, count in counts.items():
        if count % tp:
            yield (
                f"{degree} must divide the {count} {what} of {name}, since a process has whole "
                f"ones; set it to a divisor of {count}, or change {region.divided[what]} {where}"
            )
    for leaf, dim, parts in split_leaves(region):
        size = region.get_parameter(leaf).shape[dim] // parts
        if size % tp and not any(count % tp for count in counts.values()):
            yield (
                f"{degree} must divide the {size} channels of {name}.{leaf}; change their number "
                f"{where}"
            )


def undeclared(region: "Mixer | MLP") -> Iterator[str]:
    """What a mixer of a user's own, or an MLP, leaves open."""
    spoken_of = {leaf for role in region.roles for leaf in leaves(region, role)}
    if without := sorted({leaf for leaf, _ in region.named_parameters()} - spoken_of):
        yield f"how {', '.join(without)} is split (roles)"
    if unknown := sorted({role for role in region.roles.values() if role not in ROLES}):
        yield f"a role that is known where it says {', '.join(unknown)} (known: {', '.join(ROLES)})"
    if "row" not in region.roles.values():
        yield "which matrix ends it (a role that is row)"
    if not getattr(region, "divided", True):
        yield "which of its attributes count heads (divided)"


def named_regions(model: "Model") -> Iterator[tuple["Mixer | MLP", str]]:
    """Each mixer with the name that layer_types gives it, each MLP with its own."""
    for block, mixer, mlp in zip(model.layers, model.config.layer_types, model.config.mlp_types):
        yield block.mixer, mixer
        if block.mlp is not None:
            yield block.mlp, f"mlp {mlp}"


def split_region(region: "Mixer | MLP", tp_group: TensorGroup) -> None:
    """Split a mixer or an MLP as its roles say."""
    for leaf, dim, parts in split_leaves(region):
        keep_range(region, leaf, dim, tp_group, parts)
    for name, role in region.roles.items():
        if role in KINDS and has(region, name):
            replace_module(region, name, KINDS[role](region.get_submodule(name), tp_group))
    for count in getattr(region, "divided", ()):
        setattr(region, count, getattr(region, count) // tp_group.size)
    if hasattr(region, "heads"):
        region.first_head = tp_group.rank * region.heads
    if hasattr(region, "tokens_from") and region.context and tp_group.sequence_parallel:
        cast("MLP", region).tokens_from = tp_group.size  # a Mixer has none


def split_leaves(region: "Mixer | MLP") -> list[tuple[str, int, int]]:
    """Parameters that the roles split: name, dim, and equal parts of it that are split each by
    itself."""
    return [
        (leaf, int(role in ROWS), ROLES[role])
        for name, role in region.roles.items()
        for leaf in leaves(region, name)
        if ROLES[role]
        and not (role in ROWS and leaf.endswith(".bias"))  # a row's bias is added to what all made
    ]


def leaves(region: nn.Module, name: str) -> list[str]:
    """Names of the parameters that a role speaks of; none where these settings have none."""
    found: list[str] = []
    for leaf, _ in region.named_parameters():
        if leaf == name or leaf.startswith(f"{name}."):
            found.append(leaf)
    return found


def has(region: nn.Module, name: str) -> bool:
    return any(module == name and part is not None for module, part in region.named_modules())


def keep_range(
    module: nn.Module, name: str, dim: int, tp_group: TensorGroup, parts: int = 1
) -> None:
    """Leave of a parameter the local part, of each of so many equal parts; its spec says which."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    whole = module.get_parameter(name)
    size = whole.shape[dim]
    ranges = tp_group.range(size, parts)
    here = torch.cat([whole.detach().narrow(dim, begin, end - begin) for begin, end in ranges], dim)
    setattr(owner, leaf, nn.Parameter(here, requires_grad=whole.requires_grad))
    set_sharding(module, name, ShardSpec(DimSplit(dim, size, ranges)))


# role -> equal parts, each of which is split by itself: 1, but 2 for a matrix that makes two
# things; 0: every process has the whole
ROLES = {"column": 1, "head": 1, "halves": 2, "norm": 1, "row": 1, "inner_row": 1, "replicate": 0}
ROWS = ("row", "inner_row")  # split by columns, the matrix's inputs


# Modules that stand in the place of a layer's own, under its name and with its parameters: each is
# made on meta, so that it allocates none of its own.


class RowLinear(Linear):
    """A matrix of whose columns a process has its own: the products of all are added up, and then
    the bias."""

    def __init__(self, own: nn.Linear, road: CollectivePair) -> None:
        with torch.device("meta"):
            super().__init__(own.in_features, own.out_features, bias=own.bias is not None)
        self.weight = own.weight
        self.bias = own.bias
        self.road = road

    def forward(self, x: Tensor) -> Tensor:
        y = communicate(linear(x, self.weight), *self.road)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)


class SharedRMSNorm(RMSNorm):
    """A norm over the channels of all processes."""

    def __init__(self, own: RMSNorm, road: CollectivePair, processes: int) -> None:
        with torch.device("meta"):
            super().__init__(1, own.eps, own.weight is not None)
        self.weight = own.weight
        self.road = road
        self.processes = processes

    def forward(self, x: Tensor) -> Tensor:
        return rms_over_all(in_fp32(x), self).to(x.dtype)


class SharedGroupedGatedRMSNorm(GroupedGatedRMSNorm):
    """The same of Mamba-2's norm with one group."""

    def __init__(self, own: GroupedGatedRMSNorm, road: CollectivePair, processes: int) -> None:
        with torch.device("meta"):
            super().__init__(1, own.eps, own.groups, own.norm_before_gate)
        self.weight = own.weight
        self.road = road
        self.processes = processes

    def normalised(self, y_BTD: Tensor) -> Tensor:
        return rms_over_all(y_BTD, self)


def rms_over_all(x: Tensor, norm: SharedRMSNorm | SharedGroupedGatedRMSNorm) -> Tensor:
    mean = communicate(x.square().mean(-1, keepdim=True), *norm.road) / norm.processes
    y = x * (mean + norm.eps).rsqrt()
    if norm.weight is None:
        return y
    return y * norm.weight


def own_rows(linear: nn.Linear, tp_group: TensorGroup) -> nn.Module:
    return RowLinear(linear, tp_group.out)


def own_inner_rows(linear: nn.Linear, tp_group: TensorGroup) -> nn.Module:
    return RowLinear(linear, tp_group.within)


def shared_norm(norm: RMSNorm, tp_group: TensorGroup) -> nn.Module:
    """Whole groups lie in one process; one group over all channels lies in all."""
    if not isinstance(norm, GroupedGatedRMSNorm):
        return SharedRMSNorm(norm, tp_group.within, tp_group.size)
    if norm.groups == 1:
        return SharedGroupedGatedRMSNorm(norm, tp_group.within, tp_group.size)
    norm.groups //= tp_group.size
    return norm


KINDS: dict[str, Callable[[Any, TensorGroup], nn.Module]] = {
    "row": own_rows,
    "inner_row": own_inner_rows,
    "norm": shared_norm,
}


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another one was, under its name; it holds the same parameters, placed as
    they were."""
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    keep_specs(owner.get_submodule(leaf), module)
    setattr(owner, leaf, module)


class SharedEmbedding(nn.Embedding):
    """Rows of some words of the vocabulary; a word of another process gives zeros, and all are
    added up."""

    def __init__(self, weight_WD: nn.Parameter, road: CollectivePair, first: int) -> None:
        with torch.device("meta"):
            super().__init__(*weight_WD.shape)
        self.weight = weight_WD
        self.road = road
        self.first = first

    def forward(self, ids_BT: Tensor) -> Tensor:
        here_BT = ids_BT - self.first
        mine_BT = (here_BT >= 0) & (here_BT < self.num_embeddings)
        x_BTD = F.embedding(torch.where(mine_BT, here_BT, 0), self.weight)
        return communicate(torch.where(mine_BT[..., None], x_BTD, 0.0), *self.road)


class SharedHead(Linear):
    """Logits of some words; those of all words, where somebody asks for logits. Training and
    evaluation do not."""

    def __init__(self, own: nn.Linear, vocabulary: VocabularyShard) -> None:
        with torch.device("meta"):
            super().__init__(own.in_features, own.out_features, bias=False)
        self.weight = own.weight
        self.vocabulary = vocabulary

    def forward(self, x: Tensor) -> Tensor:
        here = linear(x, self.weight)
        first = self.vocabulary.first
        after = self.vocabulary.total - first - here.shape[-1]
        return self.vocabulary.add_up(F.pad(here, (first, after)))


def split_vocabulary(model: "Model", tp_group: TensorGroup) -> None:
    """Embedding and head: each process has its own part of the vocabulary."""
    vocabulary = tp_group.vocabulary(model.config.vocab_size)
    tied = model.head.weight is model.embed.weight
    keep_range(model.embed, "weight", 0, tp_group)
    rows_here = model.embed.get_parameter("weight")
    embedding = SharedEmbedding(rows_here, tp_group.out, vocabulary.first)
    replace_module(model, "embed", embedding)
    if tied:
        model.head.weight = model.embed.weight
        set_sharding(model, "head.weight", sharding_of(model, "embed.weight"))
    else:
        keep_range(model.head, "weight", 0, tp_group)
    replace_module(model, "head", SharedHead(model.head, vocabulary))


def add_up_partial_gradients(model: "Model", mesh: Mesh) -> None:
    """After the backward of a step: gradients that are a part in each process become their sum, in
    one message a dtype. Collective over tp."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    if mesh.size("tp") == 1:
        return
    for _, parameter, spec in placed_parameters(model):
        if spec.gradient_is_partial and parameter.grad is not None:
            gradient = local(parameter.grad)
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        total = mesh.sum(torch.cat([gradient.flatten() for gradient in gradients]), "tp")
        for gradient, part in zip(
            gradients, total.split([gradient.numel() for gradient in gradients])
        ):
            gradient.copy_(part.view_as(gradient))
