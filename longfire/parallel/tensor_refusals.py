"""What of a run processes cannot share by tensor parallelism, and how to fix it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from longfire.parallel.tensor_roles import (
    ROLES,
    leaves,
    named_regions,
    shares_kv_heads,
    split_leaves,
)

if TYPE_CHECKING:
    from longfire.mixers.mixer import Mixer
    from longfire.mlps.contract import MLP
    from longfire.model import Model


def refusals(
    model: "Model",
    tp: int,
    sequence_parallel: bool,
    seq_len: int,
    cp: int = 1,
) -> Iterator[str]:
    """What of a run with this whole model (on meta) so many processes cannot share, with the key,
    the number and the fix. (Sequences that cp processes share are padded.)"""
    if tp == 1:
        return
    degree = f"parallelism.tensor_parallel_degree = {tp}"
    if model.head is None:
        yield (
            f"{degree} splits our own layers, not those of model.backend = 'transformers'; set it "
            "to 1"
        )
        return
    if sequence_parallel and model.config.num_classes:
        yield whole_sequences(tp)
    elif sequence_parallel and seq_len % tp and cp == 1:
        yield (
            f"{degree} must divide training.seq_len = {seq_len}, since processes share the tokens "
            "of a sequence; change one of them, or set parallelism.sequence_parallel to false"
        )
    is_split = not (model.config.num_classes or model.config.image_size)
    if is_split and model.config.vocab_size < tp:
        yield (
            f"{degree} is more than the vocabulary's {model.config.vocab_size} words; set it to "
            "at most that"
        )
    reasons: set[str] = set()
    for region, name in named_regions(model):
        reasons.update(why_not_shared(region, name, tp))
    yield from sorted(reasons)


def whole_sequences(tp: int) -> str:
    """Why a classifier has no sequence parallelism."""
    return (
        f"parallelism.tensor_parallel_degree = {tp}: the head of a classifier sees whole "
        "sequences, of which processes hold parts: set parallelism.sequence_parallel to false"
    )


def why_not_shared(
    region: "Mixer | MLP",
    name: str,
    tp: int,
) -> Iterator[str]:
    """Why tp processes cannot share a mixer or an MLP."""
    degree = f"parallelism.tensor_parallel_degree = {tp}"
    where = "in the model's config"
    missing = list(undeclared(region))
    if missing:
        yield from (f"{degree}: {name} does not say {what}; set it to 1" for what in missing)
        return
    counts_are_divided = True
    for what in region.divided:
        count = getattr(region, what)
        if what == "kv_heads" and shares_kv_heads(region, tp):
            continue
        if count % tp:
            counts_are_divided = False
            yield (
                f"{degree} must divide the {count} {what} of {name}, since a process has whole "
                f"ones; set it to a divisor of {count}, or change {region.divided[what]} {where}"
            )
    for leaf, dim, parts in split_leaves(region, tp):
        size = region.get_parameter(leaf).shape[dim] // parts
        if size % tp and counts_are_divided:
            yield (
                f"{degree} must divide the {size} channels of {name}.{leaf}; change their number "
                f"{where}"
            )


def undeclared(region: "Mixer | MLP") -> Iterator[str]:
    """What a mixer of a user's own, or an MLP, leaves open."""
    without = {leaf for leaf, _ in region.named_parameters()}
    for name in region.roles:
        without -= set(leaves(region, name))
    if without:
        yield f"how {', '.join(sorted(without))} is split (roles)"
    unknown = sorted(set(region.roles.values()) - ROLES.keys())
    if unknown:
        yield f"a role that is known where it says {', '.join(unknown)} (known: {', '.join(ROLES)})"
    if "row" not in region.roles.values():
        yield "which matrix ends it (a role that is row)"
    if region.has_heads and not region.divided:
        yield "which of its attributes count heads (divided)"
