"""The lengths of the sequences of a run, step by step, and the segments that they are computed in.

With training.seq_len_schedule = ("0:2048", "1000:8192", "2000:32768:500000") sequences have 2048
tokens in the first 1000 steps, and 32768, with RoPE base 500000, from step 2000 on. A step has the
same number of tokens in all stages, so training.tokens, warm-up and learning rate are what they
would be without a schedule: training.seq_len is the longest length, and a step of shorter sequences
has more of them, pieces of the same long sequences (data/batches.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.settings import Training
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.plural import counted

SCHEDULE = "training.seq_len_schedule"


@dataclass(frozen=True)
class Stage:
    """From this step on sequences have `seq_len` tokens. rope_theta: the base of rotary positions;
    0: the model's own."""

    step: int
    seq_len: int
    rope_theta: float = 0.0


def stages(training: Training) -> tuple[Stage, ...]:
    """The stages of a run in order, one for the whole of it without a schedule. A base holds until
    another one is named. Raises SettingsError."""
    found: list[Stage] = []
    for word in training.seq_len_schedule:
        try:
            step, seq_len, *theta = word.split(":")
            stage = Stage(int(step), int(seq_len), *map(float, theta))
        except (ValueError, TypeError):
            raise SettingsError(
                f"{SCHEDULE}: {word!r} is not STEP:LENGTH or STEP:LENGTH:ROPE_THETA, as "
                "1000:8192 or 1000:8192:500000"
            ) from None
        if (
            stage.seq_len < 1
            or not 0 <= stage.rope_theta < float("inf")
            or (theta and not stage.rope_theta)
        ):
            raise SettingsError(f"{SCHEDULE}: {word!r}: length and base must be above 0")
        if stage.step <= found[-1].step if found else stage.step != 0:
            raise SettingsError(
                f"{SCHEDULE}: {word!r}: the first stage begins at step 0, each other one after "
                "the one before it"
            )
        if found and not stage.rope_theta:
            stage = replace(stage, rope_theta=found[-1].rope_theta)
        found.append(stage)
    return tuple(found) or (Stage(0, training.seq_len),)


def stage_at(training: Training, step: int) -> Stage:
    """The stage of the step that follows after `step` steps."""
    return [stage for stage in stages(training) if stage.step <= step][-1]


def shortest(training: Training) -> int:
    """Tokens of the shortest sequences of a run; seq_len where the schedule cannot be read, which
    config/rules/lengths.py refuses."""
    try:
        return min(stage.seq_len for stage in stages(training))
    except SettingsError:
        return training.seq_len


def stage_of_model(training: Training, step: int) -> Stage:
    """The stage of the last step of a model that was trained for `step` steps."""
    return stage_at(training, max(0, step - 1))


def with_base(config: ModelConfig, theta: float, seq_len: int) -> ModelConfig:
    """The config with this RoPE base (0: its own) in all attention layers that have rotary
    positions, and with a limit of positions that permits sequences of seq_len tokens."""
    mixers: dict[str, dict[str, Any]] = {}
    for name, given in config.mixers.items():
        mixers[name] = given
        if theta and turns(name, given):
            mixers[name] = {**given, "rope_theta": theta}
    limit = config.max_position_embeddings
    if limit and not config.learned_positions:
        limit = max(limit, seq_len)
    return replace(config, mixers=mixers, max_position_embeddings=limit)


def turns(name: str, given: Mapping[str, object]) -> bool:
    """Whether a layer of this type, with these settings, has rotary positions whose base is a
    setting."""
    return mixer_of(name) == "attention" and given.get("rope", "default") != "none"


def has_turns(config: ModelConfig | TransformersConfig) -> bool:
    """Whether any layer has rotary positions whose base is a setting."""
    return any(turns(name, config.mixers.get(name, {})) for name in set(config.layer_types))


def describe(training: Training, sequences: int, steps: int) -> Iterator[str]:
    """The schedule in a line for each stage.

    sequences: of the longest length in a step. steps: of the whole run.
    """
    if not training.seq_len_schedule:
        return
    for stage in stages(training):
        base = f", RoPE base {stage.rope_theta:g}" if stage.rope_theta else ""
        never = "; this run ends before that" if stage.step >= steps else ""
        of_step = counted(sequences * training.seq_len // stage.seq_len, "sequence")
        yield f"from step {stage.step:,}: {of_step} of {stage.seq_len:,} tokens{base}{never}"


def segment_lengths(tokens: int, segments: int) -> list[int]:
    """The lengths of the segments of a sequence: all equal but the last, which may be shorter."""
    length = -(-tokens // segments)
    return [min(length, tokens - start) for start in range(0, tokens, length)]
