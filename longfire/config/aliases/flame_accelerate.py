"""flame on accelerate: `train.sh key=value` and `preprocess.py --key value`."""

import re
from pathlib import Path

from longfire.config.aliases.meaning import STARTED, Dropped, Old, Refused
from longfire.errors import SettingsError


def scratch_or_weights(value: str) -> dict[str, str]:
    """S0-61: a config starts from scratch, a folder with weights continues from them."""
    holds_weights = any(Path(value).expanduser().glob("*.safetensors")) if value else False
    return {"model.config": value, **({"model.weights": value} if holds_weights else {})}


def step_of_checkpoint(value: str) -> dict[str, str]:
    """S0-47: `<exp>/checkpoint-<step>`; the run folder is `path=` (ours: job.dump_folder)."""
    found = re.search(r"(?:checkpoint|step)-(\d+)/?$", value)
    if not found:
        raise SettingsError(
            f"checkpoint = {value!r} names no step; write checkpoint.load_step = STEP (-1: the "
            "newest) and give the run folder as job.dump_folder"
        )
    return {"checkpoint.load_step": found[1]}


FLAME_ACCELERATE: dict[str, Old] = {  # S0, `train.sh key=value` and `preprocess.py --key value`
    "type": Dropped("model.config says which mixers the model has"),
    "lr": "optimizer.lr",
    "scheduler": "lr_scheduler.name",
    "batch": "training.batch_size",
    "update": "training.gradient_accumulation_steps",
    "warmup": "lr_scheduler.warmup_steps",
    "steps": "training.steps",
    "context": "training.seq_len",
    "context_length": "training.seq_len",
    "gpus": Refused(STARTED, ("1",)),
    "nodes": Refused(STARTED, ("1",)),
    "path": "job.dump_folder",
    "project": "metrics.wandb_project",
    "model": scratch_or_weights,
    "tokenizer": "tokenizer.path",
    "data": "data.dataset",
    "dataset": "data.dataset",
    "name": "data.dataset_name",
    "split": "data.dataset_split",
    "cache": "data.folder",
    "checkpoint": step_of_checkpoint,
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
    "config": Refused(
        "not supported yet: deepspeed and FSDP layouts; this version runs one process", ()
    ),
    "rank": Refused(STARTED, ("0",)),
    "node": Refused(STARTED, ("0",)),
    "ip": Refused(STARTED, ("localhost", "127.0.0.1")),
    "port": Refused(STARTED, ()),
}
