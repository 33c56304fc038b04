"""Tensor parallelism: processes that share each matrix, and with it heads, channels and the words of the vocabulary.

Mixers and MLPs are regions. What enters one is whole in every process; inside, a process has its own heads or channels; a "row"
matrix adds up the parts and ends it. Between regions everything is in every process, or, with sequence parallel, each process
has its own tokens of the row. The ways across, and those of the gradients:

                  no sequence parallel              sequence parallel
    into a region same      gradients: sum          gather    gradients: scatter
    out of it     sum       gradients: same         scatter   gradients: gather

(Shoeybi 2019, Megatron-LM; Korthikanti 2022.) Layers only declare what is to be done with them (`roles`), and know of no process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.cross_entropy import Words
from longfire.ops.linear import Linear, in_fp32, linear
from longfire.ops.norm import GroupedGatedRMSNorm, RMSNorm
from longfire.parallel.collectives import Road, add_up, cross, known_as, take_highest
from longfire.parallel.mesh import Mesh
from longfire.parallel.pieces import Split


@dataclass(frozen=True)
class Sharers:
    """The processes that share each matrix: how many, which one this is, and the ways between them."""

    size: int
    rank: int
    group: str
    sequence_parallel: bool

    @property
    def into(self) -> Road:
        return Road("gather", "scatter", self.group) if self.sequence_parallel else Road("same", "sum", self.group)

    @property
    def out(self) -> Road:
        return Road("scatter", "gather", self.group) if self.sequence_parallel else Road("sum", "same", self.group)

    @property
    def within(self) -> Road:
        """In the middle of a region: what is added up is used by the heads of one process, so its gradient is a part too."""
        return Road("sum", "sum", self.group)

    def range(self, size: int, parts: int = 1) -> tuple[tuple[int, int], ...]:
        """What of `size` numbers lies here, in each of so many equal parts."""
        whole = size // parts
        low, high = (whole * n // self.size for n in (self.rank, self.rank + 1))
        return tuple((part * whole + low, part * whole + high) for part in range(parts))

    def tokens(self, x_BT: Tensor) -> Tensor:
        """Those of each row that lie here between regions."""
        return x_BT.chunk(self.size, 1)[self.rank].contiguous()


def split(model: nn.Module, mesh: Mesh, sequence_parallel: bool) -> None:
    """Leave of a whole model (on meta, or with values) what this process holds of it, in place.

    model.splits tells what was split, by name; model.partial names the parameters that were not and whose gradient is only a part
    here: the step adds it up over tp after the backward.
    """
    if mesh.size("tp") == 1:
        return
    sharers = Sharers(mesh.size("tp"), mesh.rank("tp"), known_as(mesh.group("tp")), sequence_parallel)
    names = {id(module): name for name, module in model.named_modules()}
    whole: set[str] = set()  # parameters with a whole gradient
    splits: dict[str, Split] = model.splits
    for region in regions(model):
        for name, found in split_region(region, sharers).items():
            splits[f"{names[id(region)]}.{name}"] = found
        whole |= {f"{names[id(region)]}.{name}.bias" for name, role in region.roles.items() if role == "row"}
    for name, module in model.shared.items():
        for leaf, dim in module.split_dims.items():
            splits[f"shared.{name}.{leaf}"] = keep_range(module, leaf, dim, sharers)
    split_vocabulary(model, sharers, splits)
    own = {name for region in regions(model) for name, _ in region.named_parameters(prefix=names[id(region)])}
    for name, _ in model.named_parameters():
        if name not in splits and (sequence_parallel or (name in own and name not in whole)):
            model.partial.add(name)
    if sequence_parallel:
        see_own_tokens(model, sharers)


def regions(model: nn.Module) -> Iterator[nn.Module]:
    """Mixers and MLPs."""
    for block in model.layers:
        yield from (part for part in (block.mixer, block.mlp) if part is not None)


def split_region(region: nn.Module, sharers: Sharers) -> dict[str, Split]:
    """Split a mixer or an MLP as its roles say; what was split, by name."""
    splits: dict[str, Split] = {}
    for name, role in region.roles.items():
        parts, row = ROLES[role], role in ("row", "inner_row")
        for leaf in leaves(region, name):
            if parts and not (row and leaf.endswith(".bias")):  # a row's bias is added to what all made
                splits[leaf] = keep_range(region, leaf, int(row), sharers, parts)
        if role in KINDS and has(region, name):
            KINDS[role](region.get_submodule(name), sharers)
    for count in getattr(region, "divided", ()):
        setattr(region, count, getattr(region, count) // sharers.size)
    if hasattr(region, "heads"):
        region.first_head = sharers.rank * region.heads
    enter(region, sharers.into)
    return splits


def leaves(region: nn.Module, name: str) -> list[str]:
    """Names of the parameters that a role speaks of; none where these settings have none."""
    return [leaf for leaf, _ in region.named_parameters() if leaf == name or leaf.startswith(f"{name}.")]


def has(region: nn.Module, name: str) -> bool:
    return any(module == name and part is not None for module, part in region.named_modules())


def keep_range(module: nn.Module, name: str, dim: int, sharers: Sharers, parts: int = 1) -> Split:
    """Leave of a parameter what lies here, of each of so many equal parts."""
    path, _, leaf = name.rpartition(".")
    owner, whole = module.get_submodule(path), module.get_parameter(name)
    size = whole.shape[dim]
    ranges = sharers.range(size, parts)
    here = torch.cat([whole.detach().narrow(dim, begin, end - begin) for begin, end in ranges], dim)
    setattr(owner, leaf, nn.Parameter(here, requires_grad=whole.requires_grad))
    return Split(dim, size, ranges)


# role -> equal parts, each of which is split by itself: 1, but 2 for a matrix that makes two things; 0: every process has the whole
ROLES = {"column": 1, "head": 1, "halves": 2, "norm": 1, "row": 1, "inner_row": 1, "replicate": 0}


class RowLinear(Linear):
    """A matrix of whose columns a process has its own: the products of all are added up, and then the bias."""

    road: Road

    def forward(self, x: Tensor) -> Tensor:
        y = cross(linear(x, self.weight), *self.road)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SharedRMSNorm(RMSNorm):
    """A norm over the channels of all processes."""

    road: Road
    processes: int

    def forward(self, x: Tensor) -> Tensor:
        return rms_over_all(in_fp32(x), self).to(x.dtype)


class SharedGroupedGatedRMSNorm(GroupedGatedRMSNorm):
    """The same of Mamba-2's norm with one group."""

    road: Road
    processes: int

    def normalised(self, y_BTD: Tensor) -> Tensor:
        return rms_over_all(y_BTD, self)


