"""What crosses the cuts of a sequence that processes share (keys and values, states, last inputs),
and which way is best for softmax attention.

The ways of softmax attention are objects (context_strategies/), each with its cost and refusal. A
recurrence gathers the affine map S -> M S + B of every segment once, and in the backward M again
with the gradients of states: bytes that do not grow with the sequence. Convolutions and token
shifts gather the last inputs of every segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from longfire.config.settings import ContextStrategyName
from longfire.parallel import cost
from longfire.parallel.context_cost import (
    BYTES,
    FULL,
    AttentionHeads,
    CommunicationCost,
    LayerTraffic,
    Workload,
)
from longfire.parallel.context_strategies import STRATEGIES, strategy_named
from longfire.parallel.cost import Device


@dataclass(frozen=True)
class Ranked:
    """One strategy for all softmax layers of a micro-batch. held: bytes, at the fullest of them;
    seconds: what it adds to them."""

    strategy: ContextStrategyName
    bytes: float
    seconds: float
    held: float
    fits: bool


def refusal(
    strategy: str,
    heads: AttentionHeads,
    processes: int,
) -> str:
    """Why so many processes cannot share a softmax layer this way, with the fix; "" if they can."""
    way = strategy_named(strategy)
    return way.refusal("softmax attention", heads.heads, heads.kv_heads, (processes,))


def state_exchange(
    numbers: int,
    cut: Workload,
    device: Device,
) -> CommunicationCost:
    """The maps of all segments, `numbers` each, to everyone, who keep their own; and the same the
    other way round."""
    here = cut.sequences * cut.segments * numbers * FULL
    return to_everyone("states: all-gather", here, cut, device, kept=float(here))


def halo_exchange(
    numbers: int,
    cut: Workload,
    device: Device,
) -> CommunicationCost:
    """The last inputs of each segment to everyone, and their gradients back."""
    here = cut.sequences * cut.segments * numbers * BYTES[cut.dtype]
    return to_everyone("last inputs: all-gather, reduce-scatter", here, cut, device)


def to_everyone(
    what: str,
    here: int,
    cut: Workload,
    device: Device,
    kept: float = 0.0,
) -> CommunicationCost:
    """`here` bytes of each process come to all, and as much goes the other way in the backward."""
    n = cut.processes
    times = 2 + cut.again
    sent = times * (n - 1) * here
    whole = float(n * here)
    seconds = sent / cost.bandwidth(device, n, cut.inner) + times * (n - 1) * cost.LATENCY
    return CommunicationCost(
        what,
        sent,
        seconds,
        seconds,
        kept=kept,
        forward=whole,
        backward=whole,
    )


def exchanges(
    crossing: LayerTraffic,
    strategy: str,
    cut: Workload,
    device: Device,
) -> list[CommunicationCost]:
    """All that a block exchanges; nothing where sequences are whole."""
    if cut.processes == 1:
        return []
    return [
        *(strategy_named(strategy).cost(heads, cut, device) for heads in crossing.attends),
        *(state_exchange(sum(numbers), cut, device) for numbers in crossing.states),
        *([halo_exchange(crossing.halo, cut, device)] if crossing.halo else []),
    ]


def rank_strategies(
    layers: Sequence[AttentionHeads],
    cut: Workload,
    device: Device,
    room_bytes: float = inf,
) -> list[Ranked]:
    """The ways that softmax layers may go, best first: those that fit into `room_bytes` by time,
    then the others by what they hold.

    The first is what `auto` takes, the second the runner-up. Empty without softmax layers. seconds:
    what crossing adds to all the layers of a micro-batch, waiting for the slowest process included.
    """
    ranked = []
    for strategy in STRATEGIES:
        if layers and not any(refusal(strategy, heads, cut.processes) for heads in layers):
            way = strategy_named(strategy)
            costs = {heads: way.cost(heads, cut, device) for heads in set(layers)}
            of_layers = [costs[heads] for heads in layers]
            held = sum(one.kept for one in of_layers) * (not cut.again)
            held += max(
                max(one.forward, one.backward) + one.kept * cut.again for one in costs.values()
            )
            seconds = sum(one.waits + one.uneven for one in of_layers)
            ranked.append(
                Ranked(
                    strategy,
                    sum(one.bytes for one in of_layers),
                    seconds,
                    held,
                    held <= room_bytes,
                )
            )
    return sorted(ranked, key=lambda one: (not one.fits, one.seconds if one.fits else one.held))


def describe(ranked: Sequence[Ranked], cut: Workload) -> str:
    """The choice and its runner-up in one sentence, with what is predicted of each."""
    texts = []
    for one in ranked[:2]:
        texts.append(
            f"{one.strategy} ({one.bytes / 1e9:.3g} GB sent, {one.seconds:.3g} s waited, "
            f"{one.held / 1e9:.3g} GB held" + ("" if one.fits else "; does not fit") + ")"
        )
    text = f"sequences of {cut.tokens:,} tokens over {cut.processes} processes, {cut.layout}"
    text += f": {texts[0]}"
    if len(texts) > 1:
        text += f"; runner-up {texts[1]}"
    return text
