"""What of a run cannot be, each with the key, the number and the fix: before data or a device is
touched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longfire.config import settings
from longfire.config.model_config import PUBLISHED, ModelConfig, TransformersConfig, mixer_of
from longfire.errors import SettingsError
from longfire.parallel import stages
from longfire.parallel.plan import DEGREES, MESH_DIM
from longfire.plural import counted
from longfire.training import lengths
from longfire.training.schedule import read_plan

FEWEST_WORDS = 258  # of a tokenizer: bytes and two ends; where only the data will say how many
Run = Any  # run.Run, whose file asks `check`


def check(run: Run, trains: bool = True, planned: bool = False) -> None:
    """Raises SettingsError with everything that cannot be, each with its fix: what needs no data
    and no device to be seen. Who only reads a run does not ask whether its plan and batch suit the
    processes that are here now; what is only planned may start from weights that are not here
    yet."""
    problems = [
        *(of_plan(run) if trains else ()),
        *(of_batch(run) if trains else ()),
        *of_length(run),
        *lengths.refusals(run),
        *of_model(run),
        *of_optimizer(run, trains),
        *of_backend(run),
        *of_data(run),
        *(() if planned else of_start(run)),
        *of_files(run),
    ]
    if problems:
        raise SettingsError("\n".join(problems))


def of_plan(run: Run) -> Iterator[str]:
    """The plan is one that is proven, and what is asked of many processes makes sense for them."""
    many = run.world.size > 1
    parallelism = run.parallelism
    if run.degrees["pp"] > 1 and run.model_config:
        yield from stages.refusals(
            run.model_config,
            run.degrees["pp"],
            parallelism,
            run.microbatches,
            bool(run.distillation.teacher),
        )
        if (rows := run.training.batch_size * run.accumulation) % run.microbatches:
            yield (
                f"parallelism.pipeline_parallel_microbatches: {rows} rows of a process do not divide into {run.microbatches}: take a "
                "divisor, or another training.batch_size"
            )
    if max(run.degrees["tp"], run.degrees["cp"]) > 1 and run.model_config:
        yield from of_shared_parts(run)
    for key in ("strategy", "layout"):
        asked = getattr(parallelism, f"context_parallel_{key}")
        if asked != "auto" and run.degrees["cp"] == 1:
            yield (
                f"parallelism.context_parallel_{key} = {asked!r} is about rows that processes share, but context_parallel_degree = 1: "
                "raise that, or leave this out"
            )
    for key in ("cpu_offload", "param_gather_dtype"):
        value = getattr(parallelism, key)
        if (
            value != getattr(settings.Parallelism, key)
            and run.data_processes * run.degrees["cp"] == 1
        ):
            yield f"parallelism.{key} = {value!r} is about sharded parameters, but nothing is sharded here: leave it out"
    if not many:
        return
    if run.distillation.teacher:
        yield f"distillation.teacher = {run.distillation.teacher!r} is not supported with {run.world.size} processes yet: start one"
    if run.model.backend == "transformers" and run.data_processes != run.world.size:
        yield "model.backend = 'transformers' knows nothing of the model's inside: only data_parallel degrees may be above 1"
    if run.model.backend == "transformers":
        from longfire.huggingface.transformers_model import dropouts

        for key, share in dropouts(run.model_config).items():
            yield f"{key} = {share} of {run.model_config_source}: their dropout differs with the processes; set it to 0, or start one"
    for key, wanted in {
        "checkpoint.export": run.checkpoint.export,
        "eval.sample_prompt": run.eval.sample_prompt,
    }.items():
        if wanted and not run.checkpoint.enable_checkpoint:
            yield f"{key} reads the last checkpoint when several processes train, but enable_checkpoint = false: set it to true"
    if run.checkpoint.create_seed_checkpoint:
        yield "checkpoint.create_seed_checkpoint is made by one process (any number resumes from it): start one"


def of_shared_parts(run: Run) -> Iterator[str]:
    """What of the model's matrices, and of its rows, so many processes cannot share: its parts say
    it."""
    from longfire.model import on_meta  # the parts need torch
    from longfire.parallel import context, tensor

    if isinstance(run.model_config, TransformersConfig):
        return  # refused as such
    model = on_meta(
        run.model_config.with_vocabulary(run.model_config.vocab_size or 256)
    )  # bytes, the fewest
    sequence = run.parallelism.sequence_parallel
    length = run.training.seq_len
    yield from tensor.refusals(
        model,
        run.degrees["tp"],
        sequence,
        length,
        bool(run.distillation.teacher),
        run.degrees["cp"],
    )
    shortest = lengths.shortest(run.training)
    yield from context.refusals(
        model, run.degrees["cp"], run.degrees["tp"], shortest, run.parallelism
    )


def of_batch(run: Run) -> Iterator[str]:
    """A global batch is what was asked for to the row, or an error; never rounded."""
    training = run.training
    processes = run.data_processes
    rows = training.batch_size
    wanted = training.global_batch_size
    at_once = rows * processes
    if not wanted:
        return
    if wanted % at_once:
        below = wanted // at_once * at_once
        above = (wanted // at_once + 1) * at_once
        multiples = f"{below} or {above}" if below else f"{above}"
        share = wanted // processes if wanted % processes == 0 else 0
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        near = sorted(
            {*[d for d in divisors if d < rows][-1:], *[d for d in divisors if d > rows][:1]}
        )
        yield (
            f"training.global_batch_size = {wanted} is no multiple of batch_size x processes = {rows} x {processes} = {at_once}, "
            f"and it is never rounded: take {multiples}"
            + (f", or a training.batch_size of {' or '.join(map(str, near))}" if near else "")
        )
    elif training.gradient_accumulation_steps and run.sequences_per_step != wanted:
        yield (
            f"training.gradient_accumulation_steps = {training.gradient_accumulation_steps} x batch_size {rows} x processes "
            f"{processes} = {run.sequences_per_step} rows, but training.global_batch_size = {wanted}: leave one of them out, or set "
            f"gradient_accumulation_steps to {wanted // at_once}"
        )


def of_length(run: Run) -> Iterator[str]:
    """The plan of steps can be read; warm-up and decay fit into the run; rows fit the model and its
    documents."""
    scheduler = run.lr_scheduler
    seq_len = run.training.seq_len
    try:
        read_plan(run.training.step_plan)
    except SettingsError as error:
        yield str(error)
        return
    if run.steps > run.asked_steps:
        key = "training.tokens" if run.training.tokens else "training.steps"
        yield (
            f"training.step_plan plans {counted(run.steps, 'step')}, more than the {run.asked_steps} of {key}: raise {key}, or leave "
            "training.step_plan out (--training.step_plan=)"
        )
    warmup = run.asked_warmup_steps
    decay = scheduler.decay_ratio * run.steps
    if scheduler.name == "wsd" and not run.is_planned and run.steps - decay < warmup < run.steps:
        key = "warmup_tokens" if scheduler.warmup_tokens else "warmup_steps"
        yield (
            f"lr_scheduler.decay_ratio = {scheduler.decay_ratio} takes {decay:g} of {counted(run.steps, 'step')}, and "
            f"lr_scheduler.{key} = {getattr(scheduler, key)} more than the rest: shorten one of them"
        )
    limit = run.model_config.max_position_embeddings if run.model_config else 0
    positional = run.model_config and (
        run.model_config.learned_positions
        or "attention" in map(mixer_of, run.model_config.layer_types)
    )
    if limit and seq_len > limit and positional:
        yield (
            f"training.seq_len = {seq_len} is longer than max_position_embeddings = {limit} of {run.model_config_source}: shorten it, or "
            "raise that number (rotary positions extrapolate, learned ones cannot)"
        )
    if run.data.context_len and not run.data.varlen:
        yield f"data.context_len = {run.data.context_len} splits documents, which only data.varlen = true keeps apart: set that too"
    if run.data.context_len == 1:
        yield "data.context_len = 1 cuts documents into single tokens, of which none can be predicted: raise it, or set it to 0"
    if run.data.context_len > seq_len:
        yield f"data.context_len = {run.data.context_len} is longer than a row, training.seq_len = {seq_len}: set it to 0 for no limit"


def of_model(run: Run) -> Iterator[str]:
    """What is asked of the model's parts needs the parts."""
    yield from of_learning_rates(run)
    yield from of_outputs(run)
    mode = run.activation_checkpoint.mode
    size = run.training.mlp_chunk_size
    attention = run.attention
    if run.model_config and run.model_config.mlp == "none" and mode in ("mlp", "attention+mlp"):
        yield f"activation_checkpoint.mode = {mode!r}, but this model's blocks have no MLP: take attention, block or none"
    if run.model_config and run.model_config.mlp == "none" and size:
        yield f"training.mlp_chunk_size = {size}, but this model's blocks have no MLP: leave it out"
    if attention.kind != "auto":
        if run.model_config and "attention" not in map(mixer_of, run.model_config.layer_types):
            yield f"attention.kind = {attention.kind!r}, but no layer of this model has softmax attention: leave it at auto"
        if run.model.kernels == "reference":
            yield f"attention.kind = {attention.kind!r}, but model.kernels = 'reference' computes with all scores: set one of them to auto"
    if attention.kind != "blockwise":
        for key in ("query_chunk_size", "key_chunk_size"):
            if (chunk := getattr(attention, key)) != getattr(settings.Attention, key):
                yield f"attention.{key} = {chunk} is about blockwise attention: set attention.kind = 'blockwise', or leave it out"
    yield from of_policy(run)


