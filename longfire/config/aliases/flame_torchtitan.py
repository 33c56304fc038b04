"""flame on torchtitan: `--section.key value`, and its TOML files."""

from collections.abc import Mapping

from longfire.config.aliases.meaning import (
    IN_CONFIG,
    NO_EFFECT,
    OFF,
    Dropped,
    Old,
    Refused,
    WithOthers,
)
from longfire.errors import SettingsError

TENSOR_DEGREES = ("training.tensor_parallel_degree", "parallelism.tensor_parallel_degree")
RESTARTS = "MAX_RESTARTS of scripts/train.sh starts all processes again from the newest checkpoint"
WEIGHTS_ALONE = (
    "model.weights begins a run with weights alone and a fresh optimizer; a run resumes with both "
    "in its own run folder"
)
DELAYED = (
    "scales are made of the numbers at hand (dynamic); delayed ones, of earlier steps, are gone "
    "from torchao too"
)
# torchtitan's names of what swaps linear layers for those of float8, old and new
FLOAT8_CONVERTERS = ("float8", "quantize.linear.float8")
PINNED = Dropped("batches come from memory-mapped token stores, made ready by one thread", "true")
PRECOMPUTED_SCALES = Dropped(
    "with float8.enable_fsdp_float8_all_gather the scales of all matrices of a block are one "
    "all-reduce before its gathering, and else no scale needs one",
    "true",
)


def rotate_method(value: str) -> dict[str, str]:
    """Keys and values of the other processes are gathered, or passed on by an all-to-all,
    which is a ring."""
    strategies = {"allgather": "allgather", "alltoall": "ring"}
    if value not in strategies:
        raise SettingsError(
            f"context_parallel_rotate_method = {value!r} is not one of {', '.join(strategies)}"
        )
    return {"parallelism.context_parallel_strategy": strategies[value]}


