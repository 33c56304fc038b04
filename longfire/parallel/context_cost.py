"""What a layer sends where a sequence is cut over processes: amounts, and what its attention takes.

Everything is of one layer, one micro-batch and one process. n processes hold a piece each, of one
segment or (zigzag) two. What the ways of softmax attention cost, each file of context_strategies/
says; what recurrences and convolutions cost, and which way is best, strategy.py.
"""

from dataclasses import dataclass
from functools import lru_cache

from longfire.parallel import cost
from longfire.parallel.cost import Device
from longfire.parallel.layout import BALANCED_SEGMENTS

STRATEGY = "parallelism.context_parallel_strategy"
DEGREE = "parallelism.context_parallel_degree"
SEGMENTS = {"contiguous": 1, "zigzag": 2, "balanced": BALANCED_SEGMENTS}  # that a process holds
FULL = 4  # bytes of a number in fp32: states, and gradients of keys and values on their way
BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class AttentionHeads:
    """Softmax attention of one layer, as much of it as is on one of the processes that share
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

    def flops(self, tokens: int) -> float:
        """Of one sequence's forward: scores and their products with values, a multiply-add is 2."""
        return 2 * (self.queries + self.outputs) * keys_seen(tokens, self.window)


@dataclass(frozen=True)
class LayerTraffic:
    """What of one block looks over a cut.

    states: for each recurrence, the numbers of M (its diagonal, where it has no more) and of B.
    halo: numbers of the inputs before a segment that convolutions and token shifts see.
    """

    attends: tuple[AttentionHeads, ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    halo: int = 0


@dataclass(frozen=True)
class Workload:
    """A micro-batch of sequences of `tokens` tokens, cut for n `processes` that are `inner` ranks
    apart.

    again: how often the forward runs once more, because the backward computes it again.
    """

    tokens: int
    sequences: int
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
class CommunicationCost:
    """What one layer sends in a step's micro-batch, and holds beside what it would hold of one
    that is not cut.

    waits: of the seconds on the way, those that nothing hides. uneven: seconds in which the others
    wait for the process with the most work. hidden_by: what computes while the rest is on its way.
    kept: bytes from forward to backward; forward,
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
    hidden_by: str = ""


def tokens_here(tokens: int, processes: int, layout: str) -> int:
    """Tokens of a sequence that one process holds, with padding to segments of equal length."""
    each = SEGMENTS[layout]
    return each * -(-tokens // (processes * each))


def keys_seen(tokens: float, window: int = 0) -> float:
    """Pairs of a query and a key that it sees, of the first `tokens` queries of a sequence."""
    full = min(tokens, window or tokens)
    return full * (full + 1) / 2 + (tokens - full) * full


@lru_cache
def imbalance(
    tokens: int,
    processes: int,
    layout: str,
    window: int = 0,
) -> float:
    """Work of the process with the most, over the mean: 2 - 1/n where segments are contiguous and
    rows causal, 1 with zigzag, and (nearly) where segments are distributed by their work."""
    if layout == "balanced":
        return 1.0
    segments = processes * SEGMENTS[layout]
    length = tokens / segments  # of a mean segment, not whole
    work = []
    for i in range(segments):
        work.append(keys_seen((i + 1) * length, window) - keys_seen(i * length, window))
    if SEGMENTS[layout] == 2:
        work = [work[r] + work[-1 - r] for r in range(processes)]
    return max(work) * processes / keys_seen(tokens, window)


def attention_seconds(
    heads: AttentionHeads,
    cut: Workload,
    device: Device,
) -> float:
    """Of the forward's attention itself, on a process with the mean of the work; the backward takes
    twice as long."""
    return cost.compute_seconds(
        cut.sequences * heads.flops(cut.tokens) / cut.processes,
        device,
        cut.dtype,
    )


def uneven_seconds(
    heads: AttentionHeads,
    cut: Workload,
    device: Device,
) -> float:
    """How much longer than the mean the fullest process computes, forward, backward and again."""
    more = imbalance(cut.tokens, cut.processes, cut.layout, heads.window) - 1
    return (3 + cut.again) * attention_seconds(heads, cut, device) * more
