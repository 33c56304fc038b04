"""flash-attention's training/: Hydra's `group.key=value`."""

from collections.abc import Mapping

from longfire.config.aliases.meaning import OFF, Dropped, Old, Refused, Started, WithOthers
from longfire.errors import SettingsError

GLOBAL_BATCH = ("train.global_batch_size", "training.global_batch_size")


def evaluation_interval(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """Its evaluations come every so many micro-batches, or after a share of an epoch. Raises
    SettingsError."""
    accumulation = others.get("trainer.accumulate_grad_batches", "")
    whole_batch = [key for key in GLOBAL_BATCH if others.get(key, "0") != "0"]
    if whole_batch and not accumulation:
        raise SettingsError(
            f"trainer.val_check_interval = {value!r} counts micro-batches, and {whole_batch[0]} "
            "leaves it to the devices how many of them a step has: write eval.interval, in steps"
        )
    accumulation = accumulation or "1"
    if not value.isdigit() or not accumulation.isdigit():
        raise SettingsError(
            f"trainer.val_check_interval = {value!r}: a share of an epoch is not known before the "
            "data are prepared: write eval.interval, in steps"
        )
    return {"eval.interval": -(-int(value) // max(1, int(accumulation)))}


SCHEDULER = "train.scheduler"
# Its `scheduler=` -> our settings, in the order of configs/scheduler; where its words say nothing,
# cosine-warmup-timm has the floor of its experiments, the others fall to 0
SHAPES: dict[str, dict[str, object]] = {
    "linear-warmup": {"lr_scheduler.name": "linear"},
    "cosine-warmup": {"lr_scheduler.name": "cosine"},
    "cosine-warmup-timm": {"lr_scheduler.name": "cosine", "lr_scheduler.min_lr_ratio": 0.1},
    "invsqrt": {"lr_scheduler.name": "inverse_sqrt"},
    "poly-warmup": {"lr_scheduler.name": "polynomial"},
    "step": {"lr_scheduler.name": "step"},
    "multi-step": {"lr_scheduler.name": "multistep"},
    "plateau": {
        "lr_scheduler.name": "plateau",
        "lr_scheduler.gamma": 0.2,
        "lr_scheduler.patience": 20,
    },
}
# What its words set beside the shape -> our setting
OF_SHAPE = {
    "lr_min": "lr_scheduler.min_lr_ratio",
    "min_lr": "lr_scheduler.min_lr_ratio",
    "lr_end": "lr_scheduler.min_lr_ratio",
    "factor": "lr_scheduler.gamma",
    "patience": "lr_scheduler.patience",
}


def schedule(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The shape of the learning rate, which comes down to 0 there unless lr_min, min_lr or lr_end
    is given."""
    if value not in SHAPES:
        raise SettingsError(
            f"scheduler = {value!r} is not one of {', '.join(SHAPES)}: write lr_scheduler.name"
        )
    meanings: dict[str, object] = {"lr_scheduler.min_lr_ratio": 0.0, **SHAPES[value]}
    for word, key in OF_SHAPE.items():
        if f"{SCHEDULER}.{word}" in others:
            meanings.pop(key, None)
    return meanings


def share_of_peak(word: str) -> WithOthers:
    """A learning rate there, as a share of the peak here."""

    def meaning(value: str, others: Mapping[str, str]) -> dict[str, object]:
        """The floor of the learning rate, as a share of the peak."""
        given = others.get("train.optimizer.lr", others.get("optimizer.lr", ""))
        try:
            return {"lr_scheduler.min_lr_ratio": float(value) / float(given)}
        except (ValueError, ZeroDivisionError):
            raise SettingsError(
                f"{SCHEDULER}.{word} = {value!r} is a share of the peak here: give "
                "train.optimizer.lr beside it, or write lr_scheduler.min_lr_ratio"
            ) from None

    return WithOthers(meaning)


def end_of_cosine(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The step at which timm's cosine ends; with warmup_prefix its steps are counted from the end
    of the warm-up. Raises SettingsError."""
    has_prefix = others.get(f"{SCHEDULER}.warmup_prefix", "false").lower() not in OFF
    warmup = others.get(f"{SCHEDULER}.warmup_t", "0") if has_prefix else "0"
    if not value.isdigit() or not warmup.isdigit():
        raise SettingsError(
            f"{SCHEDULER}.t_initial = {value!r} and warmup_t must be whole numbers: write "
            "lr_scheduler.decay_end_step"
        )
    return {"lr_scheduler.decay_end_step": int(value) + int(warmup)}


def shuffled(value: str) -> dict[str, object]:
    """Rows in a new order each epoch, or as they come."""
    return {"data.shuffle": "none" if value.lower() in OFF else "auto"}


def nesterov(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """An option of the optimizer here, beside the momentum."""
    if "train.optimizer.momentum" in others:
        return {}
    return {"optimizer.options": [f"nesterov={value.lower()}"]}


def momentum(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """momentum and nesterov of torch's SGD, which are options of the optimizer here."""
    options = [f"momentum={value}"]
    if "train.optimizer.nesterov" in others:
        options.append(f"nesterov={others['train.optimizer.nesterov'].lower()}")
    return {"optimizer.options": options}


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


def best_checkpoints(value: str) -> dict[str, object]:
    """How many checkpoints of the lowest validation loss are kept, beside the newest; -1: all are
    kept."""
    if value == "-1":
        return {"checkpoint.keep_latest_k": 0}
    return {"checkpoint.keep_best_k": value, "checkpoint.keep_latest_k": 1}


def both_betas(value: str) -> dict[str, object]:
    """[0.9, 0.95]: those of the first and the second moment. Raises SettingsError."""
    betas = value.strip("[]()").split(",")
    if len(betas) != 2:
        raise SettingsError(f"train.optimizer.betas = {value!r} is not two numbers: [0.9, 0.95]")
    return {"optimizer.beta1": betas[0].strip(), "optimizer.beta2": betas[1].strip()}


FLASH_ATTENTION: dict[str, Old] = {  # Hydra's `group.key=value`
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
    "train/scheduler": WithOthers(schedule),
    "train.scheduler.t_initial": WithOthers(end_of_cosine),
    "train.scheduler.warmup_prefix": Dropped(
        "the decay begins where the warm-up ends; t_initial takes it into account"
    ),
    "train.scheduler.lr_min": share_of_peak("lr_min"),
    "train.scheduler.min_lr": share_of_peak("min_lr"),
    "train.scheduler.lr_end": share_of_peak("lr_end"),
    "train.scheduler.warmup_lr_init": Refused("the warm-up begins at 0", ("0", "0.0")),
    "train.scheduler.t_in_epochs": Refused("steps are counted; epochs are not known in advance"),
    "train.scheduler.power": "lr_scheduler.power",
    "train.scheduler.step_size": "lr_scheduler.step_size",
    "train.scheduler.milestones": "lr_scheduler.milestones",
    "train.scheduler.gamma": "lr_scheduler.gamma",
    "train.scheduler.factor": "lr_scheduler.gamma",
    "train.scheduler.patience": "lr_scheduler.patience",
    "train.scheduler.threshold": "lr_scheduler.threshold",
    "train.scheduler_monitor": Refused(
        "plateau follows the loss of all validation tokens", ("val/loss",)
    ),
    "train.scheduler_interval": Refused(
        "a schedule counts steps; plateau counts validations (eval.interval)", ("step",)
    ),
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
    "datamodule.val_split_seed": "data.validation_seed",
    "datamodule.add_eos": "tokenizer.add_eos",
    "datamodule.num_workers": "data.num_workers",
    "callbacks": WithOthers(callbacks),
    "metrics": metrics,
    "callbacks.norm_monitor": WithOthers(norm_monitor),
    "callbacks.norm_monitor.layer_norm_only": Refused("norms are those of all parameters"),
    "callbacks.ema.decay": "optimizer.ema_decay",
    "callbacks.ema.use_num_updates": Refused("the decay is the same at every step"),
    "callbacks.model_checkpoint.every_n_train_steps": "checkpoint.interval",
    "callbacks.model_checkpoint_progress.every_n_train_steps": "checkpoint.interval",
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
            "datamodule.fault_tolerant",
        ),
        Dropped("a checkpoint has the whole state, and the position in the data"),
    ),
    **dict.fromkeys(
        (
            "datamodule.pin_memory",
            "datamodule.use_shmem",
            "datamodule.ddp",
            "datamodule.drop_last",
            "datamodule.num_workers_preprocess",
        ),
        Dropped("batches come from memory-mapped token stores that all processes read"),
    ),
    "datamodule.shuffle": shuffled,
    "datamodule.detokenize": Refused("text is tokenized as it is"),
    "datamodule.batch_size_eval": Dropped("an evaluation has the micro-batches of the training"),
    "trainer.accelerator": Dropped("training.device is the GPU where there is one"),
    "trainer.gpus": Started("processes of this machine"),
    **dict.fromkeys(
        ("trainer.strategy", "trainer.strategy.find_unused_parameters"),
        Dropped("parallelism.data_parallel_shard_degree shares parameters, and is on by itself"),
    ),
    "train.gpu_mem": Dropped("datamodule.batch_size says how many sequences a device takes"),
    "train.seed": "training.seed",
    "optimizer": "optimizer.name",
    "train/optimizer": "optimizer.name",
    "train.optimizer.momentum": WithOthers(momentum),
    "train.optimizer.nesterov": WithOthers(nesterov),
    "train.optimizer.betas": both_betas,
    "train.optimizer.eps": "optimizer.eps",
    "train.scheduler.num_training_steps": "lr_scheduler.decay_end_step",
    "train.optimizer_param_grouping.bias_weight_decay": Refused("vectors never decay"),
    "train.optimizer_param_grouping.normalization_weight_decay": Refused("vectors never decay"),
    "print_config": "job.print_args",
    "ignore_warnings": Dropped("warnings are few, and on stderr"),
    "logger.wandb.mode": "metrics.wandb_mode",
    **dict.fromkeys(
        ("logger.wandb.entity", "logger.wandb.group", "logger.wandb.tags", "logger.wandb.id"),
        Dropped(
            "Weights & Biases has variables of its own: WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, "
            "WANDB_RUN_ID"
        ),
    ),
    "logger.wandb.project": "metrics.wandb_project",
    "resume": Dropped("a run resumes by itself from its newest whole checkpoint"),
}
