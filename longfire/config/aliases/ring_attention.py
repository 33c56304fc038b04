"""RingAttention with Blockwise Transformers: `--key=value`."""

import ast
from collections.abc import Callable
from typing import Any

from longfire.config.aliases.meaning import IN_CONFIG, ITSELF, OFF, Dropped, Old, Refused, as_text
from longfire.errors import SettingsError


def tagged_checkpoint(value: str) -> dict[str, str]:
    """S3-53, S3-79: `params::<path>` are weights for a fresh optimizer; whole states resume by
    themselves here."""
    tag, _, path = value.rpartition("::")
    if tag in ("params", "flax_params"):
        return {"model.weights": path}
    if not value:
        return {}
    raise SettingsError(
        f"load_checkpoint = {value!r}: a run resumes by itself from the newest checkpoint of "
        "job.dump_folder; weights of Hugging Face go into model.weights"
    )


def optimizer_state_kept(value: str) -> dict[str, str]:
    """S3-67 says the opposite of model_weights_only."""
    return {"checkpoint.model_weights_only": "true" if value.lower() in OFF else "false"}


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
    if value.lower() in OFF:
        return {}
    return {"attention.kind": "blockwise"}


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
                f"remat policy {value!r} is not one of {', '.join(JAX_POLICIES)}, "
                f"everything_saveable: write activation_checkpoint.mode = {part!r} and, as "
                "activation_checkpoint.policy, the operations to keep"
            )
        policy = JAX_POLICIES[value]
        settings = {"activation_checkpoint.mode": part}
        if policy != "nothing":
            settings["activation_checkpoint.policy"] = policy
        return settings

    return meaning


def keyword_arguments(value: str) -> dict[str, Any]:
    """The arguments of `dict(name=value, ...)`, parsed and not evaluated. Raises SettingsError."""
    try:
        call = ast.parse(value, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("no call")
        arguments: dict[str, Any] = {}
        for keyword in call.keywords:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError) as error:
        raise SettingsError(
            f"update_llama_config = {value!r} is not written dict(name=value, ...)"
        ) from error
    return arguments


def llama_config(value: str) -> dict[str, object]:
    """S3-46: `dict(scan_attention=True, ...)`. Its keys about computing are translated. Raises
    SettingsError for those of the model's config."""
    if not value:
        return {}
    given = keyword_arguments(value)
    unknown = [name for name in given if name not in (*OF_COMPUTING, *OF_JAX)]
    if unknown:
        raise SettingsError(f"update_llama_config: {', '.join(unknown)}: {IN_CONFIG}")
    if not given.pop("scan_mlp", False):
        given.pop("scan_mlp_chunk_size", None)
    elif "scan_mlp_chunk_size" not in given:
        given["scan_mlp_chunk_size"] = 1024
    if not given.get("scan_attention"):  # then nothing reads the chunks
        given.pop("scan_query_chunk_size", None)
        given.pop("scan_key_chunk_size", None)
    meanings: dict[str, object] = {}
    meanings |= several_remats({name: given.pop(name) for name in REMATS if given.get(name)})
    for name, argument in given.items():
        old = OF_COMPUTING.get(name)
        if isinstance(old, str):
            meanings[old] = argument
        elif callable(old):
            meanings |= old(as_text(argument))
    return meanings


def several_remats(given: dict[str, str]) -> dict[str, str]:
    """A block's recomputation includes those of its parts; those of both parts are one mode here,
    with one policy."""
    if "remat_block" in given or len(given) < 2:
        if "remat_block" in given:
            return REMATS["remat_block"](given["remat_block"])
        meanings: dict[str, str] = {}
        for name, policy in given.items():
            meanings |= REMATS[name](policy)
        return meanings
    if len(set(given.values())) > 1:
        raise SettingsError(
            f"update_llama_config: {given}: attention and MLP share one policy here: give both "
            "the same"
        )
    return recomputed("attention+mlp")(given["remat_mlp"])


REMATS: dict[str, Callable[[str], dict[str, str]]] = {
    "remat_attention": recomputed("attention"),
    "remat_mlp": recomputed("mlp"),
    "remat_block": recomputed("block"),
}


OF_COMPUTING: dict[str, Old] = {  # S3: those keys of its model's config that are about computing
    "attention_type": attention_type,
    "scan_attention": blockwise_or_not,
    "scan_query_chunk_size": "attention.query_chunk_size",
    "scan_key_chunk_size": "attention.key_chunk_size",
    "scan_mlp": Refused(
        "training.mlp_chunk_size says how many tokens of an MLP are computed at a time (there 1024)"
    ),
    "scan_mlp_chunk_size": "training.mlp_chunk_size",
    **REMATS,
}


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
