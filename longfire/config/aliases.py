"""Every spelling of the four systems that longfire replaces -> our key, or the reason why there is
none.

A value of ALIASES is
    a key         the same meaning under our name
    a function    from the old value to our {key: value}, where one old setting says several things
    Refused       no such thing here: any value but a harmless one (what the old system did by default) is an error
    Dropped       nothing to set: what it asked for holds here anyway; said aloud, never silent
VALUES translates old words for a value, by our key. S0 to S3 are the systems, in the order of docs/migration.md.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longfire.config.settings import SECTIONS
from longfire.errors import SettingsError

OFF = ("false", "off", "no", "0")


@dataclass(frozen=True)
class Refused:
    reason: str
    harmless: tuple[str, ...] = OFF


@dataclass(frozen=True)
class Dropped:
    reason: str


def scratch_or_weights(value: str) -> dict[str, str]:
    """S0-61: a config starts from scratch, a folder with weights continues from them."""
    holds_weights = any(Path(value).expanduser().glob("*.safetensors")) if value else False
    return {"model.config": value, **({"model.weights": value} if holds_weights else {})}


def step_of_checkpoint(value: str) -> dict[str, str]:
    """S0-47: `<exp>/checkpoint-<step>`; the run folder is `path=` (ours: job.dump_folder)."""
    found = re.search(r"(?:checkpoint|step)-(\d+)/?$", value)
    if not found:
        raise SettingsError(
            f"checkpoint = {value!r} names no step; write checkpoint.load_step = STEP (-1: the newest) and give "
            "the run folder as job.dump_folder"
        )
    return {"checkpoint.load_step": found[1]}


def rotate_method(value: str) -> dict[str, str]:
    """S1-89: keys and values of the other processes are gathered, or passed on by an all-to-all,
    which is a ring."""
    strategies = {"allgather": "allgather", "alltoall": "ring"}
    if value not in strategies:
        raise SettingsError(
            f"context_parallel_rotate_method = {value!r} is not one of {', '.join(strategies)}"
        )
    return {"parallelism.context_parallel_strategy": strategies[value]}


def tagged_checkpoint(value: str) -> dict[str, str]:
    """S3-53, S3-79: `params::<path>` are weights for a fresh optimizer; whole states resume by
    themselves here."""
    tag, _, path = value.rpartition("::")
    if tag in ("params", "flax_params"):
        return {"model.weights": path}
    if not value:
        return {}
    raise SettingsError(
        f"load_checkpoint = {value!r}: a run resumes by itself from the newest checkpoint of job.dump_folder; "
        "weights of Hugging Face go into model.weights"
    )


def optimizer_state_kept(value: str) -> dict[str, str]:
    """S3-67 says the opposite of model_weights_only."""
    return {"checkpoint.model_weights_only": "true" if value.lower() in OFF else "false"}


def layers_or_operations(value: str) -> dict[str, str]:
    """torchtitan's `mode = selective`, by operation or every n-th layer."""
    if value != "op":
        raise SettingsError(
            f"activation_checkpoint.selective_ac_option = {value!r} computes some blocks again only (n = {value}): not supported; "
            "write op (outputs of matrix products are kept), or activation_checkpoint.mode = 'attention' or 'mlp'"
        )
    return {"activation_checkpoint.policy": "matmuls"}


def attention_type(value: str) -> dict[str, str]:
    """S3-50: ring or not is said by the last number of mesh_dim."""
    kinds = {
        "standard": "vanilla",
        "ring_standard": "vanilla",
        "blockwise": "blockwise",
        "ring_blockwise": "blockwise",
    }
    if value not in kinds:
        raise SettingsError(
            f"attention_type = {value!r} is not one of {', '.join(kinds)}; write attention.kind"
        )
    return {"attention.kind": kinds[value]}


def blockwise_or_not(value: str) -> dict[str, str]:
    """S3-25."""
    return {} if value.lower() in OFF else {"attention.kind": "blockwise"}


JAX_POLICIES = {
    "nothing_saveable": "nothing",
    "checkpoint_dots": "matmuls",
    "dots_saveable": "matmuls",
}


def recomputed(part: str) -> Callable[[str], dict[str, str]]:
    """S3-27 to S3-30: the policy of jax.checkpoint for a part; everything_saveable, or none,
    computes nothing again."""

    def meaning(value: str) -> dict[str, str]:
        if value in ("", "everything_saveable"):
            return {}
        if value not in JAX_POLICIES:
            raise SettingsError(
                f"remat policy {value!r} is not one of {', '.join(JAX_POLICIES)}, everything_saveable: write "
                f"activation_checkpoint.mode = {part!r} and, as activation_checkpoint.policy, the operations to keep"
            )
        policy = JAX_POLICIES[value]
        return {
            "activation_checkpoint.mode": part,
            **({"activation_checkpoint.policy": policy} if policy != "nothing" else {}),
        }

    return meaning