def layers_or_operations(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """torchtitan's `mode = selective`, by operation or every n-th layer."""
    if others.get("activation_checkpoint.mode", "") in ("none", "full"):
        return {}  # it is read there for `selective` only
    if value.isdigit() and int(value) > 0:
        return {"activation_checkpoint.layer_interval": int(value)}
    if value != "op":
        raise SettingsError(
            f"activation_checkpoint.selective_ac_option = {value!r} must be op (outputs of matrix "
            "products are kept) or a number n (every n-th block is recomputed)"
        )
    return {"activation_checkpoint.policy": "matmuls"}


def converters(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """What torchtitan swaps layers for: float8 or nothing. Raises SettingsError."""
    names = value.split(",") if value else []
    unknown = [name for name in names if name not in FLOAT8_CONVERTERS]
    if unknown:
        raise SettingsError(
            f"model.converters = {value!r}: {unknown[0]!r} is not supported; of torchtitan's "
            "converters there is float8"
        )
    is_said_twice = others.get("float8.enable_float8_linear", "").lower() in ("true", "on", "1")
    if not names or is_said_twice:
        return {}
    return {"float8.enable_float8_linear": True}


def clips_nothing(others: Mapping[str, str]) -> bool:
    """Whether gradients are not clipped."""
    return others.get("training.max_norm", "1.0") in ("0", "0.0")


def shares_no_tensors(others: Mapping[str, str]) -> bool:
    """Whether there is no tensor parallelism, as in a line that says nothing of it."""
    return all(others.get(key, "1") == "1" for key in TENSOR_DEGREES)


def is_not_fault_tolerant(others: Mapping[str, str]) -> bool:
    """Whether torchft, whose numbers these are, is not asked for."""
    return others.get("fault_tolerance.enable", "false").lower() in OFF


def shape_of_rate(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The same names; wsd falls by 1 - sqrt(x) there."""
    meanings: dict[str, object] = {"lr_scheduler.name": value}
    is_named = {"lr_scheduler.decay_shape", "lr_scheduler.decay_type"} & set(others)
    if value == "wsd" and not is_named:
        meanings["lr_scheduler.decay_shape"] = "sqrt"
    return meanings


def decay_type(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The shape of the decay: of all that follows the warm-up, or, with decay_ratio, of the last
    part of the run. Raises SettingsError."""
    shapes = ("linear", "cosine", "sqrt")
    if value not in shapes:
        raise SettingsError(f"lr_scheduler.decay_type = {value!r} is not one of {shapes}")
    is_of_the_last_part = "lr_scheduler.decay_ratio" in others
    if value == "sqrt" and not is_of_the_last_part:
        raise SettingsError(
            "lr_scheduler.decay_type = 'sqrt' over all that follows the warm-up: not supported; "
            "give lr_scheduler.decay_ratio, the share of the run that the decay takes"
        )
    if is_of_the_last_part:
        return {"lr_scheduler.name": "wsd", "lr_scheduler.decay_shape": value}
    return {"lr_scheduler.name": value}


def implementation(value: str) -> dict[str, object]:
    """torch's fused kernel, or none: `foreach` and `for-loop` differ in speed only. Raises
    SettingsError."""
    if value not in ("fused", "foreach", "for-loop"):
        raise SettingsError(
            f"optimizer.implementation = {value!r} is not one of fused, foreach, for-loop: write "
            "optimizer.fused"
        )
    return {"optimizer.fused": value == "fused"}


def resharded(value: str) -> dict[str, object]:
    """The same words but for `default`, which is auto here."""
    return {"parallelism.reshard_after_forward": "auto" if value == "default" else value}


def first_weights(value: str) -> dict[str, object]:
    """Weights that a new run begins with; empty text names none."""
    return {"model.weights": value} if value else {}


def begins_with_nothing(others: Mapping[str, str]) -> bool:
    """Whether no checkpoint is named to begin with, as in a line that says nothing of it."""
    return not others.get("checkpoint.initial_load_path", "")


FLAME_TORCHTITAN: dict[
    str, Old
] = {  # `--section.key value`; what is not listed has the same name here
    "job.use_for_integration_test": Refused(NO_EFFECT),
    "model.name": Refused(f"model.config says what is trained; {IN_CONFIG}", ("fla",)),
    "model.norm_type": Refused(
        f"{NO_EFFECT} but a guard of compile; {IN_CONFIG} (`norm`)", ("rmsnorm", "fused_rmsnorm")
    ),
    "model.converters": WithOthers(converters),
    "model.print_after_conversion": Refused(
        "layers stay what they are; the start of a run logs how many matrices use float8"
    ),
    "model.tokenizer_path": "tokenizer.path",
    "optimizer.scheduler": WithOthers(shape_of_rate),
    "optimizer.min_lr_ratio": "lr_scheduler.min_lr_ratio",
    "optimizer.implementation": implementation,
    "optimizer.early_step_in_backward": Refused(
        "the norm of all gradients clips a step or skips it, so no parameter changes before the "
        "last gradient is there; with training.max_norm = 0 it is accepted",
        accepted=clips_nothing,
    ),
    "lr_scheduler.decay_type": WithOthers(decay_type),
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_ratio",
    "training.pin_memory": PINNED,
    "training.persistent_workers": PINNED,
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
    "training.fsdp_reshard_after_forward": resharded,
    "training.disable_loss_parallel": Refused(
        "with tensor parallel the loss is always shared: whole logits would be the largest "
        "tensor of all",
        accepted=shares_no_tensors,
    ),
    "training.mixed_precision_param": "model.compute_dtype",
    "training.mixed_precision_reduce": Refused(
        "gradients are always summed in float32", ("float32",)
    ),
    "metrics.save_for_all_ranks": Refused("process 0 writes the records of the whole run"),
    "metrics.rank_0_only": Refused(
        "process 0 reports progress, the others report errors only", ("true", "on", "yes", "1")
    ),
    "experimental.enable_async_tensor_parallel": Refused(
        "torch offers it for DTensor inside compiled graphs; tensor parallel here sends plain "
        "tensors by operators of its own"
    ),
    "experimental.custom_model_path": Refused(
        "files with mixers of your own are named by model.plugins", ("",)
    ),
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_split_points": "parallelism.pipeline_parallel_split_points",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_schedule_csv": "parallelism.pipeline_parallel_schedule_csv",
    "experimental.pipeline_parallel_microbatches": "parallelism.pipeline_parallel_microbatches",
    "experimental.enable_compiled_autograd": Refused(
        "each block is compiled with its backward; a backward compiled across blocks is not "
        "proven here"
    ),
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "experimental.context_parallel_rotate_method": rotate_method,
    "activation_checkpoint.selective_ac_option": WithOthers(layers_or_operations),
    "activation_offload.mode": Refused(
        "activation_checkpoint.offload keeps the inputs of blocks in the host's memory", ("none",)
    ),
    "checkpoint.initial_load_path": first_weights,
    "checkpoint.initial_load_model_weights_only": Refused(
        WEIGHTS_ALONE, ("true", "on", "yes", "1"), accepted=begins_with_nothing
    ),
    "checkpoint.no_initial_load_model_weights_only": Refused(
        WEIGHTS_ALONE, accepted=begins_with_nothing
    ),
    "checkpoint.last_save_model_weights_only": "checkpoint.model_weights_only",
    "checkpoint.exclude_from_loading": Refused(
        "a run resumes as a whole; model.weights begins a new one with weights alone", ("",)
    ),
    **dict.fromkeys(
        (
            "fault_tolerance.replica_id",
            "fault_tolerance.group_size",
            "fault_tolerance.min_replica_size",
        ),
        Refused(RESTARTS, (), accepted=is_not_fault_tolerant),
    ),
    "fault_tolerance.enable": Refused(RESTARTS),
    "float8.precompute_float8_dynamic_scale_for_fsdp": PRECOMPUTED_SCALES,
    "float8.force_recompute_fp8_weight_in_bwd": Dropped(
        "the backward always rounds weights again, and never keeps their 8-bit form", "true"
    ),
    "float8.scaling_type_input": Refused(DELAYED, ("dynamic",)),
    "float8.scaling_type_weight": Refused(DELAYED, ("dynamic",)),
    "float8.scaling_type_grad_output": Refused(DELAYED, ("dynamic",)),
    "memory_estimation.enabled": Refused(
        "`longfire plan RECIPE --gpus N` estimates the memory of a step without a device"
    ),
    "memory_estimation.disable_fake_mode": Refused(
        "`longfire plan RECIPE --gpus N` estimates the memory of a step without a device"
    ),
}
