"""How long the rows of a run are, step by step, and in how many segments they are computed; and
what of that cannot be.

With training.seq_len_schedule = ("0:2048", "1000:8192", "2000:32768:500000") rows have 2048 tokens
in the first 1000 steps, and 32768, with RoPE base 500000, from step 2000 on. A step has the same
number of tokens in all of them, so training.tokens, warm-up and learning rate are what they would
be without: training.seq_len is the longest length, and a step of shorter rows has more of them,
pieces of the same long rows (data/batches.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from longfire.config.model_config import ModelConfig, TransformersConfig, mixer_of
from longfire.config.settings import Training
from longfire.errors import SettingsError
from longfire.plural import counted

SCHEDULE = "training.seq_len_schedule"
SEGMENTS = "training.tbptt_segments"


@dataclass(frozen=True)
class Stage:
    """From this step on rows have so many tokens; rope_theta: and rotary positions this base, 0:
    the model's own."""

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
                f"{SCHEDULE}: {word!r} is not STEP:LENGTH or STEP:LENGTH:ROPE_THETA, as 1000:8192 or 1000:8192:500000"
            ) from None
        if (
            stage.seq_len < 1
            or not 0 <= stage.rope_theta < float("inf")
            or (theta and not stage.rope_theta)
        ):
            raise SettingsError(f"{SCHEDULE}: {word!r}: length and base must be above 0")
        if stage.step <= found[-1].step if found else stage.step != 0:
            raise SettingsError(
                f"{SCHEDULE}: {word!r}: the first stage begins at step 0, each other one after the one before it"
            )
        found.append(
            replace(stage, rope_theta=stage.rope_theta or (found[-1].rope_theta if found else 0.0))
        )
    return tuple(found) or (Stage(0, training.seq_len),)


def stage_at(training: Training, step: int) -> Stage:
    """The stage of the step that follows so many."""
    return [stage for stage in stages(training) if stage.step <= step][-1]


def shortest(training: Training) -> int:
    """Tokens of the shortest rows of a run; of a schedule that cannot be read (`refusals`), those
    of seq_len."""
    try:
        return min(stage.seq_len for stage in stages(training))
    except SettingsError:
        return training.seq_len


def stage_of_model(training: Training, step: int) -> Stage:
    """The stage that a model was last trained in, when it has been trained for so many steps."""
    return stage_at(training, max(0, step - 1))


def with_base(config: ModelConfig, theta: float, seq_len: int) -> ModelConfig:
    """The shape with this base (0: its own) in all attention layers that have rotary positions, and
    a limit of positions that lets rows of so many tokens be: who names a base for longer rows means
    them."""
    mixers = {}
    for name, given in config.mixers.items():
        mixers[name] = {**given, "rope_theta": theta} if theta and turns(name, given) else given
    limit = config.max_position_embeddings
    limit = limit if config.learned_positions or not limit else max(limit, seq_len)
    return replace(config, mixers=mixers, max_position_embeddings=limit)


def turns(name: str, given: dict[str, Any]) -> bool:
    """Whether a layer of this type, with these settings, has rotary positions whose base is a
    setting."""
    return mixer_of(name) == "attention" and given.get("rope", "default") != "none"


def has_turns(config: ModelConfig | TransformersConfig) -> bool:
    return any(turns(name, config.mixers.get(name, {})) for name in set(config.layer_types))


