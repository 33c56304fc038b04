"""Their tensors <-> our parameters: renamed, concatenated, transposed, swapped; the same bytes in
both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.huggingface.family import Family, Name
from longfire.model import Model


@dataclass(frozen=True)
class Stored:
    """One tensor of theirs: ours, concatenated along the first dim, transposed where they keep
    matrices as (in, out), or with the halves of each head swapped.

    rows: the size of the first dim of each of ours. shape: of theirs. swapped_head: channels of a
    head whose halves are swapped; 0: none are.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    swapped_head: int = 0

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Theirs -> (our name, ours), views where nothing is swapped."""
        assert tuple(tensor.shape) == self.shape, self.theirs
        tensor = with_halves_swapped(tensor, self.swapped_head)
        if self.transposed:
            tensor = tensor.t()
        yield from zip(self.ours, tensor.split(self.rows))

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Ours -> theirs."""
        parts = [ours[name] for name in self.ours]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        joined = with_halves_swapped(joined, self.swapped_head)
        if self.transposed:
            return joined.t()
        return joined


def with_halves_swapped(tensor: Tensor, head: int) -> Tensor:
    """The first and the second half of each `head` rows exchanged, which is its own inverse; 0: as
    it is."""
    if head:
        return tensor.unflatten(0, (-1, 2, head // 2)).flip(1).flatten(0, 2)
    return tensor


def layout(family: Family, model_config: ModelConfig) -> dict[str, Stored]:
    """Every tensor of theirs that a model of this config has, by its name, in our order; a tied
    head is the embedding."""
    with torch.device("meta"):
        state = Model(model_config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if model_config.tie_word_embeddings:
        del shapes["head.weight"]
    parts_of: dict[str, dict[int, str]] = {}
    rules: dict[str, Name] = {}
    for name in shapes:
        theirs, rule, part = theirs_of(family, name)
        parts_of.setdefault(theirs, {})[part] = name
        rules[theirs] = rule
    head = 0
    if any(rule.halves_swapped for rule in family.names):
        head = head_channels(model_config)
    tensors = {}
    for theirs, parts in parts_of.items():
        tensors[theirs] = stored(theirs, rules[theirs], parts, shapes, head)
    return tensors


def head_channels(model_config: ModelConfig) -> int:
    """Channels of a head of softmax attention, of which all layers have equally many."""
    for name, given in model_config.mixers.items():
        if mixer_of(name) == "attention":
            return given.get("head_dim") or model_config.hidden_size // given["num_heads"]
    raise AssertionError("no layer has softmax attention")


def theirs_of(family: Family, name: str) -> tuple[str, Name, int]:
    """Their name of our parameter, the rule that gives it, and which part of theirs it is."""
    pieces = name.split(".")
    layer = pieces[1] if pieces[0] == "layers" else ""
    for rule in family.names:
        for number, pattern in enumerate(rule.parts):
            prefix = pattern.format(i=layer)
            if name.startswith(prefix) and len(name) > len(prefix):
                return rule.theirs.format(i=layer) + name[len(prefix) :], rule, number
    raise AssertionError(f"{family.architecture} has no name for {name}: add a row to its table")


def stored(
    theirs: str,
    rule: Name,
    parts: Mapping[int, str],
    shapes: Mapping[str, tuple[int, ...]],
    head: int,
) -> Stored:
    """One tensor of theirs. parts: number -> our name. shapes: of ours. head: channels of a
    head."""
    assert len(parts) == len(rule.parts), (
        f"{theirs}: of its parts only {sorted(parts.values())} are there"
    )
    names = tuple(name for _, name in sorted(parts.items()))
    rows = tuple(shapes[name][0] for name in names)
    shape = (sum(rows), *shapes[names[0]][1:])
    transposed = rule.transposed and len(shape) == 2
    if transposed:
        shape = shape[::-1]
    swapped_head = head if rule.halves_swapped else 0
    return Stored(theirs, names, rows, shape, transposed, swapped_head)


def to_ours(
    family: Family,
    model_config: ModelConfig,
    theirs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All of theirs as ours, views where nothing is swapped."""
    ours: dict[str, Tensor] = {}
    for tensor in layout(family, model_config).values():
        ours.update(tensor.split(theirs[tensor.theirs]))
    return ours


def to_theirs(
    family: Family,
    model_config: ModelConfig,
    ours: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All of ours as theirs."""
    tensors = layout(family, model_config)
    return {theirs: tensor.join(ours) for theirs, tensor in tensors.items()}
