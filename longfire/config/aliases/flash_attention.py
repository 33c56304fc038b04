"""flash-attention's training/: Hydra's `group.key=value`."""

from longfire.config.aliases.meaning import STARTED, Dropped, Old, Refused

FLASH_ATTENTION: dict[str, Old] = {  # S2, Hydra's `group.key=value`
    "experiment": Refused("a recipe is a whole run here: longfire train recipes/NAME.toml", ()),
    "trainer.devices": Refused(STARTED, ("1",)),
    "trainer.num_nodes": Refused(STARTED, ("1",)),
    "trainer.precision": "model.compute_dtype",
    "trainer.max_steps": "training.steps",
    "trainer.gradient_clip_val": "training.max_norm",
    "trainer.accumulate_grad_batches": "training.gradient_accumulation_steps",
    "trainer.log_every_n_steps": "metrics.log_freq",
    "trainer.val_check_interval": "eval.interval",
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
