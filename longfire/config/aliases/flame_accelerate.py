"""flame on accelerate: `train.sh key=value` and `preprocess.py --key value`."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from longfire.config import shipped
from longfire.config.aliases.flash_attention import SHAPES
from longfire.config.aliases.flash_attention import schedule as schedule_of_flash_attention
from longfire.config.aliases.meaning import Dropped, Old, Started, WithOthers
from longfire.config.paths import may_be_on_hub
from longfire.errors import SettingsError
from longfire.listing import paths_in

# What weights are kept in: files of Hugging Face, old and new, and the checkpoints of a run
WEIGHTS_OF_HUGGING_FACE = ("*.safetensors", "*.bin")
WEIGHTS = (*WEIGHTS_OF_HUGGING_FACE, "*.pt", "*.pth", "checkpoints/step-*", "run.toml")
# What `datasets` writes beside the rows that it saves
SAVED_DATASET = ("dataset_info.json", "state.json", "dataset_dict.json")
# Its word -> our setting and the value that a line without the word has
DEFAULTS = {
    "lr": ("optimizer.lr", "3e-4"),
    "scheduler": ("lr_scheduler.name", "cosine"),
    "batch": ("training.batch_size", "32"),
    "update": ("training.gradient_accumulation_steps", "1"),
    "warmup": ("lr_scheduler.warmup_steps", "1024"),
    "steps": ("training.steps", "20480"),
    "context": ("training.seq_len", "2048"),
    "save": ("checkpoint.interval", "2048"),
    "limit": ("checkpoint.keep_latest_k", "1"),
    "logging": ("metrics.log_freq", "32"),
    "decay": ("optimizer.weight_decay", "0.01"),
}


# What scheduler= sets beside the name of the shape, where the line does not
OF_SHAPE = {
    "lr_scheduler.min_lr_ratio",
    "lr_scheduler.decay_shape",
    "lr_scheduler.warmup_steps",
}
# The shape of transformers that has no warm-up, whatever warmup= says
WITHOUT_WARMUP = "constant"


def defaults_of_flame(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """`type=` begins a line of its train.sh, whose words have its own defaults
    where the line leaves them out: batch 32, warmup 1024, steps 20480, decay 0.01, save 2048 ..."""
    meanings: dict[str, object] = {}
    for word, (key, default) in DEFAULTS.items():
        is_set = word in others or key in others
        if word == "warmup" and others.get("scheduler") == WITHOUT_WARMUP:
            is_set = True
        if not is_set:
            meanings[key] = default
    return meanings


def warmup_steps(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The same here; scheduler=constant has no warm-up there, so that none is set beside it."""
    if others.get("scheduler") == WITHOUT_WARMUP:
        return {}
    return {"lr_scheduler.warmup_steps": value}