def of_learning_rates(run: Run) -> Iterator[str]:
    """A head that is the embedding has no learning rate of its own, and something learns."""
    optimizer = run.optimizer
    scale = optimizer.head_lr_scale
    if scale != settings.Optimizer.head_lr_scale and ties_head(run.model_config):
        yield (
            f"optimizer.head_lr_scale = {scale:g}, but with tie_word_embeddings = true in {run.model_config_source} the head is the "
            "embedding: set optimizer.embedding_lr_scale, and leave head_lr_scale out"
        )
    roles = ("embedding", "head", "matrix", "other")
    if not any(getattr(optimizer, f"{role}_lr_scale") for role in roles):
        yield (
            "optimizer.embedding_lr_scale, head_lr_scale, matrix_lr_scale and other_lr_scale are all 0, so nothing "
            "would learn: set one of them above 0"
        )


def of_optimizer(run: Run, trains: bool) -> Iterator[str]:
    """The optimizer is known, and the plan is one that a test proves for it."""
    from longfire import plugins  # they need torch
    from longfire.optim.refusals import refusals

    if not plugins.are_loaded(run.model.plugins):
        return  # who only prepares data runs no plugin, which may bring the optimizer
    asked = {}
    for axis, degree in run.degrees.items():
        if trains and degree > 1:
            asked[axis] = degree_of(run, axis)
    try:
        yield from refusals(run.optimizer, asked)
    except SettingsError as error:
        yield str(error)


