"""`longfire plan --context`: the longest sequence that fits, for each mixer on so many devices."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from math import gcd

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.run import Run
from longfire.config.strict import read_own_settings
from longfire.errors import SettingsError
from longfire.mixers import MIXERS
from longfire.parallel import cost, strategy
from longfire.parallel.context_strategies import STRATEGIES
from longfire.parallel.cost import Device
from longfire.planner.forecast import Plan
from longfire.planner.planner import Planner, divisors

PIECE = (
    2048  # tokens of a row that is measured, and twice as many: longer rows lie on a straight line
)
# Channels of a head, as models of some 1B parameters have them (recipes/models): where a recipe
# does not say how many heads.
HEAD_SIZES = {
    "attention": 128,
    "linear_attention": 256,
    "retention": 256,
    "gla": 512,
    "gsa": 512,
    "delta_net": 128,
    "gated_delta_net": 256,
    "kda": 128,
}


@dataclass(frozen=True)
class Longest:
    """One sequence over `plan`'s processes: as many tokens as fit, with blocks recomputed; 0 if not
    even few do.

    seconds: what a step's mathematics takes on these devices at that length, in optimizer steps of
    one sequence for each data group.
    """

    tokens: int
    plan: Plan
    seconds: float


def longest(
    planner: Planner,
    processes: int,
    tps: tuple[int, ...] = (1,),
) -> Longest:
    """Over all ways to lay out so many processes: `tps` share matrices, any divisor of the rest
    shares a sequence, others shard with them.

    So more devices never shorten it: they can at least cut the parameters finer.
    """
    found = [(planner.largest_seq_len(plan), plan) for plan in plans(planner, processes, tps)]
    tokens, plan = max(found, key=lambda one: one[0])
    return Longest(tokens, plan, seconds_of(planner, tokens, processes // plan.dp_shard))


def plans(
    planner: Planner,
    processes: int,
    tps: tuple[int, ...],
) -> Iterator[Plan]:
    """Every plan of `longest`, one sequence in each micro-batch."""
    for tp in tps:
        if processes % tp or any(planner.refusals(tp, tp)):
            continue
        for cp in divisors(processes // tp):
            plan = Plan(
                1,
                processes // tp // cp,
                cp,
                tp,
                1,
                "block",
                1,
                1,
                layout=planner.layout if cp > 1 else "contiguous",
            )
            softmax = planner.softmax(plan) if cp > 1 else []
            for way in STRATEGIES if softmax else ("ring",):
                if not any(strategy.refusal(way, heads, cp) for heads in softmax):
                    yield replace(plan, strategy=way)


def seconds_of(planner: Planner, tokens: int, sharing: int) -> float:
    """Forward, backward and the blocks again, of one sequence over the `sharing` processes that
    hold it."""
    if not tokens:
        return 0.0
    blocks = sum(block.flops_per_token(tokens) for block in planner.model.layers)
    return cost.compute_seconds(
        tokens * (4 * blocks + 3 * planner.flops_of_head) / sharing,
        planner.device,
        planner.dtype,
    )


def of_mixers(
    run: Run,
    device: Device,
    counts: tuple[int, ...],
) -> Iterator[tuple[str, list[Longest] | str]]:
    """For the recipe as it is, and for its shape with each mixer in all layers: the longest row on
    each number of devices, or why the shape cannot have the mixer."""
    tps = tuple(sorted({1, run.degrees["tp"]}))
    run = replace(run, training=replace(run.training, seq_len=PIECE))
    for name in ("the recipe", *MIXERS):
        try:
            shape = run.known_model_config
            if name != "the recipe":
                assert isinstance(shape, ModelConfig)  # a Planner of the recipe refuses others
                shape = with_mixer(shape, name)
            planner = Planner(replace(run, model_config=shape), device)
            yield name, [longest(planner, count, tps) for count in counts]
        except SettingsError as refused:
            yield name, str(refused)


def with_mixer(config: ModelConfig, name: str) -> ModelConfig:
    """The same shape with this mixer in all layers, with the shape's own settings of it if there
    are. Raises SettingsError."""
    of_name = next(
        (config.mixers.get(own, {}) for own in config.layer_types if mixer_of(own) == name),
        None,
    )
    given = heads_for(name, config.hidden_size) if of_name is None else of_name
    read_own_settings(MIXERS[name], name, given, config.hidden_size)
    return replace(
        config,
        layer_types=(name,),
        mixers={name: given},
        learned_positions=False,
    )


def heads_for(name: str, hidden_size: int) -> dict[str, int]:
    """What a mixer cannot do without: so many heads that each has about its usual channels."""
    needed = set()
    for field in fields(MIXERS[name].Config):
        if field.default is MISSING:
            needed.add(field.name)
    size = min(HEAD_SIZES.get(name, 128), hidden_size)
    known = {}
    if "num_heads" in needed:
        known["num_heads"] = max(
            d for d in divisors(hidden_size) if d <= max(1, hidden_size // size)
        )
    if "head_dim" in needed:  # 3/4 of the channels have keys (Gated DeltaNet, section 4)
        known["head_dim"] = max(1, hidden_size // known["num_heads"] * 3 // 4)
    if name == "hgrn2":
        known["expand_ratio"] = gcd(128, hidden_size)
    if name in ("mamba2", "rwkv7"):
        known["head_dim"] = gcd(64, hidden_size)
    return known
