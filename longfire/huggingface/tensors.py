"""Their tensors <-> our parameters: renamed, laid end to end, turned, swapped; the same bytes in
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
    """One tensor of theirs: ours, laid end to end along the first dim, turned where they keep
    matrices as (in, out), or with the halves of each head swapped."""

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...]  # of each of ours
    shape: tuple[int, ...]  # of theirs
    turned: bool = False
    swapped_head: int = 0  # channels of a head whose halves are swapped; 0: none are

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Theirs -> (our name, ours), views where nothing is swapped."""
        assert tuple(tensor.shape) == self.shape, self.theirs
        tensor = with_halves_swapped(tensor, self.swapped_head)
        yield from zip(self.ours, (tensor.t() if self.turned else tensor).split(self.rows))

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Ours -> theirs."""
        parts = [ours[name] for name in self.ours]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        joined = with_halves_swapped(joined, self.swapped_head)
        return joined.t() if self.turned else joined


def with_halves_swapped(tensor: Tensor, head: int) -> Tensor:
    """The first and the second half of each `head` rows in the other order, which is its own
    inverse; 0: as it is."""
    return tensor.unflatten(0, (-1, 2, head // 2)).flip(1).flatten(0, 2) if head else tensor


def layout(family: Family, model_config: ModelConfig) -> dict[str, Stored]:
    """Every tensor of theirs that a model of this shape has, by its name, in our order; a tied head
    is the embedding."""
    with torch.device("meta"):
        ours = {
            name: tuple(tensor.shape) for name, tensor in Model(model_config).state_dict().items()
        }
    if model_config.tie_word_embeddings:
        del ours["head.weight"]
    found: dict[str, dict[int, str]] = {}
    rules: dict[str, Name] = {}
    for name in ours:
        theirs, rule, part = theirs_of(family, name)
        found.setdefault(theirs, {})[part] = name
        rules[theirs] = rule
    head = head_channels(model_config) if any(rule.halves_swapped for rule in family.names) else 0
    return {
        theirs: stored(theirs, rules[theirs], parts, ours, head) for theirs, parts in found.items()
    }


def head_channels(model_config: ModelConfig) -> int:
    """Channels of a head of softmax attention, of which all layers have equally many."""
    given = next(
        given for name, given in model_config.mixers.items() if mixer_of(name) == "attention"
    )
    return given.get("head_dim") or model_config.hidden_size // given["num_heads"]


def theirs_of(family: Family, name: str) -> tuple[str, Name, int]:
    """Their name of our parameter, the rule that gives it, and which part of theirs it is."""
    pieces = name.split(".")
    layer = pieces[1] if pieces[0] == "layers" else ""
    for rule in family.names:
        for number, prefix in enumerate(rule.parts):
            prefix = prefix.format(i=layer)
            if name.startswith(prefix) and len(name) > len(prefix):
                return rule.theirs.format(i=layer) + name[len(prefix) :], rule, number
    raise AssertionError(f"{family.architecture} has no name for {name}: add a row to its table")


def stored(
    theirs: str,
    rule: Name,
    parts: dict[int, str],
    shapes: dict[str, tuple[int, ...]],
    head: int,
) -> Stored:
    assert len(parts) == len(rule.parts), (
        f"{theirs}: of its parts only {sorted(parts.values())} are there"
    )
    names = tuple(parts[number] for number in range(len(parts)))
    rows = tuple(shapes[name][0] for name in names)
    whole = (sum(rows), *shapes[names[0]][1:])
    turned = rule.turned and len(whole) == 2
    swapped_head = head if rule.halves_swapped else 0
    return Stored(theirs, names, rows, whole[::-1] if turned else whole, turned, swapped_head)


def to_ours(
    family: Family, model_config: ModelConfig, theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All of theirs as ours, views where nothing is swapped."""
    return {
        name: part
        for s in layout(family, model_config).values()
        for name, part in s.split(theirs[s.theirs])
    }


def to_theirs(
    family: Family, model_config: ModelConfig, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All of ours as theirs."""
    return {s.theirs: s.join(ours) for s in layout(family, model_config).values()}