def degree_of(run: Run, axis: str) -> str:
    """The setting that says how many processes lie along an axis, with its value."""
    if run.parallelism.mesh_dim and axis in MESH_DIM:
        return f"parallelism.mesh_dim = {run.parallelism.mesh_dim!r} ({DEGREES[axis]})"
    asked = getattr(run.parallelism, DEGREES[axis])
    here = f" ({run.degrees[axis]} processes)" if asked == -1 else ""
    return f"parallelism.{DEGREES[axis]} = {asked}{here}"


def ties_head(config: ModelConfig | TransformersConfig | None) -> bool:
    """Whether embedding and head are one matrix."""
    if not isinstance(config, TransformersConfig):
        return config is not None and config.tie_word_embeddings
    from longfire.huggingface.transformers_model import config_of

    return bool(getattr(config_of(config.config), "tie_word_embeddings", False))


def of_outputs(run: Run) -> Iterator[str]:
    """Where the matrices that end a mixer begin by a rule, every mixer says which they are."""
    if not isinstance(run.model_config, ModelConfig) or run.model_config.init_outputs == PUBLISHED:
        return
    from longfire.mixers import MIXERS  # they need torch, and a plugin may have added some

    for name in dict.fromkeys(map(mixer_of, run.model_config.layer_types)):
        if "row" not in MIXERS[name].roles.values():
            yield (
                f"init_outputs = {run.model_config.init_outputs!r} of {run.model_config_source}, but the mixer {name} does not say which matrix "
                'ends it: give its `roles` an entry "row", or leave init_outputs out'
            )