def llama_config(value: str) -> dict[str, Any]:
    """S3-46: `dict(scan_attention=True, ...)`, read and not evaluated; what it says of computing is
    translated. Raises SettingsError for what is said of the model's config."""
    if not value:
        return {}
    try:
        words = ast.parse(value, mode="eval").body.keywords
        given = {word.arg: ast.literal_eval(word.value) for word in words}
    except (SyntaxError, AttributeError, ValueError) as e:
        raise SettingsError(
            f"update_llama_config = {value!r} is not written dict(name=value, ...)"
        ) from e
    if unknown := [name for name in given if name not in (*OF_COMPUTING, *OF_JAX)]:
        raise SettingsError(f"update_llama_config: {', '.join(map(str, unknown))}: {IN_CONFIG}")
    if not given.pop("scan_mlp", False):
        given.pop("scan_mlp_chunk_size", None)
    elif "scan_mlp_chunk_size" not in given:
        given["scan_mlp_chunk_size"] = 1024
    if not given.get("scan_attention"):  # its chunks are read by nothing then
        given = {
            name: said
            for name, said in given.items()
            if not re.match(r"scan_(query|key)_chunk_size", name)
        }
    meanings = several_remats({name: given.pop(name) for name in REMATS if given.get(name)})
    for name, said in given.items():
        old = OF_COMPUTING.get(name, lambda _: {})
        meanings |= {old: said} if isinstance(old, str) else old(as_text(said))
    return meanings


def several_remats(given: dict[str, str]) -> dict[str, str]:
    """A block's recomputation includes those of its parts; those of both parts are one mode here,
    with one policy."""
    if "remat_block" in given or len(given) < 2:
        return (
            OF_COMPUTING["remat_block"](given["remat_block"])
            if "remat_block" in given
            else {
                key: said
                for name, policy in given.items()
                for key, said in OF_COMPUTING[name](policy).items()
            }
        )
    if len(set(given.values())) > 1:
        raise SettingsError(
            f"update_llama_config: {given}: attention and MLP share one policy here: give both the same"
        )
    return recomputed("attention+mlp")(given["remat_mlp"])


STARTED = "processes are started by scripts/train.sh (NGPU, NNODE, MASTER_ADDR, MASTER_PORT) or torchrun, not by a setting"
IN_CONFIG = (
    "the config of a model is in the file that model.config names, or in [model] of the recipe"
)
FLOAT8 = (
    "not supported yet: no machine with float8 units has shown here that the loss stays what it is"
)
NO_EFFECT = "has no effect in its own system: no code there reads it"
ITSELF = "read from the data itself"
Old = str | Refused | Dropped | Callable[[str], dict[str, Any]]

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

