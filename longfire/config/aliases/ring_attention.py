"""RingAttention with Blockwise Transformers: `--key=value`."""

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longfire.config import shipped
from longfire.config.aliases.meaning import (
    IN_CONFIG,
    ITSELF,
    OFF,
    Dropped,
    Old,
    Refused,
    WithOthers,
    as_text,
)
from longfire.config.aliases.numbers import whole_number
from longfire.config.aliases.ring_attention_optimizer import OPTIMIZER
from longfire.errors import SettingsError

RUN_TOML = "run.toml"
ACCUMULATION = "optimizer.accumulate_gradient_steps"
JSON_BATCH = "train_dataset.json_dataset.batch_size"
HUB_BATCH = "train_dataset.huggingface_dataset.batch_size"


OF_PROCESSOR = (
    "tokenizer.add_bos and tokenizer.add_eos are of documents, as train_dataset.text_processor's "
    "add_bos_token and add_eos_token"
)
POSITION = "the position in the data is part of a checkpoint, one integer"
BY_TORCHRUN = Dropped("processes are started by scripts/train.sh, torchrun or Slurm")
OF_WANDB = Dropped(
    "Weights & Biases has variables of its own: WANDB_ENTITY, WANDB_NOTES, WANDB_RUN_ID, WANDB_DIR"
)


def accumulated(others: Mapping[str, str]) -> int:
    """How many of its steps there make one step of the optimizer: its steps count micro-batches."""
    return max(1, whole_number(ACCUMULATION, others.get(ACCUMULATION, "1")))