def of_policy(run: Run) -> Iterator[str]:
    """What a recomputed part keeps is something, and does not undo what another setting is for."""
    remat = run.activation_checkpoint
    policy = ",".join(remat.policy)
    setting = f"activation_checkpoint.policy = {','.join(remat.policy)!r}"
    if policy in ("", "nothing"):
        return
    if "nothing" in remat.policy:
        yield f"{setting} keeps nothing and something: choose one"
    if remat.mode == "none":
        yield f"{setting} is about parts that are recomputed: set activation_checkpoint.mode too"
    if remat.offload:
        yield f"{setting} keeps outputs on the device, which activation_checkpoint.offload is to free: choose one"
    if run.training.mlp_chunk_size and remat.mode == "block":
        yield (
            f"{setting} keeps the wide rows of the MLP that training.mlp_chunk_size = {run.training.mlp_chunk_size} is to avoid: set "
            "activation_checkpoint.mode = 'attention', or one of them to its default"
        )
    if remat.policy != ("matmuls",):
        from longfire.parallel.remat import unknown_operations  # torch knows their names

        for name in unknown_operations(remat.policy):
            yield f"{setting}: torch has no operation {name!r}: write nothing, matmuls, or names as mm, bmm or longfire.attend_blocks"


def of_backend(run: Run) -> Iterator[str]:
    """A model of transformers is one piece: what asks for parts of it, or for parts of ours, is
    refused."""
    if run.model.backend == "longfire":
        return
    setting = "model.backend = 'transformers' knows nothing of the model's inside"
    if run.activation_checkpoint.mode != "none":
        yield f"activation_checkpoint.mode = {run.activation_checkpoint.mode!r} computes parts again, but {setting}: set it to none"
    if run.activation_checkpoint.offload:
        yield f"activation_checkpoint.offload = true moves what blocks keep, but {setting}: set it to false"
    if run.attention.kind != "auto":
        yield f"attention.kind = {run.attention.kind!r} is about our attention, but {setting}: leave it at auto"
    if run.training.mlp_chunk_size:
        yield f"training.mlp_chunk_size = {run.training.mlp_chunk_size} is about our MLPs, but {setting}: set it to 0"
    if run.model.kernels != "auto":
        yield f"model.kernels = {run.model.kernels!r} chooses among kernels of ours, but {setting}: leave it at auto"
    if run.distillation.teacher:
        yield f"distillation.teacher = {run.distillation.teacher!r} compares mixers and hidden states, but {setting}: leave it out"


