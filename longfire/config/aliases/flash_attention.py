"""flash-attention's training/: Hydra's `group.key=value`."""

from collections.abc import Mapping

from longfire.config.aliases.meaning import Dropped, Old, Refused, Started, WithOthers
from longfire.errors import SettingsError


def evaluation_interval(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """Its evaluations come every so many micro-batches, or after a share of an epoch. Raises
    SettingsError."""
    accumulation = others.get("trainer.accumulate_grad_batches", "1")
    if not value.isdigit() or not accumulation.isdigit():
        raise SettingsError(
            f"trainer.val_check_interval = {value!r}: a share of an epoch is not known before the "
            "data are prepared: write eval.interval, in steps"
        )
    return {"eval.interval": -(-int(value) // max(1, int(accumulation)))}


def schedule(value: str) -> dict[str, object]:
    """The shape of the learning rate, which comes down to 0 there unless lr_min says otherwise."""
    shapes = {
        "linear-warmup": ("linear", 0.0),
        "cosine-warmup": ("cosine", 0.0),
        "cosine-warmup-timm": ("cosine", 0.1),
    }
    if value not in shapes:
        raise SettingsError(
            f"scheduler = {value!r} is not one of {', '.join(shapes)}: write lr_scheduler.name"
        )
    name, floor = shapes[value]
    return {"lr_scheduler.name": name, "lr_scheduler.min_lr_ratio": floor}


FLASH_ATTENTION: dict[str, Old] = {  # S2, Hydra's `group.key=value`
    "experiment": Refused(
        "an experiment is a recipe with settings of the command line: `longfire train` and "
        "`longfire plan` take it, a recipe cannot",
        (),
    ),
    "trainer.devices": Started("processes of this machine"),
    "trainer.num_nodes": Started("machines"),
    "trainer.precision": "model.compute_dtype",
    "trainer.max_steps": "training.steps",
    "trainer.gradient_clip_val": "training.max_norm",
    "trainer.accumulate_grad_batches": "training.gradient_accumulation_steps",
    "trainer.log_every_n_steps": "metrics.log_freq",
    "trainer.val_check_interval": WithOthers(evaluation_interval),
    "train/scheduler": schedule,
    "train.scheduler.t_initial": "lr_scheduler.decay_end_step",
    "train.scheduler.warmup_t": "lr_scheduler.warmup_steps",
    "train.global_batch_size": "training.global_batch_size",
    "train.optimizer.lr": "optimizer.lr",
    "train.optimizer.weight_decay": "optimizer.weight_decay",
    "train.scheduler.num_warmup_steps": "lr_scheduler.warmup_steps",
    "datamodule.batch_size": "training.batch_size",
    "datamodule.max_length": "training.seq_len",
    "datamodule.dataset_name": "data.dataset",
    "datamodule.dataset_config_name": "data.dataset_name",
    "datamodule.tokenizer_name": "tokenizer.path",
    "datamodule.cache_dir": "data.folder",
    "datamodule.val_ratio": "data.validation_fraction",
    "datamodule.add_eos": "tokenizer.add_eos",
    "datamodule.num_workers": "data.num_workers",
    "callbacks.model_checkpoint.every_n_train_steps": "checkpoint.interval",
    "logger.wandb.project": "metrics.wandb_project",
    "resume": Dropped("a run resumes by itself from its newest whole checkpoint"),
}
