"""Modules that stand in the place of a layer's own, under its name and with its parameters, where
processes share matrices. Each is made on meta, so that it allocates no parameters of its own."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.ops.grouped_norm import GroupedGatedRMSNorm
from longfire.ops.linear import Linear, in_fp32, linear
from longfire.ops.norm import RMSNorm
from longfire.ops.vocabulary import VocabularyShard
from longfire.parallel.collectives import CollectivePair, communicate
from longfire.parallel.tensor_group import TensorGroup

REPLACED_ROLES = ("row", "inner_row", "norm")


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
        y = communicate(self.product(x), *self.road)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)


class OneHeadLinear(Linear):
    """A matrix that makes some heads, of which a process needs one. Every process has the whole
    matrix, and a part of its gradient."""

    def __init__(self, own: nn.Linear, head: int, heads: int) -> None:
        with torch.device("meta"):
            super().__init__(own.in_features, own.out_features, bias=own.bias is not None)
        self.weight = own.weight
        self.bias = own.bias
        size = own.out_features // heads
        self.rows = slice(head * size, (head + 1) * size)

    def product(self, x: Tensor, bias_W: Tensor | None = None) -> Tensor:
        if bias_W is not None:
            bias_W = bias_W[self.rows]
        if self.float8 is not None:
            return self.float8.linear(x, self.weight[self.rows], bias_W)
        rounded_WD = self.rounded_WD
        if rounded_WD is not None:
            rounded_WD = rounded_WD[self.rows]
        return linear(x, self.weight[self.rows], bias_W, rounded_WD)


class SharedRMSNorm(RMSNorm):
    """A norm over the channels of all processes."""

    def __init__(
        self,
        own: RMSNorm,
        road: CollectivePair,
        processes: int,
    ) -> None:
        with torch.device("meta"):
            super().__init__(1, own.eps, own.weight is not None)
        self.weight = own.weight
        self.road = road
        self.processes = processes

    def forward(self, x: Tensor) -> Tensor:
        return rms_over_all(in_fp32(x), self).to(x.dtype)


class SharedGroupedGatedRMSNorm(GroupedGatedRMSNorm):
    """The same of Mamba-2's norm with one group."""

    def __init__(
        self,
        own: GroupedGatedRMSNorm,
        road: CollectivePair,
        processes: int,
    ) -> None:
        with torch.device("meta"):
            super().__init__(1, own.eps, own.groups, own.norm_before_gate)
        self.weight = own.weight
        self.road = road
        self.processes = processes

    def normalised(self, y_BTD: Tensor) -> Tensor:
        return rms_over_all(y_BTD, self)


def rms_over_all(x: Tensor, norm: SharedRMSNorm | SharedGroupedGatedRMSNorm) -> Tensor:
    """x over the root of its mean square over the channels of all processes, times the weight."""
    mean_here = x.square().mean(-1, keepdim=True)
    mean = communicate(mean_here, *norm.road) / norm.processes
    y = x * (mean + norm.eps).rsqrt()
    if norm.weight is None:
        return y
    return y * norm.weight


def with_communication(
    own: nn.Module,
    role: str,
    tp_group: TensorGroup,
) -> nn.Module:
    """What stands in the place of a module with one of REPLACED_ROLES."""
    if role == "norm":
        return shared_norm(cast(RMSNorm, own), tp_group)
    matrix = cast(nn.Linear, own)
    if role == "row":
        return RowLinear(matrix, tp_group.out)
    return RowLinear(matrix, tp_group.within)


def shared_norm(norm: RMSNorm, tp_group: TensorGroup) -> nn.Module:
    """Whole groups are on one process; one group over all channels is on all."""
    if not isinstance(norm, GroupedGatedRMSNorm):
        return SharedRMSNorm(norm, tp_group.within, tp_group.size)
    if norm.groups == 1:
        return SharedGroupedGatedRMSNorm(norm, tp_group.within, tp_group.size)
    norm.groups //= tp_group.size
    return norm


class SharedEmbedding(nn.Embedding):
    """Rows of some words of the vocabulary; a word of another process gives zeros, and all are
    added up."""

    def __init__(
        self,
        weight_WD: nn.Parameter,
        road: CollectivePair,
        first: int,
    ) -> None:
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

    def __init__(
        self,
        own: nn.Linear,
        vocabulary: VocabularyShard,
    ) -> None:
        with torch.device("meta"):
            super().__init__(own.in_features, own.out_features, bias=False)
        self.weight = own.weight
        self.vocabulary = vocabulary

    def forward(self, x: Tensor) -> Tensor:
        here = linear(x, self.weight)
        first = self.vocabulary.first
        after = self.vocabulary.total - first - here.shape[-1]
        return self.vocabulary.add_up(F.pad(here, (first, after)))
