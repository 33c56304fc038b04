"""Settings that change nothing in a run, because of another setting: what somebody has asked for
and will not get is logged once, at the start."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import NamedTuple

from longfire.config import settings
from longfire.config.aliases import as_text
from longfire.config.recipe import SETTINGS
from longfire.config.run_settings import RunSettings
from longfire.training.schedule import BY_STEPS


class Idle(NamedTuple):
    """keys: settings that are read only where the run does something else than it does.

    is_idle: whether this run does not. why: the setting that decides it, and its value.
    """

    keys: tuple[str, ...]
    is_idle: Callable[[RunSettings], bool]
    why: str


IMAGES = tuple(field.name for field in fields(settings.Images))
CLASSIFICATION = tuple(field.name for field in fields(settings.Classification))


def keys_of(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


OF_TEXT = "language_modeling"


def of_schedule(name: str, *keys: str) -> Idle:
    """Settings of one shape of the learning rate."""
    return Idle(
        keys_of("lr_scheduler", *keys),
        lambda run: run.lr_scheduler.name != name,
        f"lr_scheduler.name is not {name}",
    )


# The shapes that fall by lr_scheduler.gamma
DROPPING = ("step", "multistep", "plateau")

IDLE = (
    Idle(
        (*keys_of("images", *IMAGES), *keys_of("classification", *CLASSIFICATION)),
        lambda run: run.job.task == OF_TEXT,
        "job.task is language_modeling, which has no images and no classes",
    ),
    Idle(
        keys_of("data", "folder"),
        lambda run: run.job.task in ("image_classification", "sequence_classification"),
        "job.task keeps no token stores",
    ),
    Idle(
        keys_of(
            "checkpoint",
            "folder",
            "interval_type",
            "interval",
            "milestone_interval",
            "keep_latest_k",
            "keep_best_k",
            "load_step",
            "load_step_again",
            "async_mode",
            "create_seed_checkpoint",
            "model_weights_only",
        ),
        lambda run: not run.checkpoint.enable_checkpoint,
        "checkpoint.enable_checkpoint is false",
    ),
    Idle(
        keys_of("checkpoint", "export_dtype"),
        lambda run: not run.checkpoint.export,
        "checkpoint.export is false, and checkpoints keep float32",
    ),
    Idle(
        keys_of(
            "profiling",
            "save_traces_folder",
            "profile_freq",
            "enable_memory_snapshot",
            "save_memory_snapshot_folder",
        ),
        lambda run: not run.profiling.enable_profiling,
        "profiling.enable_profiling is false",
    ),
    Idle(
        keys_of("profiling", "enable_memory_snapshot"),
        lambda run: run.training.device == "cpu",
        "training.device is cpu, and snapshots are of CUDA memory",
    ),
    Idle(
        keys_of("profiling", "enable_memory_snapshot"),
        lambda run: has_no_cuda(),
        "torch sees no CUDA device here, and snapshots are of CUDA memory",
    ),
    Idle(
        keys_of("comm", "trace_buf_size"),
        lambda run: run.training.device == "cpu",
        "training.device is cpu, and the flight recorder is one of NCCL",
    ),
    Idle(
        keys_of("comm", "trace_buf_size"),
        lambda run: has_no_cuda(),
        "torch sees no CUDA device here, and the flight recorder is one of NCCL",
    ),
    Idle(
        keys_of("comm", "trace_buf_size"),
        lambda run: run.world.size == 1,
        "the run has one process, which exchanges nothing with others",
    ),
    Idle(
        keys_of("lr_scheduler", "decay_ratio", "decay_shape"),
        lambda run: run.lr_scheduler.name != "wsd",
        "lr_scheduler.name is not wsd",
    ),
    Idle(
        keys_of("lr_scheduler", "warmup_shape"),
        lambda run: not run.asked_warmup_steps,
        "lr_scheduler.warmup_steps and warmup_tokens are 0",
    ),
    Idle(
        keys_of("lr_scheduler", "min_lr_ratio"),
        lambda run: run.lr_scheduler.name == "constant",
        "lr_scheduler.name is constant",
    ),
    Idle(
        keys_of("lr_scheduler", "decay_end_step"),
        lambda run: run.lr_scheduler.name in BY_STEPS,
        "lr_scheduler.name is of a shape that does not look at the length of the run",
    ),
    of_schedule("polynomial", "power"),
    of_schedule("inverse_sqrt", "timescale_steps"),
    of_schedule("step", "step_size"),
    of_schedule("multistep", "milestones"),
    of_schedule("plateau", "patience", "threshold"),
    Idle(
        keys_of("lr_scheduler", "gamma"),
        lambda run: run.lr_scheduler.name not in DROPPING,
        "lr_scheduler.name is none of step, multistep and plateau",
    ),
    Idle(
        keys_of("lr_scheduler", "warmup_steps"),
        lambda run: bool(run.lr_scheduler.warmup_tokens),
        "lr_scheduler.warmup_tokens is set",
    ),
    Idle(
        keys_of("optimizer", "weight_decay"),
        lambda run: run.optimizer.name == "Adam",
        "optimizer.name is Adam, which has no weight decay",
    ),
    Idle(
        keys_of("optimizer", "beta1", "beta2", "eps"),
        lambda run: run.optimizer.name in ("SGD", "Adafactor"),
        "optimizer.name is of a rule that has its own in optimizer.options",
    ),
    Idle(
        keys_of("optimizer", "momentum_dtype"),
        lambda run: run.optimizer.name not in ("AdamW", "Adam", "LAMB", "Adafactor"),
        "optimizer.name is of a rule that does not read it",
    ),
    Idle(
        keys_of("optimizer", "fused"),
        lambda run: (
            run.optimizer.name not in ("AdamW", "Adam") or run.optimizer.momentum_dtype != "float32"
        ),
        "a fused kernel is that of optimizer.name AdamW or Adam, with "
        "optimizer.momentum_dtype = float32",
    ),
    Idle(
        keys_of("distillation", "kind", "temperature", "ce_weight"),
        lambda run: not run.distillation.teacher,
        "distillation.teacher is empty",
    ),
    Idle(
        keys_of("distillation", "temperature", "ce_weight"),
        lambda run: run.distillation.kind == "hidden",
        "distillation.kind is hidden",
    ),
    Idle(
        keys_of("data", "context_len"),
        lambda run: not run.data.varlen,
        "data.varlen is false",
    ),
    Idle(
        keys_of("data", "shuffle_window_sequences"),
        lambda run: run.data.shuffle in ("global", "none"),
        "data.shuffle has no windows",
    ),
    Idle(
        keys_of("data", "shuffle_window_sequences"),
        lambda run: run.data.shuffle == "auto" and not run.data.streaming,
        "data.shuffle is auto without data.streaming, which is global",
    ),
    Idle(
        keys_of("data", "validation_split"),
        lambda run: not run.data.validation,
        "data.validation is empty",
    ),
    Idle(
        keys_of("data", "validation_fraction", "validation_seed"),
        lambda run: bool(run.data.validation),
        "data.validation names texts of its own",
    ),
    Idle(
        keys_of("data", "validation_seed"),
        lambda run: not run.data.validation_fraction,
        "data.validation_fraction is 0",
    ),
    Idle(
        keys_of("tokenizer", "train_vocab_size", "train_bytes"),
        lambda run: run.tokenizer.path != "train",
        "tokenizer.path is not train",
    ),
    Idle(
        keys_of("training", "max_skips_in_a_row"),
        lambda run: not run.training.skip_nan_inf,
        "training.skip_nan_inf is false",
    ),
    Idle(
        keys_of("training", "keep_rounded_weights"),
        lambda run: run.model.compute_dtype == "float32",
        "model.compute_dtype is float32, and nothing is rounded",
    ),
    Idle(
        keys_of("training", "keep_rounded_weights"),
        lambda run: gathers_parameters(run),
        "parameters are gathered: from several processes, or by parallelism.cpu_offload",
    ),
    Idle(
        keys_of("training", "steps"),
        lambda run: bool(run.training.tokens),
        "training.tokens is set",
    ),
    Idle(
        keys_of("parallelism", "sequence_parallel"),
        lambda run: run.degrees["tp"] == 1,
        "no process shares matrices with another one",
    ),
    Idle(
        keys_of("parallelism", "reshard_after_forward"),
        lambda run: run.degrees["dp_shard"] * run.degrees["cp"] == 1,
        "no process shares parameters with another one",
    ),
    Idle(
        keys_of(
            "parallelism",
            "pipeline_parallel_schedule",
            "pipeline_parallel_schedule_csv",
            "pipeline_parallel_split_points",
            "pipeline_parallel_microbatches",
        ),
        lambda run: run.degrees["pp"] == 1,
        "no process shares layers with another one",
    ),
    Idle(
        keys_of("float8", "recipe_name", "filter_fqns", "enable_fsdp_float8_all_gather", "emulate"),
        lambda run: not run.float8.enable_float8_linear,
        "float8.enable_float8_linear is false",
    ),
    Idle(
        keys_of("metrics", "save_tb_folder"),
        lambda run: not run.metrics.enable_tensorboard,
        "metrics.enable_tensorboard is false",
    ),
    Idle(
        keys_of("metrics", "wandb_project", "wandb_mode"),
        lambda run: not run.metrics.enable_wandb,
        "metrics.enable_wandb is false",
    ),
    Idle(
        keys_of("activation_checkpoint", "layers", "layer_interval"),
        lambda run: run.activation_checkpoint.mode == "none",
        "activation_checkpoint.mode is none",
    ),
    Idle(
        keys_of("eval", "ema"),
        lambda run: not run.optimizer.ema_decay,
        "optimizer.ema_decay is 0, so there is no average of the weights",
    ),
    Idle(
        keys_of("eval", "sample_tokens"),
        lambda run: not run.eval.sample_prompt,
        "eval.sample_prompt is empty",
    ),
    Idle(
        keys_of("eval", "tokens"),
        lambda run: not run.eval.interval and not run.eval.at_end,
        "nothing is evaluated: eval.interval is 0 and eval.at_end false",
    ),
)


def gathers_parameters(run: RunSettings) -> bool:
    """Whether FSDP2 makes the parameters that are computed with (parallel/apply.py)."""
    processes = run.degrees["dp_replicate"] * run.degrees["dp_shard"] * run.degrees["cp"]
    return processes > 1 or run.parallelism.cpu_offload


def has_no_cuda() -> bool:
    """Whether torch sees no CUDA device here."""
    import torch  # seconds, for those who name such a setting only

    return not torch.cuda.is_available()


def messages(run: RunSettings, named: Iterable[str]) -> Iterator[str]:
    """A line for each setting that was named with another value than its default and changes
    nothing in this run."""
    for key in named:
        section, name = key.split(".", 1)
        if key not in SETTINGS or getattr(getattr(run, section), name) == SETTINGS[key].default:
            continue
        reasons = [idle.why for idle in IDLE if key in idle.keys and idle.is_idle(run)]
        if reasons:
            value = as_text(getattr(getattr(run, section), name))
            yield f"{key} = {value!r} changes nothing in this run: {reasons[0]}"
