"""flash-attention's training/: what a run records and keeps (`callbacks`, `metrics`, `logger`)."""

from collections.abc import Mapping

from longfire.config.aliases.meaning import OFF, Dropped, Old, Refused, WithOthers
from longfire.errors import SettingsError

NONE = ("null", "none")
RECORDED = Dropped("every step records its loss, rate, time and memory in metrics.jsonl")
ENDS = "training.steps ends a run"
IN_RUN_FOLDER = "job.dump_folder is the run folder, and checkpoint.folder is in it"


def norm_monitor(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """Norms of all parameters whenever a step is logged; null: never."""
    if value.lower() in (*OFF, "null", "none"):
        return {"metrics.norms_freq": 0}
    return {"metrics.norms_freq": others.get("trainer.log_every_n_steps", "50")}


def names_of_group(value: str) -> list[str]:
    """The names of `group=[one, two]`."""
    return [name.strip() for name in value.strip("[]()").split(",") if name.strip()]


def metrics(value: str) -> dict[str, object]:
    """perplexity and num-tokens are always recorded, and acc where it is asked for. Raises
    SettingsError."""
    known = ("acc", "acc_ignore_index", "num-tokens", "perplexity", "ppl")
    for name in names_of_group(value):
        if name not in known:
            raise SettingsError(f"metrics = {value!r}: {name} is none of {', '.join(known)}")
    counts = any(name.startswith("acc") for name in names_of_group(value))
    return {"metrics.accuracy": counts}


def callbacks(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """norm-monitor records norms whenever a step is logged; callbacks.ema.decay keeps an average;
    the others ask for what every run has. Raises SettingsError for ema without its decay."""
    if "ema" in names_of_group(value) and "callbacks.ema.decay" not in others:
        raise SettingsError(
            f"callbacks = {value!r}: ema needs its decay: set callbacks.ema.decay beside it, or "
            "optimizer.ema_decay"
        )
    if "norm-monitor" in names_of_group(value) and "callbacks.norm_monitor" not in others:
        return norm_monitor("", others)
    return {}


def loggers(value: str) -> dict[str, object]:
    """wandb and tensorboard are switched on; csv is metrics.jsonl, which every run writes. Raises
    SettingsError for others."""
    trackers: dict[str, dict[str, object]] = {
        "wandb": {"metrics.enable_wandb": True},
        "tensorboard": {"metrics.enable_tensorboard": True},
        "csv": {},
        "null": {},
    }
    meanings: dict[str, object] = {}
    for name in names_of_group(value):
        if name not in trackers:
            raise SettingsError(
                f"logger = {value!r}: {name} is none of {', '.join(trackers)}; metrics.jsonl in "
                "the run folder has every record"
            )
        meanings |= trackers[name]
    return meanings


def best_checkpoints(value: str) -> dict[str, object]:
    """How many checkpoints of the lowest validation loss are kept, beside the newest; -1: all are
    kept."""
    if value == "-1":
        return {"checkpoint.keep_latest_k": 0}
    return {"checkpoint.keep_best_k": value, "checkpoint.keep_latest_k": 1}


RECORDS: dict[str, Old] = {
    "callbacks": WithOthers(callbacks),
    "metrics": metrics,
    "callbacks.norm_monitor": WithOthers(norm_monitor),
    "callbacks.norm_monitor.layer_norm_only": Refused("norms are those of all parameters"),
    "callbacks.ema.decay": "optimizer.ema_decay",
    "callbacks.ema.use_num_updates": Refused("the decay is the same at every step"),
    "callbacks.model_checkpoint.every_n_train_steps": "checkpoint.interval",
    "callbacks.model_checkpoint_progress.every_n_train_steps": "checkpoint.milestone_interval",
    "callbacks.model_checkpoint_progress.save_top_k": Refused(
        "checkpoints of checkpoint.milestone_interval are all kept", ("-1",)
    ),
    **dict.fromkeys(
        (
            "callbacks.model_checkpoint.dirpath",
            "callbacks.model_checkpoint.filename",
            "callbacks.model_checkpoint_progress.dirpath",
            "callbacks.model_checkpoint_progress.filename",
        ),
        Refused(IN_RUN_FOLDER, ()),
    ),
    **dict.fromkeys(
        (
            "callbacks.model_checkpoint.verbose",
            "callbacks.model_checkpoint.auto_insert_metric_name",
            "callbacks.model_checkpoint_progress.auto_insert_metric_name",
        ),
        Dropped("a checkpoint has the name of its step, and a line says that it is saved"),
    ),
    "callbacks.early_stopping": Refused(ENDS, NONE),
    **dict.fromkeys(
        (
            "callbacks.early_stopping.monitor",
            "callbacks.early_stopping.mode",
            "callbacks.early_stopping.patience",
            "callbacks.early_stopping.min_delta",
        ),
        Refused(ENDS, ()),
    ),
    **dict.fromkeys(
        (
            "callbacks.speed_monitor",
            "callbacks.speed_monitor.verbose",
            "callbacks.speed_monitor.intra_step_time",
            "callbacks.speed_monitor.inter_step_time",
            "callbacks.speed_monitor.epoch_time",
            "callbacks.learning_rate_monitor",
            "callbacks.learning_rate_monitor.logging_interval",
            "callbacks.params_log",
            "callbacks.params_log.total_params_log",
            "callbacks.params_log.trainable_params_log",
            "callbacks.params_log.non_trainable_params_log",
            "callbacks.gpu_stats_monitor",
            "callbacks.rich_model_summary",
            "callbacks.loss_scale_monitor",
            "eval.log_on_step",
        ),
        RECORDED,
    ),
    "callbacks.gpu_affinity": Dropped("processes are placed by the launcher"),
    "callbacks.model_checkpoint.save_top_k": best_checkpoints,
    "callbacks.model_checkpoint.monitor": Refused(
        "the best checkpoints are those of the lowest validation loss", ("val/loss",)
    ),
    "callbacks.model_checkpoint.mode": Refused(
        "the best checkpoints are those of the lowest validation loss", ("min",)
    ),
    **dict.fromkeys(
        (
            "callbacks.model_checkpoint_progress.fault_tolerant",
            "callbacks.model_checkpoint.save_last",
            "callbacks.model_checkpoint_progress.save_last",
            "datamodule.fault_tolerant",
        ),
        Dropped("a checkpoint has the whole state, and the position in the data"),
    ),
    "logger": loggers,
    "logger.wandb.mode": "metrics.wandb_mode",
    **dict.fromkeys(
        (
            "logger.wandb.entity",
            "logger.wandb.group",
            "logger.wandb.tags",
            "logger.wandb.id",
            "logger.wandb.name",
            "logger.wandb.save_dir",
            "logger.wandb.job_type",
        ),
        Dropped(
            "Weights & Biases has variables of its own: WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, "
            "WANDB_RUN_ID, WANDB_NAME, WANDB_DIR, WANDB_JOB_TYPE"
        ),
    ),
    "logger.wandb.project": "metrics.wandb_project",
}