FLAME_TORCHTITAN: dict[
    str, Old
] = {  # S1, `--section.key value`; what is not listed has the same name here
    "job.use_for_integration_test": Refused(NO_EFFECT),
    "model.norm_type": Refused(
        f"{NO_EFFECT} but a guard of compile; {IN_CONFIG} (`norm`)", ("rmsnorm",)
    ),
    "model.tokenizer_path": "tokenizer.path",
    "optimizer.scheduler": "lr_scheduler.name",
    "optimizer.min_lr_ratio": "lr_scheduler.min_lr_ratio",
    "optimizer.early_step_in_backward": Refused(
        "the norm of all gradients clips a step or skips it, so no parameter changes before the last gradient is there"
    ),
    "training.context_len": "data.context_len",
    "training.varlen": "data.varlen",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.dataset": "data.dataset",
    "training.dataset_name": "data.dataset_name",
    "training.dataset_split": "data.dataset_split",
    "training.data_dir": "data.data_dir",
    "training.data_files": "data.data_files",
    "training.data_probs": "data.data_probs",
    "training.streaming": "data.streaming",
    "training.num_workers": "data.num_workers",
    "training.prefetch_factor": "data.prefetch_factor",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.enable_cpu_offload": "parallelism.cpu_offload",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.disable_loss_parallel": Refused(
        "with tensor parallel the loss is always shared: whole logits would be the largest tensor of all"
    ),
    "training.mixed_precision_param": "model.compute_dtype",
    "training.mixed_precision_reduce": Refused(
        "gradients are always summed in float32", ("float32",)
    ),
    "metrics.rank_0_only": Refused(
        "process 0 tells how it goes, the others speak of errors only", ("true", "on", "yes", "1")
    ),
    "experimental.enable_async_tensor_parallel": Refused(
        "torch offers it for DTensor inside compiled graphs; tensor parallel here sends plain tensors by operators of its own"
    ),
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_split_points": "parallelism.pipeline_parallel_split_points",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_schedule_csv": "parallelism.pipeline_parallel_schedule_csv",
    "experimental.pipeline_parallel_microbatches": "parallelism.pipeline_parallel_microbatches",
    "experimental.enable_compiled_autograd": Refused(
        "each block is compiled with its backward; a backward compiled across blocks is not proven here"
    ),
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.context_parallel_rotate_method": rotate_method,
    "activation_checkpoint.selective_ac_option": layers_or_operations,
    "float8.enable_float8_linear": Refused(FLOAT8),
    "float8.enable_fsdp_float8_all_gather": Refused(FLOAT8),
    "float8.precompute_float8_dynamic_scale_for_fsdp": Refused(FLOAT8),
    "float8.scaling_type_input": Refused(FLOAT8, ("dynamic",)),
    "float8.scaling_type_weight": Refused(FLOAT8, ("dynamic",)),
    "float8.scaling_type_grad_output": Refused(FLOAT8, ("dynamic",)),
    "memory_estimation.enabled": Refused(
        "`longfire plan RECIPE --gpus N` estimates the memory of a step without a device"
    ),
    "memory_estimation.disable_fake_mode": Refused(
        "`longfire plan RECIPE --gpus N` estimates the memory of a step without a device"
    ),
}

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
    "datamodule.val_ratio": "data.heldout_fraction",
    "datamodule.add_eos": "tokenizer.add_eos",
    "datamodule.num_workers": "data.num_workers",
    "callbacks.model_checkpoint.every_n_train_steps": "checkpoint.interval",
    "logger.wandb.project": "metrics.wandb_project",
    "resume": Dropped("a run resumes by itself from its newest whole checkpoint"),
}

OF_COMPUTING: dict[str, Old] = {  # S3, what its model's config says of computing
    "attention_type": attention_type,
    "scan_attention": blockwise_or_not,
    "scan_query_chunk_size": "attention.query_chunk_size",
    "scan_key_chunk_size": "attention.key_chunk_size",
    "scan_mlp": Refused(
        "training.mlp_chunk_size says how many tokens of an MLP are computed at a time (there 1024)"
    ),
    "scan_mlp_chunk_size": "training.mlp_chunk_size",
    "remat_attention": recomputed("attention"),
    "remat_mlp": recomputed("mlp"),
    "remat_block": recomputed("block"),
}
REMATS = ("remat_attention", "remat_mlp", "remat_block")
# Read in update_llama_config and set nothing: rows are as long as training.seq_len, the mesh is
# --mesh_dim, layers are a loop.
OF_JAX = ("max_sequence_length", "mesh_dim", "scan_layers", "param_scan_axis")