def schedule(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The shape of the learning rate; `linear`, `cosine`, `polynomial` and `inverse_sqrt` come down
    to 0 there, `warmup_stable_decay` too, along a cosine, `cosine_with_min_lr` to a tenth;
    `constant` has no warm-up, and a plateau is 10 validations without an improvement. The names of
    flash-attention's configs/scheduler mean what they mean there."""
    if value in SHAPES:
        return schedule_of_flash_attention(value, others)
    meanings: dict[str, object] = {"lr_scheduler.name": value}
    if value == WITHOUT_WARMUP:
        meanings["lr_scheduler.warmup_steps"] = 0
    if value == "warmup_stable_decay":
        meanings["lr_scheduler.min_lr_ratio"] = 0.0
        meanings["lr_scheduler.decay_shape"] = "cosine"
    if value in ("linear", "cosine", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau"):
        meanings["lr_scheduler.min_lr_ratio"] = 0.0
    if value == "cosine_with_min_lr":
        meanings["lr_scheduler.min_lr_ratio"] = 0.1
    for key in OF_SHAPE.intersection(others):  # the line gives these itself
        meanings.pop(key, None)
    return meanings


def holds(folder: str, patterns: Iterable[str]) -> bool:
    """Whether a folder has something of a name that one of the patterns describes."""
    return any(paths_in(Path(folder).expanduser(), pattern) for pattern in patterns)


def scratch_or_weights(value: str) -> dict[str, str]:
    """A config starts from scratch, a folder with weights, or a model of the hub, continues
    from them."""
    is_of_hub = may_be_on_hub(value) and shipped.model_config(value) is None
    if value and (is_of_hub or holds(value, WEIGHTS)):
        return {"model.config": value, "model.weights": value}
    return {"model.config": value}


def saved_rows(others: Mapping[str, str]) -> str:
    """The folder of `cache` where preprocess.py has saved rows of ids in it, else ""."""
    folder = others.get("cache", "")
    if folder and holds(folder, SAVED_DATASET):
        return folder
    return ""


def cache(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The rows of ids that preprocess.py saved there are trained on as they are; a folder
    without any is where token stores are kept."""
    if saved_rows(others):
        return {"data.dataset": value, "data.record_format": "tokens"}
    return {"data.folder": value}


def of_texts(key: str) -> WithOthers:
    """A word about the texts that `cache` was made of, which are not read where it is there."""

    def meaning(value: str, others: Mapping[str, str]) -> dict[str, object]:
        """The same here, unless `cache` has the rows of ids that were made of these texts."""
        return {} if saved_rows(others) else {key: value}

    return WithOthers(meaning)


def step_of_checkpoint(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """`<exp>/checkpoint-<step>`; the run folder is `path=` (ours: job.dump_folder), or,
    without one, the folder that the checkpoint is in. Raises SettingsError."""
    found = re.search(r"^(.*?)/?(?:checkpoints?/)?(?:checkpoint|step)-(\d+)/?$", value)
    if not found:
        raise SettingsError(
            f"checkpoint = {value!r} names no step; write checkpoint.load_step = STEP (-1: the "
            "newest) and give the run folder as job.dump_folder"
        )
    folder, step = found.groups()
    run_folder = others.get("path", others.get("job.dump_folder", ""))
    if not folder:
        return {"checkpoint.load_step": step}
    if not run_folder:
        return {"job.dump_folder": folder, "checkpoint.load_step": step}
    if Path(folder).absolute() != Path(run_folder).absolute():
        raise SettingsError(
            f"checkpoint = {value!r} is not of the run folder {run_folder!r}: a run resumes from "
            "its own checkpoints; to begin another run with the weights of that one, write "
            f"model.weights = {folder}"
        )
    if holds(value, WEIGHTS_OF_HUGGING_FACE):
        raise SettingsError(
            f"checkpoint = {value!r} holds weights of Hugging Face, and no optimizer that could go "
            "on here: leave it out and write model.weights = that folder, and a new path"
        )
    return {"checkpoint.load_step": step}


FLAME_ACCELERATE: dict[str, Old] = {  # `train.sh key=value` and `preprocess.py --key value`
    "type": WithOthers(
        defaults_of_flame, "begins a line of flame; what the line leaves out is as there:"
    ),
    "lr": "optimizer.lr",
    "scheduler": WithOthers(schedule),
    "batch": "training.batch_size",
    "update": "training.gradient_accumulation_steps",
    "warmup": WithOthers(warmup_steps),
    "steps": "training.steps",
    "context": "training.seq_len",
    "context_length": "training.seq_len",
    "gpus": Started("processes of this machine"),
    "nodes": Started("machines"),
    "path": "job.dump_folder",
    "project": "metrics.wandb_project",
    "model": scratch_or_weights,
    "tokenizer": "tokenizer.path",
    "data": of_texts("data.dataset"),
    "dataset": of_texts("data.dataset"),
    "name": of_texts("data.dataset_name"),
    "split": of_texts("data.dataset_split"),
    "cache": WithOthers(cache),
    "checkpoint": WithOthers(step_of_checkpoint),
    "varlen": "data.varlen",
    "seed": "training.seed",
    "save": "checkpoint.interval",
    "limit": "checkpoint.keep_latest_k",
    "logging": "metrics.log_freq",
    "preprocessing": "data.num_workers",
    "workers": Dropped(
        "batches come from memory-mapped token stores; data.prefetch_factor makes them ready ahead"
    ),
    "optim": "optimizer.name",
    "decay": "optimizer.weight_decay",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "norm": "training.max_norm",
    "config": Dropped(
        "DeepSpeed's and FSDP's sharding are both parallelism.data_parallel_shard_degree here, "
        "which is on by itself"
    ),
    "rank": Started("number of this machine"),
    "node": Started("number of this machine"),
    "ip": Started("meeting point"),
    "port": Started("meeting point"),
}
