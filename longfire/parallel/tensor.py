"""Tensor parallelism: processes that share each matrix, and with it heads, channels and the words
of the vocabulary.

Mixers and MLPs are regions. What enters one is whole in every process; inside, a process has its
own heads or channels; a "row" matrix adds up the parts and ends it. Between regions everything is
in every process, or, with sequence parallel, each process has its own tokens of a sequence. The
ways across, and those of the gradients:

                  no sequence parallel              sequence parallel
    into a region same      gradients: sum          gather    gradients: scatter
    out of it     sum       gradients: same         scatter   gradients: gather

(Shoeybi 2019, Megatron-LM; Korthikanti 2022.) Layers only declare what is to be done with them
(`roles`), and know of no process. A classifier has its embedding and its head whole in every
process, since the head sees one token of a sequence, or the mean of all.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longfire.parallel.collectives import known_as
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
from longfire.parallel.tensor_group import TensorGroup
from longfire.parallel.tensor_modules import (
    REPLACED_ROLES,
    OneHeadLinear,
    SharedEmbedding,
    SharedHead,
    with_communication,
)
from longfire.parallel.tensor_roles import named_regions, shares_kv_heads, split_leaves

if TYPE_CHECKING:
    from longfire.mixers.mixer import Mixer
    from longfire.mlps.contract import MLP
    from longfire.model import Model


def split(
    model: "Model",
    mesh: Mesh,
    sequence_parallel: bool,
) -> None:
    """Leave of a whole model (on meta, or with values) what this process holds of it, in place.

    Every parameter's ShardSpec says what was split, and of which the gradient is only a part here:
    the step adds it up over tp after the backward.
    """
    if mesh.size("tp") == 1:
        return
    has_classes = model.config.num_classes > 0
    assert not (has_classes and sequence_parallel), "refused"
    tp_group = TensorGroup(
        mesh.size("tp"),
        mesh.rank("tp"),
        known_as(mesh.group("tp")),
        sequence_parallel,
    )
    inside: set[nn.Parameter] = set()  # whose gradient is that of a part of the heads
    for region, _ in named_regions(model):
        split_region(region, tp_group)
        ends = {f"{leaf}.bias" for leaf, role in region.roles.items() if role == "row"}
        for leaf, parameter in region.named_parameters():
            if leaf not in ends:
                inside.add(parameter)
    for module in model.shared.values():
        dims = cast("dict[str, int]", module.split_dims)  # as every Mixer.whole_model declares
        for leaf, dim in dims.items():
            keep_range(module, leaf, dim, tp_group)
    if not has_classes:
        split_vocabulary(model, tp_group)
    for name, parameter, spec in list(placed_parameters(model)):
        is_partial = sequence_parallel or parameter in inside  # of a part of the tokens, or heads
        if is_partial and spec.split is None:
            set_sharding(model, name, ShardSpec(gradient_is_partial=True))
    model.regions = tp_group.regions(model.config.vocab_size)
    for block in model.layers:
        block.regions = model.regions


def split_region(region: "Mixer | MLP", tp_group: TensorGroup) -> None:
    """Split a mixer or an MLP as its roles say."""
    for leaf, dim, parts in split_leaves(region, tp_group.size):
        keep_range(region, leaf, dim, tp_group, parts)
    if shares_kv_heads(region, tp_group.size):
        keep_one_kv_head(region, tp_group)
    for name, role in region.roles.items():
        if role in REPLACED_ROLES and has(region, name):
            own = region.get_submodule(name)
            replace_module(region, name, with_communication(own, role, tp_group))
    for count in region.divided:
        setattr(region, count, max(1, getattr(region, count) // tp_group.size))
    if hasattr(region, "heads"):
        region.first_head = tp_group.rank * region.heads
    if hasattr(region, "tokens_from") and region.context and tp_group.sequence_parallel:
        cast("MLP", region).tokens_from = tp_group.size  # a Mixer has none


def keep_one_kv_head(region: "Mixer | MLP", tp_group: TensorGroup) -> None:
    """Let the matrices of keys and values, whole in every process, make the head that the queries
    of this one see."""
    head = tp_group.rank * region.kv_heads // tp_group.size
    for name, role in region.roles.items():
        if role == "kv_head":
            own = cast(nn.Linear, region.get_submodule(name))
            replace_module(region, name, OneHeadLinear(own, head, region.kv_heads))


def has(region: nn.Module, name: str) -> bool:
    """Whether these settings give the region a module of this name."""
    return any(module == name and part is not None for module, part in region.named_modules())


def keep_range(
    module: nn.Module,
    name: str,
    dim: int,
    tp_group: TensorGroup,
    parts: int = 1,
) -> None:
    """Leave of a parameter the local part, of each of so many equal parts; its spec says which."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    whole = module.get_parameter(name)
    size = whole.shape[dim]
    ranges = tp_group.range(size, parts)
    pieces: list[Tensor] = []
    for begin, end in ranges:
        pieces.append(whole.detach().narrow(dim, begin, end - begin))
    here = nn.Parameter(torch.cat(pieces, dim), requires_grad=whole.requires_grad)
    setattr(owner, leaf, here)
    set_sharding(module, name, ShardSpec(DimSplit(dim, size, ranges)))


def replace_module(
    root: nn.Module,
    name: str,
    module: nn.Module,
) -> None:
    """Put a module where another one was, under its name; it holds the same parameters, placed as
    they were."""
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    keep_specs(owner.get_submodule(leaf), module)
    setattr(owner, leaf, module)


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
        message = torch.cat([gradient.flatten() for gradient in gradients])
        sizes = [gradient.numel() for gradient in gradients]
        total = mesh.sum(message, "tp")
        for gradient, part in zip(gradients, total.split(sizes)):
            gradient.copy_(part.view_as(gradient))