def of_data(run: Run) -> Iterator[str]:
    """Parallel lists are as long as data.dataset; what is evaluated is held out; the order
    exists."""
    data = run.data
    count = len(run.data.dataset)
    if not count or not all(data.dataset):
        yield f"data.dataset = {list(data.dataset)} names no source, or an empty one: name files, folders or hub datasets"
    for name in ("dataset_name", "dataset_split", "data_dir", "data_files", "text_field"):
        values = getattr(data, name)
        if len(values) not in (0, 1, count):
            yield (
                f"data.{name} has {len(values)} entries for {count} sources: give one, or one for each (`a,,b` leaves the second "
                "empty)"
            )
    if data.data_probs and len(data.data_probs) != count:
        yield f"data.data_probs has {len(data.data_probs)} entries for {count} sources: give one for each, or none for equal shares"
    if any(share <= 0 for share in data.data_probs):
        yield f"data.data_probs = {list(data.data_probs)}: each share must be positive; leave a source out that should have none"
    if data.streaming and data.shuffle == "global":
        yield 'data.shuffle = "global" permutes the whole store, whose length data.streaming does not know: use "window" or "auto"'
    if not (data.validation_fraction or data.validation) and (run.eval.at_end or run.eval.interval):
        yield (
            "data.validation_fraction = 0 leaves nothing to evaluate: hold some documents out, name texts in data.validation, or set "
            "eval.at_end = false and eval.interval = 0"
        )
    both = []
    for entry in data.validation:
        if entry in data.dataset and (entry == "embedded" or Path(entry).exists()):
            both.append(entry)
    if both:
        yield f"data.validation names {', '.join(both)}, which data.dataset trains on: leave it out of one of them"
    if data.validation and not all(data.validation):
        yield f"data.validation = {list(data.validation)} has an empty entry: leave it out"
    if run.eval.compare_xz and not run.eval.at_end:
        yield "eval.compare_xz compares with the last evaluation: set eval.at_end = true"
    words = run.model_config.vocab_size if run.model_config else 0
    if run.tokenizer.path == "train" and words and words < run.tokenizer.train_vocab_size:
        yield (
            f"tokenizer.train_vocab_size = {run.tokenizer.train_vocab_size} is more than vocab_size = {words} of "
            f"{run.model_config_source}: lower it, or set vocab_size to 0 there (as many as the tokenizer has)"
        )


def of_start(run: Run) -> Iterator[str]:
    """What a new run starts and learns from is there."""
    weights = run.model.weights
    teacher = run.distillation.teacher
    if weights and not Path(weights).is_dir() and not run.has_checkpoints:
        yield (
            f"model.weights = {weights!r} is no folder: name one that holds Hugging Face weights (safetensors and config.json), a run "
            "folder, or a checkpoint in one; a model of the hub comes by `longfire import NAME RUN`"
        )
    if teacher and not Path(teacher).is_dir():
        yield f"distillation.teacher = {teacher!r} is no folder: name a run folder or one of Hugging Face weights"


def of_files(run: Run) -> Iterator[str]:
    """Combinations of the checkpoint's settings; folders inside the run folder stay inside."""
    checkpoint = run.checkpoint
    if not checkpoint.enable_checkpoint:
        for name in ("create_seed_checkpoint", "model_weights_only"):
            if getattr(checkpoint, name):
                yield f"checkpoint.{name} = true saves a checkpoint, but checkpoint.enable_checkpoint = false: set one of them right"
        if checkpoint.load_step >= 0:
            yield f"checkpoint.load_step = {checkpoint.load_step} loads a checkpoint, but enable_checkpoint = false: set one right"
    if checkpoint.load_step_again and checkpoint.load_step < 0:
        yield "checkpoint.load_step_again = true goes back to checkpoint.load_step once more, which is not set: set it"
    if checkpoint.create_seed_checkpoint and checkpoint.model_weights_only:
        yield "checkpoint.create_seed_checkpoint makes a start to resume from, which model_weights_only cannot be: choose one"
    if checkpoint.create_seed_checkpoint and checkpoint.load_step > 0:
        yield f"checkpoint.create_seed_checkpoint saves step 0, load_step = {checkpoint.load_step} asks for another: choose one"
    inside = (
        "checkpoint.folder",
        "metrics.save_tb_folder",
        "profiling.save_traces_folder",
        "profiling.save_memory_snapshot_folder",
    )
    for key in inside:
        section, name = key.split(".")
        folder = Path(getattr(getattr(run, section), name))
        if folder.is_absolute() or ".." in folder.parts or not folder.parts:
            yield f"{key} = {str(folder)!r} must be a folder inside the run folder: a relative path without .."
