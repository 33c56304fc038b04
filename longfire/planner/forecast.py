"""A plan, and what is expected of it: what a process holds at each moment, sends, and how long a
step takes."""

from dataclasses import dataclass, field

from longfire.config.settings import ContextStrategyName, Remat
from longfire.parallel.axes import AXES
from longfire.parallel.context_cost import tokens_here

REMATS: tuple[Remat, ...] = ("none", "mlp", "attention", "attention+mlp", "block")
# Of those, what runs the mixer's forward once more, and what runs the MLP's.
MIXER_AGAIN = ("attention", "attention+mlp", "block")
MLP_AGAIN = ("mlp", "attention+mlp")


@dataclass(frozen=True)
class Plan:
    """Degrees of the mesh, what is recomputed, and sequences: batch_size of each of `microbatches`
    on a process, or on the `cp` processes that hold pieces of them. strategy: how softmax layers
    see the whole sequence; layout: which pieces a process holds."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int
    remat: Remat
    batch_size: int
    microbatches: int
    strategy: ContextStrategyName = "ring"
    layout: str = "contiguous"

    @property
    def data(self) -> int:
        """Groups of processes whose sequences differ."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Processes that parameters, gradients and optimizer are cut over."""
        return self.dp_shard * self.cp

    @property
    def mesh(self) -> tuple[int, ...]:
        """Its degrees, in the order of the axes."""
        return tuple(getattr(self, axis) for axis in AXES)

    def here(self, tokens: int) -> int:
        """Of a sequence, on one process."""
        return tokens_here(tokens, self.cp, self.layout)


@dataclass(frozen=True)
class Moment:
    """What a process holds at one time of a step, in bytes."""

    where: str
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    logits: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.gathered
            + self.logits
        )


@dataclass(frozen=True)
class Collective:
    """What one process sends in a step, over one axis.

    hidden: behind what it runs; "" if everything waits for it. waits: seconds of what runs behind
    attention, where that is too short.
    """

    axis: str
    what: str
    processes: int
    bytes: float
    seconds: float
    hidden: str
    waits: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """One plan: the fullest moment of its fullest process, and where a step's time goes."""

    plan: Plan
    peak: Moment
    host_bytes: float  # in the host's memory, of the process that holds most there
    fits: bool
    seconds: float
    parts: dict[str, float]  # seconds of compute, network, optimizer, and others, by name
    collectives: tuple[Collective, ...]
    flops: float  # of a step, all processes, as the mathematics needs them
    flops_again: float  # recomputed
    tokens_per_second: float
    mfu: float
    days: float
    device_hours: float
    binds: str
    largest: dict[str, int] = field(default_factory=dict)
