"""What is refused of a run about the lengths of its sequences over time (training/lengths.py) and
the segments that they are computed in (training/tbptt.py)."""

from collections.abc import Iterator

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.run_settings import RunSettings
from longfire.errors import SettingsError
from longfire.training.lengths import SCHEDULE, Stage, has_turns, segment_lengths, stages

SEGMENTS = "training.tbptt_segments"


def refusals(run: RunSettings) -> Iterator[str]:
    """The lengths of a run that are refused, each with its fix."""
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
    for key, base in bases.items():
        if not base:
            continue
        if run.model.backend == "transformers":
            yield (
                f"{key} names a base of rotary positions, but model.backend = 'transformers' "
                f"takes it from {run.model_config_source}"
            )
        elif run.model_config and not has_turns(run.model_config):
            yield (
                f"{key} names a base of rotary positions, but no layer of "
                f"{run.model_config_source} has any: leave it out"
            )
    if run.training.tbptt_exact and run.training.tbptt_segments == 1:
        yield (
            f"training.tbptt_exact = true says how gradients pass segments, but {SEGMENTS} = 1: "
            "set that too, or leave it out"
        )
    if run.training.tbptt_segments > 1:
        yield from of_segments(run, found)


def of_schedule(run: RunSettings, found: tuple[Stage, ...]) -> Iterator[str]:
    """The lengths divide the longest one, and the processes that share a sequence."""
    longest = max(stage.seq_len for stage in found)
    seq_len = run.training.seq_len
    if longest != seq_len:
        yield (
            f"{SCHEDULE}: its longest sequences have {longest} tokens, and training.seq_len = "
            f"{seq_len}: set that to {longest} too"
        )
        return
    for stage in found:
        if seq_len % stage.seq_len:
            below = max(n for n in range(1, stage.seq_len) if seq_len % n == 0)
            yield (
                f"{SCHEDULE}: {stage.seq_len} does not divide training.seq_len = {seq_len}, so "
                f"steps could not have equally many tokens: take {below}, or another longest "
                "length"
            )
        if (
            run.parallelism.sequence_parallel
            and stage.seq_len % run.degrees["tp"]
            and run.degrees["cp"] == 1
        ):
            yield (
                f"{SCHEDULE}: parallelism.tensor_parallel_degree = {run.degrees['tp']} must "
                f"divide {stage.seq_len}, since processes share the tokens of a sequence; "
                "change one of them, or set parallelism.sequence_parallel to false"
            )
    if run.degrees["pp"] > 1 and len({stage.seq_len for stage in found}) > 1:
        yield (
            f"{SCHEDULE}: stages of a pipeline send tensors of one size: set "
            "parallelism.pipeline_parallel_degree to 1, or train each length in a run of its "
            "own (model.weights)"
        )


def of_segments(run: RunSettings, found: tuple[Stage, ...]) -> Iterator[str]:
    """The model, the data and the plan of processes permit segments."""
    count = run.training.tbptt_segments
    config = run.model_config
    given = f"{SEGMENTS} = {count}"
    shortest = min(stage.seq_len for stage in found)
    if count > shortest:
        yield f"{given} is more than a sequence's {shortest} tokens: set it to at most that"
    for axis, degree, why in (
        (
            "pp",
            "pipeline_parallel_degree",
            "a pipeline's stages have no room for states between microbatches",
        ),
        ("cp", "context_parallel_degree", "a sequence that processes share is cut already"),
    ):
        if run.degrees.get(axis, 1) > 1:
            yield (
                f"{given} with parallelism.{degree} = {run.degrees[axis]}: {why}; set one of "
                "them to 1"
            )
    if run.degrees["tp"] > 1 and run.parallelism.sequence_parallel:
        lengths = {piece for stage in found for piece in segment_lengths(stage.seq_len, count)}
        if any(length % run.degrees["tp"] for length in lengths):
            yield (
                f"{given} makes segments of {sorted(lengths)} tokens, which "
                f"parallelism.tensor_parallel_degree = {run.degrees['tp']} "
                "does not divide: change one of them, or set parallelism.sequence_parallel to false"
            )
    if run.model.backend == "transformers":
        yield (
            f"{given} carries states of our own layers, but model.backend = 'transformers' has "
            "others: set it to 1"
        )
    if run.distillation.teacher:
        yield (
            f"{given}: a teacher sees whole sequences; leave distillation.teacher out, or set it "
            "to 1"
        )
    if isinstance(config, ModelConfig):
        yield from of_layers(run, config, given)


def of_layers(run: RunSettings, config: ModelConfig, given: str) -> Iterator[str]:
    """Softmax layers whose results would not be those of a whole sequence, or that would be
    compiled many times."""
    if run.attention.kind == "blockwise" and run.data.varlen:
        yield (
            f"{given} with data.varlen: segments of documents are attended by torch's kernels, "
            f"not in blocks; set attention.kind to auto, or {SEGMENTS} to 1"
        )
    softmax = {
        name: config.mixers.get(name, {})
        for name in config.layer_types
        if mixer_of(name) == "attention"
    }
    for name, own in softmax.items():
        if own.get("rope") in ("dynamic", "longrope"):
            yield (
                f"{given}: {name}.rope = {own['rope']!r} turns by the length of the whole text; "
                "take yarn or linear, or set it to 1"
            )
        if own.get("dropout", 0) > 0:
            yield (
                f"{given}: {name}.dropout = {own['dropout']} of attention weights goes by keys "
                f"of the whole sequence; set it to 0 in {run.model_config_source}, or {SEGMENTS} "
                "to 1"
            )
    if softmax and run.training.compile == "on":
        yield (
            f"{given} with training.compile = 'on': each segment of a softmax layer sees another "
            "number of keys, and would be compiled anew; set compile to off"
        )
