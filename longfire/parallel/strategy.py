"""What crosses the cuts of a row that processes share (keys and values, states, last inputs), and
which way is best for softmax.

Everything is of one layer, one microbatch and one process. n processes hold a piece each, of one
segment or (zigzag) two.

ring        keys and values of a process go around, n - 1 hops forward; again in the backward, with their gradients in fp32, n hops
            (Liu 2023). What a hop's attention takes hides what a hop takes to arrive
allgather   all keys and values of the row to everyone; in the backward again, and their gradients in fp32 back by a reduce-scatter
            (Llama 3, section 3.3.2). Nothing hides it
alltoall    q, k, v by heads instead of tokens, the output by tokens again; the backward the same (Jacobs 2023, Ulysses). Needs
            heads that the processes can share. Each sees whole rows, so its work is even whatever the layout

A recurrence gathers the affine map S -> M S + B of every segment once, and in the backward M again
with the gradients of states: bytes that do not grow with the row. Convolutions and token shifts
gather the last inputs of every segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

from longfire.parallel import cost
from longfire.parallel.cost import Device
from longfire.parallel.layout import DEALT

STRATEGY = "parallelism.context_parallel_strategy"
DEGREE = "parallelism.context_parallel_degree"
STRATEGIES = ("ring", "allgather", "alltoall")
SEGMENTS = {"contiguous": 1, "zigzag": 2, "balanced": DEALT}  # that a process holds
RING = "keys, values: ring"
FULL = 4  # bytes of a number in fp32: states, and gradients of keys and values on their way
BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Heads:
    """Softmax attention of one layer, as much of it as lies in one of the processes that share
    matrices."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int = 0  # keys a query sees, itself included; 0: all before it

    @property
    def queries(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.key_size

    @property
    def keys_values(self) -> int:
        return self.kv_heads * (self.key_size + self.value_size)

    @property
    def outputs(self) -> int:
        return self.heads * self.value_size

    def refusal(self, strategy: str, processes: int) -> str:
        """Why processes cannot go this way, with the fix; "" if they can."""
        return refusal(strategy, "softmax attention", self.heads, self.kv_heads, processes)

    def flops(self, tokens: int) -> float:
        """Of one row's forward: scores and their products with values, a multiply-add is 2."""
        return 2 * (self.queries + self.outputs) * keys_seen(tokens, self.window)


@dataclass(frozen=True)
class Crossing:
    """What of one block looks over a cut.

    states: for each recurrence, the numbers of M (its diagonal, where it has no more) and of B.
    halo: numbers of the inputs before a segment that convolutions and token shifts see.
    """

    attends: tuple[Heads, ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    halo: int = 0


@dataclass(frozen=True)
class Cut:
    """A microbatch of rows of `tokens` tokens, cut for n `processes` that are `inner` ranks apart.

    again: how often the forward runs once more, because the backward computes it again.
    """

    tokens: int
    rows: int
    processes: int
    layout: str = "zigzag"
    dtype: str = "bfloat16"
    inner: int = 1
    again: int = 0

    @property
    def segments(self) -> int:
        return SEGMENTS[self.layout]

    @property
    def here(self) -> int:
        return tokens_here(self.tokens, self.processes, self.layout)


@dataclass(frozen=True)
class Exchange:
    """What one layer sends in a step's microbatch, and holds beside what it would hold of a row
    that is not cut.

    waits: of the seconds on the way, those that nothing hides. uneven: seconds in which the others
    wait for the process with the most work. kept: bytes from forward to backward; forward,
    backward: more at those times.
    """

    what: str
    bytes: float
    seconds: float
    waits: float
    uneven: float = 0.0
    kept: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Ranked:
    """One strategy for all softmax layers of a microbatch. held: bytes, at the fullest of them;
    seconds: what it adds to them."""

    strategy: str
    bytes: float
    seconds: float
    held: float
    fits: bool


def tokens_here(tokens: int, processes: int, layout: str) -> int:
    """Tokens of a row that one process holds, those included that fill it up to segments of equal
    length."""
    each = SEGMENTS[layout]
    return each * -(-tokens // (processes * each))


def keys_seen(tokens: int, window: int = 0) -> float:
    """Pairs of a query and a key that it sees, of the first `tokens` queries of a row."""
    full = min(tokens, window or tokens)
    return full * (full + 1) / 2 + (tokens - full) * full


@lru_cache
def imbalance(tokens: int, processes: int, layout: str, window: int = 0) -> float:
    """Work of the process with the most, over the mean: 2 - 1/n where segments are contiguous and
    rows causal, 1 with zigzag, and (nearly) where segments are dealt by their work."""
    if layout == "balanced":
        return 1.0
    segments = processes * SEGMENTS[layout]
    length = tokens / segments
    work = [
        keys_seen((i + 1) * length, window) - keys_seen(i * length, window) for i in range(segments)
    ]
    if SEGMENTS[layout] == 2:
        work = [work[r] + work[-1 - r] for r in range(processes)]
    return max(work) * processes / keys_seen(tokens, window)


def refusal(strategy: str, name: str, heads: int, kv_heads: int, processes: int) -> str:
    """Why a layer's heads (of one tensor-parallel process) cannot be shared so, with the fix; ""
    if they can. ring and allgather take any."""
    said = (
        f"{STRATEGY} = alltoall shares the heads of {name} among {DEGREE} = {processes} processes"
    )
    fix = f"set {STRATEGY} to ring or allgather"
    if strategy != "alltoall":
        return ""
    if processes > heads:
        return f"{said}, but it has {heads} (of a tensor-parallel process); lower {DEGREE} to {heads} or less, or {fix}"
    if heads % processes:
        return f"{said}, which does not divide its {heads} (of a tensor-parallel process); {fix}, or choose a degree that does"
    if kv_heads % processes and processes % kv_heads:
        return (
            f"{said}, of which its {kv_heads} key/value heads (of a tensor-parallel process) are neither a multiple nor a divisor; "
            f"{fix}, or choose a degree that is one of theirs"
        )
    return ""


def ring(heads: Heads, cut: Cut, device: Device) -> Exchange:
    """Two places for keys and values, one at work and one on its way; in the backward their
    gradients likewise, in fp32. Outputs of a hop and of all hops before it are fp32."""
    n, numbers, narrow = cut.processes, cut.rows * cut.here * heads.keys_values, BYTES[cut.dtype]
    rate = cost.between_neighbours(device, n, cut.inner)
    hop = attention_seconds(heads, cut, device) / n
    there, back = (cost.LATENCY + numbers * each / rate for each in (narrow, narrow + FULL))
    waits = (1 + cut.again) * (n - 1) * max(0.0, there - hop) + n * max(0.0, back - 2 * hop)
    sent = (2 + cut.again) * (n - 1) * numbers * narrow + n * numbers * FULL
    outputs, queries = (
        cut.rows * cut.here * size * FULL for size in (heads.outputs, heads.queries)
    )
    return Exchange(
        RING,
        sent,
        (1 + cut.again) * (n - 1) * there + n * back,
        waits,
        uneven_seconds(heads, cut, device),
        forward=2 * numbers * narrow + 2 * outputs,
        backward=2 * numbers * (narrow + FULL) + queries,
    )


def allgather(heads: Heads, cut: Cut, device: Device) -> Exchange:
    """Keys and values of the whole row, and in the backward their gradients in fp32."""
    n, numbers, narrow = cut.processes, cut.rows * cut.here * heads.keys_values, BYTES[cut.dtype]
    gathers = 2 + cut.again
    sent = (n - 1) * numbers * (gathers * narrow + FULL)
    seconds = sent / cost.bandwidth(device, n, cut.inner) + (gathers + 1) * (n - 1) * cost.LATENCY
    return Exchange(
        "keys, values: all-gather, reduce-scatter",
        sent,
        seconds,
        seconds,
        uneven_seconds(heads, cut, device),
        forward=n * numbers * narrow,
        backward=n * numbers * (narrow + FULL),
    )


def alltoall(heads: Heads, cut: Cut, device: Device) -> Exchange:
    """Copies of q, k, v and the output by heads. Where there are fewer key/value heads than
    processes, several get the same."""
    n, narrow = cut.processes, BYTES[cut.dtype]
    copies = max(1, n // heads.kv_heads)
    numbers = cut.rows * cut.here * (heads.queries + heads.outputs + copies * heads.keys_values)
    kept = cut.rows * cut.here * (heads.outputs + (copies - 1) * heads.keys_values) * narrow
    sent = (2 + cut.again) * numbers * narrow * (n - 1) / n
    seconds = (
        sent / cost.between_neighbours(device, n, cut.inner) + 4 * (2 + cut.again) * cost.LATENCY
    )
    return Exchange(
        "q, k, v, o: all-to-all",
        sent,
        seconds,
        seconds,
        kept=kept,
        forward=numbers * narrow,
        backward=2 * numbers * narrow,
    )


WAYS = {"ring": ring, "allgather": allgather, "alltoall": alltoall}


def state_exchange(numbers: int, cut: Cut, device: Device) -> Exchange:
    """The maps of all segments, `numbers` each, to everyone, who keep their own; and the same the
    other way round."""
    here = cut.rows * cut.segments * numbers * FULL
    return to_everyone("states: all-gather", here, cut, device, kept=float(here))


def halo_exchange(numbers: int, cut: Cut, device: Device) -> Exchange:
    """The last inputs of each segment to everyone, and their gradients back."""
    here = cut.rows * cut.segments * numbers * BYTES[cut.dtype]
    return to_everyone("last inputs: all-gather, reduce-scatter", here, cut, device)


def to_everyone(what: str, here: int, cut: Cut, device: Device, kept: float = 0.0) -> Exchange:
    """`here` bytes of each process come to all, and as much goes the other way in the backward."""
    n, times = cut.processes, 2 + cut.again
    sent, whole = times * (n - 1) * here, float(n * here)
    seconds = sent / cost.bandwidth(device, n, cut.inner) + times * (n - 1) * cost.LATENCY
    return Exchange(what, sent, seconds, seconds, kept=kept, forward=whole, backward=whole)


def exchanges(crossing: Crossing, strategy: str, cut: Cut, device: Device) -> list[Exchange]:
    """All that a block exchanges; nothing where rows are whole."""
    if cut.processes == 1:
        return []
    return [
        *(WAYS[strategy](heads, cut, device) for heads in crossing.attends),
        *(state_exchange(sum(numbers), cut, device) for numbers in crossing.states),
        *([halo_exchange(crossing.halo, cut, device)] if crossing.halo else []),
    ]


def rank_strategies(
    layers: Sequence[Heads], cut: Cut, device: Device, room_bytes: float = inf
) -> list[Ranked]:
    """The ways that softmax layers may go, best first: those that fit into `room_bytes` by time,
    then the others by what they hold.

    The first is what `auto` takes, the second the runner-up. Empty without softmax layers. seconds:
    what crossing adds to all the layers of a microbatch, waiting for the slowest process included.
    """
    ranked = []
    for strategy, way in WAYS.items():
        if layers and not any(heads.refusal(strategy, cut.processes) for heads in layers):
            costs = {heads: way(heads, cut, device) for heads in set(layers)}
            of_layers = [costs[heads] for heads in layers]
            held = sum(one.kept for one in of_layers) * (not cut.again)
            held += max(
                max(one.forward, one.backward) + one.kept * cut.again for one in costs.values()
            )
            seconds = sum(one.waits + one.uneven for one in of_layers)
            ranked.append(
                Ranked(
                    strategy, sum(one.bytes for one in of_layers), seconds, held, held <= room_bytes
                )
            )
    return sorted(ranked, key=lambda one: (not one.fits, one.seconds if one.fits else one.held))


def describe(ranked: Sequence[Ranked], cut: Cut) -> str:
    """The choice and its runner-up in one sentence, with what is predicted of each."""
    said = [
        f"{one.strategy} ({one.bytes / 1e9:.3g} GB sent, {one.seconds:.3g} s waited, {one.held / 1e9:.3g} GB held"
        + ("" if one.fits else "; does not fit")
        + ")"
        for one in ranked[:2]
    ]
    rows = f"rows of {cut.tokens:,} tokens over {cut.processes} processes, {cut.layout}"
    return f"{rows}: {said[0]}" + (f"; runner-up {said[1]}" if len(said) > 1 else "")


def attention_seconds(heads: Heads, cut: Cut, device: Device) -> float:
    """Of the forward's attention itself, on a process with the mean of the work; the backward takes
    twice as long."""
    return cost.compute_seconds(
        cut.rows * heads.flops(cut.tokens) / cut.processes, device, cut.dtype
    )


def uneven_seconds(heads: Heads, cut: Cut, device: Device) -> float:
    """How much longer than the mean the fullest process computes, forward, backward and again."""
    more = imbalance(cut.tokens, cut.processes, cut.layout, heads.window) - 1
    return (3 + cut.again) * attention_seconds(heads, cut, device) * more