def in_optimizer_steps(spelling: str, key: str) -> WithOthers:
    """A number of its steps, as steps of the optimizer; what is left over is one more."""

    def meaning(value: str, others: Mapping[str, str]) -> dict[str, object]:
        """Its steps count micro-batches; here they are steps of the optimizer."""
        return {key: -(-whole_number(spelling, value) // accumulated(others))}

    return WithOthers(meaning)


def sequences_of_all_devices(spelling: str) -> WithOthers:
    """A batch there has its sequences on all devices together."""

    def meaning(value: str, others: Mapping[str, str]) -> dict[str, object]:
        """`training.global_batch_size`: a batch there has its sequences on all devices together."""
        sequences = whole_number(spelling, value) * accumulated(others)
        return {"training.global_batch_size": sequences}

    return WithOthers(meaning)


def micro_batches(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """The sequences of a step already count them where the batch size is given."""
    if JSON_BATCH in others or HUB_BATCH in others:
        return {}
    return {"training.gradient_accumulation_steps": whole_number(ACCUMULATION, value)}


def one_checkpoint(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """A checkpoint that the next one overwrites; 0: only milestones, and here the last
    step."""
    interval = -(-whole_number("save_model_freq", value) // accumulated(others))
    if interval:
        return {"checkpoint.interval": interval, "checkpoint.keep_latest_k": 1}
    return {"checkpoint.interval": 0}


def steps_of_evaluation(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """Its evaluations read so many batches each time that it logs; 0: there are none."""
    batches = whole_number("eval_steps", value)
    if not batches:
        return {"eval.interval": 0}
    part = "eval_dataset.json_dataset"
    sequences = whole_number(f"{part}.batch_size", others.get(f"{part}.batch_size", "8"))
    seq_len = whole_number(f"{part}.seq_length", others.get(f"{part}.seq_length", "1024"))
    every = whole_number("log_freq", others.get("log_freq", "50"))
    every = -(-every // accumulated(others))
    return {"eval.interval": every, "eval.tokens": batches * sequences * seq_len}


def named_config(value: str) -> dict[str, str]:
    """A size of Llama, or a file as json::PATH. Raises SettingsError."""
    tag, _, path = value.rpartition("::")
    if tag == "pickle":
        raise SettingsError(
            f"load_llama_config = {value!r}: reading a pickle may run code; save the config as "
            "JSON, and write json::PATH"
        )
    if tag == "json":
        return {"model.config": path}
    if f"llama-{value}" in shipped.models():
        return {"model.config": f"llama-{value}"}
    return {"model.config": value} if value else {}


def tagged_checkpoint(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """`params::<path>` are weights for a fresh optimizer; `trainstate::<path>`
    resumes where the path is a run folder, or a checkpoint in it. Raises SettingsError."""
    tag, _, path = value.rpartition("::")
    if tag in ("params", "flax_params", "trainstate_params"):
        return {"model.weights": path}
    if not value:
        return {}
    if tag == "trainstate" and (resumed := run_and_step(Path(path))):
        folder = others.get("logger.output_dir", others.get("job.dump_folder", ""))
        if not folder:
            return resumed
        if Path(folder).absolute() == Path(str(resumed["job.dump_folder"])).absolute():
            return {"checkpoint.load_step": resumed["checkpoint.load_step"]}
    raise SettingsError(
        f"load_checkpoint = {value!r}: a run resumes by itself from the newest checkpoint of "
        "job.dump_folder; weights of Hugging Face go into model.weights"
    )


def run_and_step(path: Path) -> dict[str, object]:
    """The run folder and the step of a checkpoint, -1 (the newest) for a run folder itself; empty
    where it is neither."""
    if (path / RUN_TOML).is_file():
        return {"job.dump_folder": str(path), "checkpoint.load_step": -1}
    step = path.name.removeprefix("step-")
    run = path.parent.parent
    if step.isdigit() and step != path.name and (run / RUN_TOML).is_file():
        return {"job.dump_folder": str(run), "checkpoint.load_step": int(step)}
    return {}


def optimizer_state_kept(value: str) -> dict[str, str]:
    """Says the opposite of model_weights_only."""
    return {"checkpoint.model_weights_only": "true" if value.lower() in OFF else "false"}


def fields_of_record(value: str) -> dict[str, str]:
    """The same notation as data.fields; one field alone is a text."""
    if set(value) & set("[]<,+"):
        return {"data.fields": value}
    return {"data.text_field": value}


def attention_type(value: str) -> dict[str, str]:
    """The last number of mesh_dim decides whether it is a ring."""
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
    """Attention in blocks, or as the device does it best."""
    if value.lower() in OFF:
        return {}
    return {"attention.kind": "blockwise"}


JAX_POLICIES = {
    "nothing_saveable": "nothing",
    "checkpoint_dots": "matmuls",
    "dots_saveable": "matmuls",
}


def recomputed(part: str) -> Callable[[str], dict[str, str]]:
    """The policy of jax.checkpoint for a part; everything_saveable, or none,
    computes nothing again."""

    def meaning(value: str) -> dict[str, str]:
        """What of a block is recomputed in the backward, and what is kept of it."""
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


def llama_config(value: str, others: Mapping[str, str]) -> dict[str, object]:
    """`dict(scan_attention=True, ...)`: keys about computing, and keys of the model. Raises
    SettingsError for those that are unknown."""
    if not value:
        return {}
    given = keyword_arguments(value)
    unknown = [name for name in given if name not in (*OF_COMPUTING, *OF_JAX, *OF_MODEL)]
    if unknown:
        raise SettingsError(f"update_llama_config: {', '.join(unknown)}: {IN_CONFIG}")
    meanings: dict[str, object] = mesh_of_config(given.pop("mesh_dim", ""), others)
    for name in OF_JAX:
        given.pop(name, None)
    for name in list(given):
        if name in OF_MODEL:
            meanings[OF_MODEL[name]] = given.pop(name)
    if not given.pop("scan_mlp", False):
        given.pop("scan_mlp_chunk_size", None)
    elif "scan_mlp_chunk_size" not in given:
        given["scan_mlp_chunk_size"] = 1024
    if not given.get("scan_attention"):  # then nothing reads the chunks
        given.pop("scan_query_chunk_size", None)
        given.pop("scan_key_chunk_size", None)
    meanings |= several_remats({name: given.pop(name) for name in REMATS if given.get(name)})
    for name, argument in given.items():
        old = OF_COMPUTING.get(name)
        if isinstance(old, str):
            meanings[old] = argument
        elif callable(old):
            meanings |= old(as_text(argument))
    return meanings


def mesh_of_config(mesh_dim: str, others: Mapping[str, str]) -> dict[str, object]:
    """The mesh stands in two places there, which must agree. Raises SettingsError."""
    outside = others.get("mesh_dim", "")
    if not mesh_dim or mesh_dim == outside:
        return {}
    if outside:
        raise SettingsError(
            f"update_llama_config: mesh_dim = {mesh_dim!r}, but --mesh_dim = {outside!r}: give "
            "both the same, or leave one out"
        )
    return {"parallelism.mesh_dim": mesh_dim}


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


OF_COMPUTING: dict[str, Old] = {  # those keys of its model's config that are about computing
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


# Keys of update_llama_config that set nothing here: they are about the compiler of JAX, and layers
# are a loop. (`mesh_dim` is read apart.)
OF_JAX = ("mesh_dim", "scan_layers", "param_scan_axis")

# Its keys of the model -> ours
OF_MODEL = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "num_hidden_layers": "model.num_hidden_layers",
    "num_attention_heads": "model.attention.num_heads",
    "num_key_value_heads": "model.attention.num_kv_heads",
    "max_sequence_length": "model.max_position_embeddings",
    "max_position_embeddings": "model.max_position_embeddings",
    "rms_norm_eps": "model.norm_eps",
    "initializer_range": "model.initializer_range",
    "theta": "model.attention.rope_theta",
    "tie_word_embeddings": "model.tie_word_embeddings",
    "resid_pdrop": "model.dropout",
    "embd_pdrop": "model.embed_dropout",
    "attn_pdrop": "model.attention.dropout",
}


def path_or_nothing(key: str) -> Callable[[str], dict[str, str]]:
    """A path; empty text, its default, names none."""

    def meaning(value: str) -> dict[str, str]:
        """The same setting here; empty text names none."""
        return {key: value} if value else {}

    return meaning


RING_ATTENTION: dict[str, Old] = {  # `--key=value`
    **OF_COMPUTING,
    **OPTIMIZER,
    "mesh_dim": "parallelism.mesh_dim",
    "dtype": "model.compute_dtype",
    "total_steps": in_optimizer_steps("total_steps", "training.steps"),
    "log_freq": in_optimizer_steps("log_freq", "metrics.log_freq"),
    "save_model_freq": WithOthers(one_checkpoint),
    "save_milestone_freq": in_optimizer_steps(
        "save_milestone_freq", "checkpoint.milestone_interval"
    ),
    "eval_steps": WithOthers(steps_of_evaluation),
    "autoresume": Dropped("a run resumes by itself from its newest whole checkpoint"),
    "load_llama_config": named_config,
    "update_llama_config": WithOthers(llama_config),
    "load_dataset_state": Refused(POSITION, ("",)),
    "load_checkpoint": WithOthers(tagged_checkpoint),
    "tokenizer.vocab_file": path_or_nothing("tokenizer.path"),
    "tokenizer.add_bos_token": Refused(OF_PROCESSOR),
    "tokenizer.add_eos_token": Refused(OF_PROCESSOR),
    ACCUMULATION: WithOthers(micro_batches),
    "train_dataset.type": Dropped(ITSELF),
    "train_dataset.text_processor.fields": fields_of_record,
    "train_dataset.text_processor.fields_from_example": "data.fields_from_record",
    "train_dataset.text_processor.subfield_separator": "data.field_separator",
    "train_dataset.text_processor.add_bos_token": "tokenizer.add_bos",
    "train_dataset.text_processor.add_eos_token": "tokenizer.add_eos",
    "train_dataset.json_dataset.path": path_or_nothing("data.dataset"),
    "train_dataset.json_dataset.seq_length": "training.seq_len",
    JSON_BATCH: sequences_of_all_devices(JSON_BATCH),
    "train_dataset.json_dataset.tokenizer_processes": "data.num_workers",
    **dict.fromkeys(
        (
            "train_dataset.json_dataset.tokenizer_parallel_chunk_size",
            "train_dataset.json_dataset.tokenizer_parallel_batch_size",
            "train_dataset.json_dataset.throughput_average_window_size",
        ),
        Dropped("text is tokenized once, ahead of training"),
    ),
    **dict.fromkeys(
        (
            "train_dataset.json_dataset.start_seek_loc",
            "train_dataset.json_dataset.example_index_at_start",
            "train_dataset.json_dataset.index_at_start",
            "train_dataset.json_dataset.tokens_count_at_start",
        ),
        Refused(POSITION),
    ),
    **dict.fromkeys(
        (
            "train_dataset.json_dataset.always_start_with_bos",
            "train_dataset.huggingface_dataset.always_start_with_bos",
        ),
        Refused("a row begins where the one before it ends; tokenizer.add_bos begins documents"),
    ),
    "train_dataset.text_processor.prepend_text": Refused(
        "text goes into records before they are trained on", ("",)
    ),
    "train_dataset.huggingface_dataset.path": "data.dataset",
    "train_dataset.huggingface_dataset.name": "data.dataset_name",
    "train_dataset.huggingface_dataset.split": "data.dataset_split",
    "train_dataset.huggingface_dataset.seq_length": "training.seq_len",
    HUB_BATCH: sequences_of_all_devices(HUB_BATCH),
    "train_dataset.huggingface_dataset.streaming": "data.streaming",
    "eval_dataset.type": Dropped(ITSELF),
    "eval_dataset.json_dataset.path": path_or_nothing("data.validation"),
    "eval_dataset.json_dataset.seq_length": Dropped(
        "an evaluation has sequences of training.seq_len; eval_steps takes it into account"
    ),
    "eval_dataset.json_dataset.batch_size": Dropped(
        "an evaluation has the micro-batches of the training; eval_steps takes it into account"
    ),
    "checkpointer.save_optimizer_state": optimizer_state_kept,
    "checkpointer.float_dtype": Dropped(
        "checkpoints keep float32, and a run continues exactly; checkpoint.export_dtype is that of "
        "exported weights"
    ),
    "log_all_worker": Refused("process 0 reports progress, the others report errors only"),
    **dict.fromkeys(
        (
            "initialize_jax_distributed",
            "jax_distributed.initialize_jax_distributed",
            "jax_distributed.coordinator_address",
            "jax_distributed.num_processes",
            "jax_distributed.process_id",
            "jax_distributed.local_device_ids",
        ),
        BY_TORCHRUN,
    ),
    **dict.fromkeys(
        (
            "logger.entity",
            "logger.notes",
            "logger.experiment_id",
            "logger.wandb_dir",
            "logger.prefix",
            "logger.prefix_to_id",
            "logger.append_uuid",
            "logger.random_delay",
        ),
        OF_WANDB,
    ),
    "logger.output_dir": "job.dump_folder",
    "logger.project_id": "metrics.wandb_project",
    "logger.online": "metrics.enable_wandb",
}