def describe(training: Training, rows: int, steps: int) -> Iterator[str]:
    """The schedule in a line for each stage; rows: of the longest length in a step; steps: of the
    whole run."""
    for stage in stages(training) if training.seq_len_schedule else ():
        base = f", RoPE base {stage.rope_theta:g}" if stage.rope_theta else ""
        never = "; this run ends before that" if stage.step >= steps else ""
        of_step = counted(rows * training.seq_len // stage.seq_len, "row")
        yield f"from step {stage.step:,}: {of_step} of {stage.seq_len:,} tokens{base}{never}"


def refusals(run: Any) -> Iterator[str]:
    """What a run's lengths cannot be, each with its fix."""
    try:
        found = stages(run.training)
    except SettingsError as error:
        yield str(error)
        return
    if run.training.seq_len_schedule:
        yield from of_schedule(run, found)
    bases = {
        "model.rope_theta": run.model.rope_theta,
        SCHEDULE: any(stage.rope_theta for stage in found),
    }
    for key in [key for key, base in bases.items() if base]:
        if run.model.backend == "transformers":
            yield f"{key} names a base of rotary positions, but model.backend = 'transformers' takes it from {run.model_config_source}"
        elif run.model_config and not has_turns(run.model_config):
            yield f"{key} names a base of rotary positions, but no layer of {run.model_config_source} has any: leave it out"
    if run.training.tbptt_exact and run.training.tbptt_segments == 1:
        yield f"training.tbptt_exact = true says how gradients pass segments, but {SEGMENTS} = 1: set that too, or leave it out"
    if run.training.tbptt_segments > 1:
        yield from of_segments(run, found)


def of_schedule(run: Any, found: tuple[Stage, ...]) -> Iterator[str]:
    longest = max(stage.seq_len for stage in found)
    seq_len = run.training.seq_len
    if longest != seq_len:
        yield f"{SCHEDULE}: its longest rows have {longest} tokens, and training.seq_len = {seq_len}: set that to {longest} too"
        return
    for stage in found:
        if seq_len % stage.seq_len:
            below = max(n for n in range(1, stage.seq_len) if seq_len % n == 0)
            yield (
                f"{SCHEDULE}: {stage.seq_len} does not divide training.seq_len = {seq_len}, so steps could not have equally many "
                f"tokens: take {below}, or another longest length"
            )
        if (
            run.parallelism.sequence_parallel
            and stage.seq_len % run.degrees["tp"]
            and run.degrees["cp"] == 1
        ):
            yield (
                f"{SCHEDULE}: parallelism.tensor_parallel_degree = {run.degrees['tp']} must divide {stage.seq_len}, since processes "
                "share the tokens of a row; change one of them, or set parallelism.sequence_parallel to false"
            )
    if run.degrees["pp"] > 1 and len({stage.seq_len for stage in found}) > 1:
        yield (
            f"{SCHEDULE}: stages of a pipeline send tensors of one size: set parallelism.pipeline_parallel_degree to 1, or train "
            "each length in a run of its own (model.weights)"
        )


def of_segments(run: Any, found: tuple[Stage, ...]) -> Iterator[str]:
    count = run.training.tbptt_segments
    config = run.model_config
    given = f"{SEGMENTS} = {count}"
    shortest = min(stage.seq_len for stage in found)
    if count > shortest:
        yield f"{given} is more than a row's {shortest} tokens: set it to at most that"
    for axis, degree, why in (
        (
            "pp",
            "pipeline_parallel_degree",
            "a pipeline's stages have no room for states between microbatches",
        ),
        ("cp", "context_parallel_degree", "a row that processes share is cut already"),
    ):
        if run.degrees.get(axis, 1) > 1:
            yield f"{given} with parallelism.{degree} = {run.degrees[axis]}: {why}; set one of them to 1"
    if run.degrees["tp"] > 1 and run.parallelism.sequence_parallel:
        lengths = {piece for stage in found for piece in segment_lengths(stage.seq_len, count)}
        if any(length % run.degrees["tp"] for length in lengths):
            yield (
                f"{given} makes segments of {sorted(lengths)} tokens, which parallelism.tensor_parallel_degree = {run.degrees['tp']} "
                "does not divide: change one of them, or set parallelism.sequence_parallel to false"
            )
    if run.model.backend == "transformers":
        yield f"{given} carries states of our own layers, but model.backend = 'transformers' has others: set it to 1"
    if run.distillation.teacher:
        yield f"{given}: a teacher sees whole rows; leave distillation.teacher out, or set it to 1"
    if isinstance(config, ModelConfig):
        yield from of_layers(run, config, given)


def of_layers(run: Any, config: ModelConfig, given: str) -> Iterator[str]:
    """Softmax layers whose numbers would not be those of a whole row, or whose graphs would be
    many."""
    if run.attention.kind == "blockwise" and run.data.varlen:
        yield (
            f"{given} with data.varlen: segments of documents are attended by torch's kernels, not in blocks; set attention.kind to "
            f"auto, or {SEGMENTS} to 1"
        )
    softmax = {
        name: config.mixers.get(name, {})
        for name in config.layer_types
        if mixer_of(name) == "attention"
    }
    for name, own in softmax.items():
        if own.get("rope") in ("dynamic", "longrope"):
            yield f"{given}: {name}.rope = {own['rope']!r} turns by the length of the whole text; take yarn or linear, or set it to 1"
        if own.get("dropout", 0) > 0:
            yield (
                f"{given}: {name}.dropout = {own['dropout']} of attention weights goes by keys of the whole row; set it to 0 in "
                f"{run.model_config_source}, or {SEGMENTS} to 1"
            )
    if softmax and run.training.compile == "on":
        yield (
            f"{given} with training.compile = 'on': each segment of a softmax layer sees another number of keys, and would be "
            "compiled anew; set compile to off"
        )


def segment_lengths(tokens: int, segments: int) -> list[int]:
    """Of a row of so many tokens: all equal, but for the last, which may be shorter."""
    length = -(-tokens // segments)
    return [min(length, tokens - start) for start in range(0, tokens, length)]
