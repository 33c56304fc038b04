"""What of a run processes cannot share along the sequence, and how to fix it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from longfire.config.settings import Parallelism
from longfire.ops.maps import has_map
from longfire.parallel.context import layout_kind, parts_of
from longfire.parallel.context_cost import DEGREE
from longfire.parallel.context_strategies import strategy_named
from longfire.parallel.layout import segments_each

if TYPE_CHECKING:
    from longfire.mixers.mixer import Mixer
    from longfire.mlps.contract import MLP
    from longfire.model import Model

KINDS_OF_CONTEXT = ("attention", "state", "halo")


def refusals(
    model: "Model",
    cp: int,
    tp: int,
    tokens: int,
    parallelism: Parallelism,
) -> Iterator[str]:
    """What of a run with this whole model (on meta) so many processes cannot share, with the key,
    the number and the fix."""
    if cp == 1:
        return
    degree = f"{DEGREE} = {cp}"
    if model.head is None:
        yield (
            f"{degree} cuts the sequences of our own layers, not of model.backend = "
            "'transformers'; set it to 1"
        )
        return
    kinds: dict[str, Mixer | MLP] = {}
    for part, name in parts_of(model):
        kinds[name] = part
    softmax: dict[str, Mixer | MLP] = {}
    for name, part in kinds.items():
        yield from why_not_shared(part, name, degree)
        if "attention" in part.context:
            softmax[name] = part
    # of sequences of documents there are never more
    kind = layout_kind(parallelism.context_parallel_layout, bool(softmax), documents=False)
    segments = cp * segments_each(kind, cp, tokens)
    if tokens < segments:
        yield (
            f"training.seq_len = {tokens} is shorter than the {segments} segments that {degree} "
            "cuts a sequence into; lower the degree, or lengthen the sequences"
        )
    for name, part in softmax.items():
        asked = parallelism.context_parallel_strategy
        heads = part.heads // tp
        kv_heads = max(1, part.kv_heads // tp)
        if why := strategy_named(asked).refusal(name, heads, kv_heads, (cp,)):
            yield why


def why_not_shared(
    part: "Mixer | MLP",
    name: str,
    degree: str,
) -> Iterator[str]:
    """Why processes cannot share the sequences of a mixer, or of an MLP."""
    if not part.context:
        yield (
            f"{degree}: {name} does not say how it looks along the sequence (context); set it to "
            f"1, or let the mixer declare which of {', '.join(KINDS_OF_CONTEXT)} it needs"
        )
    if "state" in part.context and not part.recurrences:
        yield (
            f"{degree}: {name} has a state but does not say of which recurrence (recurrences); set "
            "it to 1, or let the mixer declare the ops that it gives to seq.ops.recurrence"
        )
    for op in part.recurrences:
        if not has_map(op):
            yield (
                f"{degree}: {name}.recurrences has {getattr(op, '__name__', op)}, of which no map "
                "is known (ops/maps); set it to 1, or add its map to RECURRENCES"
            )