RING_ATTENTION: dict[str, Old] = {  # S3, `--key=value`
    **OF_COMPUTING,
    "mesh_dim": "parallelism.mesh_dim",
    "dtype": "model.compute_dtype",
    "total_steps": "training.steps",
    "log_freq": "metrics.log_freq",
    "save_model_freq": "checkpoint.interval",
    "save_milestone_freq": "checkpoint.milestone_interval",
    "eval_steps": Refused(
        "counts batches; eval.tokens says how much an evaluation reads, eval.interval how often",
        ("0",),
    ),
    "autoresume": Dropped("a run resumes by itself from its newest whole checkpoint"),
    "load_llama_config": "model.config",
    "update_llama_config": llama_config,
    "load_dataset_state": Refused(
        "the position in the data is part of a checkpoint, one integer", ("",)
    ),
    "load_checkpoint": tagged_checkpoint,
    "tokenizer.vocab_file": "tokenizer.path",
    "optimizer.type": "optimizer.name",
    "optimizer.adamw_optimizer.weight_decay": "optimizer.weight_decay",
    "optimizer.adamw_optimizer.lr": "optimizer.lr",
    "optimizer.adamw_optimizer.end_lr": Refused(
        "the floor is a share of the peak: lr_scheduler.min_lr_ratio = end_lr / lr", ()
    ),
    "optimizer.adamw_optimizer.lr_warmup_steps": "lr_scheduler.warmup_steps",
    "optimizer.adamw_optimizer.lr_decay_steps": Refused(
        "the decay ends with the run, at training.steps", ()
    ),
    "optimizer.accumulate_gradient_steps": "training.gradient_accumulation_steps",
    "train_dataset.type": Dropped(ITSELF),
    "train_dataset.text_processor.fields": "data.text_field",
    "train_dataset.json_dataset.path": "data.dataset",
    "train_dataset.json_dataset.seq_length": "training.seq_len",
    "train_dataset.json_dataset.batch_size": "training.batch_size",
    "train_dataset.json_dataset.tokenizer_processes": "data.num_workers",
    "train_dataset.huggingface_dataset.path": "data.dataset",
    "train_dataset.huggingface_dataset.name": "data.dataset_name",
    "train_dataset.huggingface_dataset.split": "data.dataset_split",
    "train_dataset.huggingface_dataset.seq_length": "training.seq_len",
    "train_dataset.huggingface_dataset.batch_size": "training.batch_size",
    "train_dataset.huggingface_dataset.streaming": "data.streaming",
    "checkpointer.save_optimizer_state": optimizer_state_kept,
    "logger.output_dir": "job.dump_folder",
    "logger.project_id": "metrics.wandb_project",
    "logger.online": "metrics.enable_wandb",
}

ALIASES: dict[str, Old] = {
    **FLAME_ACCELERATE,
    **FLAME_TORCHTITAN,
    **FLASH_ATTENTION,
    **RING_ATTENTION,
}

VALUES: dict[str, dict[str, str]] = {  # our key -> the four systems' words -> ours
    "lr_scheduler.name": {
        "cosine_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd",
        "constant_with_warmup": "constant",
        "linear-warmup": "linear",
        "cosine-warmup": "cosine",
        "cosine-warmup-timm": "cosine",
    },
    "model.compute_dtype": {
        "bf16": "bfloat16",
        "bf16-mixed": "bfloat16",
        "fp32": "float32",
        "32": "float32",
        "32-true": "float32",
    },
    "optimizer.name": {
        "adamw": "AdamW",
        "adamw_torch": "AdamW",
        "adamw_torch_fused": "AdamW",
        "adamw-apex": "AdamW",
        "adam": "Adam",
    },
    "training.compile": {"true": "on", "false": "off"},
    "activation_checkpoint.mode": {"full": "block", "selective": "block"},
    "activation_checkpoint.policy": JAX_POLICIES,
}


def translate(spelling: str, value: Any, where: str) -> tuple[dict[str, Any], str]:
    """{our key: our value} of a known spelling, and a sentence to say once ("" where nothing was
    renamed).

    Raises SettingsError with the reason where a spelling is refused.
    """
    old = ALIASES.get(spelling, spelling)
    if isinstance(old, Refused):
        if as_text(value).lower() in [harmless.lower() for harmless in old.harmless]:
            return {}, f"{spelling} = {as_text(value)!r} changes nothing here: {old.reason}"
        mend = (
            f"; leave it out or set it to {old.harmless[0]!r}" if old.harmless else "; leave it out"
        )
        raise SettingsError(f"{where}: {spelling} = {as_text(value)!r}: {old.reason}{mend}")
    if isinstance(old, Dropped):
        return {}, f"{spelling} = {as_text(value)!r} sets nothing: {old.reason}"
    meaning = {old: value} if isinstance(old, str) else old(as_text(value))
    meaning = {key: VALUES.get(key, {}).get(as_text(v), v) for key, v in meaning.items()}
    if meaning == {spelling: value}:
        return meaning, ""
    new = " ".join(f"{key} = {as_text(v)!r}" for key, v in meaning.items())
    return meaning, f"{spelling} = {as_text(value)!r} is now {new}" if meaning else ""


def as_text(value: Any) -> str:
    """A TOML value as the command line would spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(as_text, value)) if isinstance(value, list | tuple) else str(value)


def bare_value(spelling: str) -> str:
    """What the flag without a value means, "" if it needs one."""
    old = ALIASES.get(spelling, spelling)
    if isinstance(old, Refused):
        return "true" if "false" in old.harmless or "true" in old.harmless else ""
    if not isinstance(old, str):
        return "true" if old is optimizer_state_kept else ""
    section, _, name = old.partition(".")
    field = SECTIONS[section].__dataclass_fields__[name]
    return "true" if field.type is bool else field.metadata["bare"]