def rms_over_all(x: Tensor, norm: Any) -> Tensor:
    mean = cross(x.square().mean(-1, keepdim=True), *norm.road) / norm.processes
    y = x * (mean + norm.eps).rsqrt()
    return y if norm.weight is None else y * norm.weight


def become(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """The module is of another kind from now on, under the same name and with the same parameters."""
    module.__class__ = kind
    for name, value in attributes.items():
        setattr(module, name, value)


def share_norm(norm: nn.Module, sharers: Sharers) -> None:
    """Whole groups lie in one process; one group over all channels lies in all."""
    grouped = isinstance(norm, GroupedGatedRMSNorm)
    if grouped and norm.groups > 1:
        norm.groups //= sharers.size
        return
    kind = SharedGroupedGatedRMSNorm if grouped else SharedRMSNorm
    become(norm, kind, road=sharers.within, processes=sharers.size)


KINDS: dict[str, Callable[[nn.Module, Sharers], None]] = {
    "row": lambda module, sharers: become(module, RowLinear, road=sharers.out),
    "inner_row": lambda module, sharers: become(module, RowLinear, road=sharers.within),
    "norm": share_norm,
}


def enter(region: nn.Module, road: Road) -> None:
    """What the region sees comes by this road. It belongs to the forward, so that a recomputed region brings it again."""
    inside = region.forward

    def entered(x_BTD: Tensor, *rest: Any) -> Tensor:
        return inside(cross(x_BTD, *road), *rest)

    region.forward = entered


class SharedEmbedding(nn.Embedding):
    """Rows of some words of the vocabulary; a word of another process gives zeros, and all are added up."""

    road: Road
    first: int

    def forward(self, ids_BT: Tensor) -> Tensor:
        here_BT = ids_BT - self.first
        mine_BT = (here_BT >= 0) & (here_BT < self.num_embeddings)
        x_BTD = F.embedding(torch.where(mine_BT, here_BT, 0), self.weight)
        return cross(torch.where(mine_BT[..., None], x_BTD, 0.0), *self.road)


class SharedHead(Linear):
    """Logits of some words; those of all words, where somebody asks for logits. Training and evaluation do not."""

    words: Words

    def forward(self, x: Tensor) -> Tensor:
        here, first = linear(x, self.weight), self.words.first
        after = self.words.total - first - here.shape[-1]
        return self.words.add_up(F.pad(here, (first, after)))


def split_vocabulary(model: nn.Module, sharers: Sharers, splits: dict[str, Split]) -> None:
    """Embedding, head and loss: each process has its own words."""
    (first, last), total = sharers.range(model.shape.vocab_size)[0], model.shape.vocab_size
    tied = model.head.weight is model.embed.weight
    splits["embed.weight"] = keep_range(model.embed, "weight", 0, sharers)
    become(model.embed, SharedEmbedding, road=sharers.out, first=first, num_embeddings=last - first)
    if tied:
        model.head.weight = model.embed.weight
    else:
        splits["head.weight"] = keep_range(model.head, "weight", 0, sharers)
    words = Words(first, total, partial(add_up, group=sharers.group), partial(take_highest, group=sharers.group))
    become(model.head, SharedHead, words=words)
    model.words = words
    model.to_head = lambda hidden_BTD: cross(hidden_BTD, *sharers.into)


def see_own_tokens(model: nn.Module, sharers: Sharers) -> None:
    """What is added between regions (positions, noise) is that of the tokens that lie here."""

    def of_own_tokens(seq: Any) -> Any:
        noise_BT = None if seq.noise_BT is None else sharers.tokens(seq.noise_BT)
        return replace(seq, positions_BT=sharers.tokens(seq.positions_BT), noise_BT=noise_BT)

    def for_own_tokens(added: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda y_BTD, x_BTD, seq, place: added(y_BTD, x_BTD, of_own_tokens(seq), place)

    embedded = model.embedded
    model.embedded = lambda ids_BT, seq: embedded(ids_BT, of_own_tokens(seq))
    for block in model.layers:
        block.added = for_own_tokens(block.added)
