"""flash-attention's training/: Hydra's `group.key=value`."""

from collections.abc import Mapping

from longfire.config.aliases.flash_attention_model import MODEL_CONFIG
from longfire.config.aliases.flash_attention_records import (
    ENDS,
    IN_RUN_FOLDER,
    NONE,
    RECORDS,
)
from longfire.config.aliases.meaning import OFF, Dropped, Old, Refused, Started, WithOthers
from longfire.errors import SettingsError

TRIAL = "a trial is a run with a small training.steps, or `longfire plan`"
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


def both_betas(value: str) -> dict[str, object]:
    """[0.9, 0.95]: those of the first and the second moment. Raises SettingsError."""
    betas = value.strip("[]()").split(",")
    if len(betas) != 2:
        raise SettingsError(f"train.optimizer.betas = {value!r} is not two numbers: [0.9, 0.95]")
    return {"optimizer.beta1": betas[0].strip(), "optimizer.beta2": betas[1].strip()}


FLASH_ATTENTION: dict[str, Old] = {  # Hydra's `group.key=value`
    **MODEL_CONFIG,
    **RECORDS,
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
    "trainer.deterministic": "training.deterministic",
    "trainer.benchmark": Dropped("shapes are the same at every step"),
    "trainer.check_val_every_n_epoch": Refused("eval.interval counts steps", NONE),
    **dict.fromkeys(
        ("trainer.max_epochs", "trainer.min_epochs", "trainer.min_steps"), Refused(ENDS, NONE)
    ),
    **dict.fromkeys(
        (
            "trainer.fast_dev_run",
            "trainer.limit_train_batches",
            "trainer.limit_val_batches",
            "trainer.limit_test_batches",
            "trainer.overfit_batches",
        ),
        Refused(TRIAL, (*OFF, "0.0", "1.0")),
    ),
    "trainer.resume_from_checkpoint": Refused(
        "a run resumes by itself; checkpoint.load_step names another step", NONE
    ),
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
    "train.loss_fn.inplace_backward": Dropped(
        "the gradient of a chunk of logits always takes the place of the logits"
    ),
    "data_dir": "data.folder",
    "work_dir": Refused(IN_RUN_FOLDER, ()),
    "mode": Refused(TRIAL, ("default", "exp")),
    "test_after_training": Refused("`longfire eval RUN` measures a run that has ended"),
    "print_config": "job.print_args",
    "ignore_warnings": Dropped("warnings are few, and on stderr"),
    "resume": Dropped("a run resumes by itself from its newest whole checkpoint"),
}
