"""What is refused of a run about its processes: plans that are not proven, and settings without a
meaning for so many processes."""

from collections.abc import Iterator

from longfire.config.run_settings import RunSettings
from longfire.config.transformers_config import TransformersConfig
from longfire.parallel import stages
from longfire.training import lengths

BYTES = 256  # the smallest vocabulary; where the data will decide its size


def of_pipeline(run: RunSettings) -> Iterator[str]:
    """The settings of a pipeline can be read; the layers divide among its stages, and the sequences
    into its micro-batches."""
    misspelled = list(stages.misspelled(run.parallelism))
    yield from misspelled
    if misspelled:
        return
    if run.degrees["pp"] == 1 or run.model_config is None:
        return
    has_teacher = bool(run.distillation.teacher)
    yield from stages.refusals(
        run.model_config, run.degrees["pp"], run.parallelism, run.microbatches, has_teacher
    )
    sequences = run.training.batch_size * run.accumulation
    if sequences % run.microbatches:
        yield (
            f"parallelism.pipeline_parallel_microbatches: {sequences} sequences of a process do "
            f"not divide into {run.microbatches}: take a divisor, or another training.batch_size"
        )


def of_shared_parts(run: RunSettings) -> Iterator[str]:
    """The parts of the model can be sharded by tensor parallelism, and their sequences by context
    parallelism."""
    if max(run.degrees["tp"], run.degrees["cp"]) == 1 or run.model_config is None:
        return
    if isinstance(run.model_config, TransformersConfig):
        return  # refused by of_several_processes
    from longfire.model import on_meta  # the parts need torch
    from longfire.parallel import context_refusals, tensor_refusals

    vocab_size = run.model_config.vocab_size or BYTES
    model = on_meta(run.model_config.with_vocabulary(vocab_size))
    yield from tensor_refusals.refusals(
        model,
        run.degrees["tp"],
        run.parallelism.sequence_parallel,
        run.training.seq_len,
        run.degrees["cp"],
    )
    shortest = lengths.shortest(run.training)
    yield from context_refusals.refusals(
        model, run.degrees["cp"], run.degrees["tp"], shortest, run.parallelism
    )


def of_context_settings(run: RunSettings) -> Iterator[str]:
    """Settings of context parallelism are given only with it."""
    if run.degrees["cp"] > 1:
        return
    for key in ("context_parallel_strategy", "context_parallel_layout"):
        value = getattr(run.parallelism, key)
        if value != "auto":
            yield (
                f"parallelism.{key} = {value!r} is about sequences that processes share, but "
                "context_parallel_degree = 1: raise that, or leave this out"
            )


def of_sharding_settings(run: RunSettings) -> Iterator[str]:
    """Settings of sharded parameters are given only where some are sharded."""
    if run.data_processes * run.degrees["cp"] > 1:
        return
    if run.parallelism.param_gather_dtype == "bfloat16":
        yield (
            "parallelism.param_gather_dtype = 'bfloat16' is about sharded parameters, but nothing "
            "is sharded here: leave it out"
        )


def of_parameters_in_pieces(run: RunSettings) -> Iterator[str]:
    """What needs the whole model, where a process has shards, or has them on the host."""
    if run.world.size == 1 and not run.parallelism.cpu_offload:
        return
    reads_last_checkpoint = {
        "checkpoint.export": run.checkpoint.export,
        "eval.sample_prompt": run.eval.sample_prompt,
    }
    for key, wanted in reads_last_checkpoint.items():
        if wanted and not run.checkpoint.enable_checkpoint:
            yield (
                f"{key} reads the last checkpoint when several processes train, or with "
                "parallelism.cpu_offload, but enable_checkpoint = false: set it to true"
            )


def of_several_processes(run: RunSettings) -> Iterator[str]:
    """What one process can do only."""
    processes = run.world.size
    if processes == 1:
        return
    if run.model.backend == "transformers" and run.data_processes != processes:
        yield (
            "model.backend = 'transformers' knows nothing of the model's inside: only "
            "data_parallel degrees may be above 1"
        )
    if isinstance(run.model_config, TransformersConfig):
        from longfire.huggingface.transformers_model import dropouts

        for key, share in dropouts(run.model_config).items():
            yield (
                f"{key} = {share} of {run.model_config_source}: the dropout of transformers "
                "differs with the number of processes; set it to 0, or start one"
            )
    if run.checkpoint.create_seed_checkpoint:
        yield (
            "checkpoint.create_seed_checkpoint is made by one process (any number resumes from "
            "it): start one"
        )
