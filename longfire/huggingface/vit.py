"""ViTForImageClassification of transformers <-> our models of images: config.json and tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from longfire.config.init_rules import INIT_KEYS
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.family import Config
from longfire.huggingface.weight_files import NAMES_SHOWN, WeightFiles
from longfire.model import on_meta

MODEL_TYPE = "vit"
ARCHITECTURE = "ViTForImageClassification"
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu", "silu": "silu"}
# What a trained model does not depend on.
TRAINING_ONLY = (*INIT_KEYS, "dropout", "embed_dropout", "residual_in_fp32", "initializer_range")
# Keys of theirs that name nothing of the model's forward, or what it always has here.
IDLE_KEYS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "encoder_stride",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "pooler_act",
    "pooler_output_size",
    "problem_type",
    "torch_dtype",
    "transformers_version",
}
# Prefixes of our names -> theirs, inside a layer and outside.
OUTSIDE = {
    "embed.weight": "vit.embeddings.cls_token",
    "positions.weight": "vit.embeddings.position_embeddings",
    "patches.projection.": "vit.embeddings.patch_embeddings.projection.",
    "norm.": "vit.layernorm.",
    "head.": "classifier.",
}
INSIDE = {
    "mixer_norm.": "layernorm_before.",
    "mixer.q_proj.": "attention.attention.query.",
    "mixer.k_proj.": "attention.attention.key.",
    "mixer.v_proj.": "attention.attention.value.",
    "mixer.o_proj.": "attention.output.dense.",
    "mlp_norm.": "layernorm_after.",
    "mlp.up_proj.": "intermediate.dense.",
    "mlp.down_proj.": "output.dense.",
}


def config_of_vit(config: Config, where: str) -> ModelConfig:
    """The model config that their config.json describes. Raises SettingsError naming a key that
    longfire cannot express."""
    from transformers import ViTConfig

    defaults = ViTConfig().to_dict()
    keys = {**defaults, "id2label": {}, **config}
    expressed = {
        "hidden_size": keys["hidden_size"],
        "num_hidden_layers": keys["num_hidden_layers"],
        "num_attention_heads": keys["num_attention_heads"],
        "intermediate_size": keys["intermediate_size"],
        "hidden_act": keys["hidden_act"],
        "hidden_dropout_prob": keys["hidden_dropout_prob"],
        "attention_probs_dropout_prob": keys["attention_probs_dropout_prob"],
        "initializer_range": keys["initializer_range"],
        "layer_norm_eps": keys["layer_norm_eps"],
        "image_size": keys["image_size"],
        "patch_size": keys["patch_size"],
        "num_channels": keys["num_channels"],
        "qkv_bias": keys["qkv_bias"],
    }
    for name, value in config.items():
        if name not in (*expressed, *IDLE_KEYS) and value != defaults.get(name):
            raise SettingsError(f"{where}: {name} = {value!r} is not known of {ARCHITECTURE}")
    if keys["hidden_act"] not in ACTIVATIONS:
        raise SettingsError(
            f"{where}: hidden_act = {keys['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    return ModelConfig(
        hidden_size=keys["hidden_size"],
        num_hidden_layers=keys["num_hidden_layers"],
        layer_types=("attention",),
        mixers={
            "attention": {
                "num_heads": keys["num_attention_heads"],
                "rope": "none",
                "qkv_bias": keys["qkv_bias"],
                "o_bias": True,
                "dropout": keys["attention_probs_dropout_prob"],
            }
        },
        intermediate_size=keys["intermediate_size"],
        mlp=ACTIVATIONS[keys["hidden_act"]],
        mlp_bias=True,
        norm="layernorm",
        norm_eps=keys["layer_norm_eps"],
        dropout=keys["hidden_dropout_prob"],
        embed_dropout=keys["hidden_dropout_prob"],
        learned_positions=True,
        initializer_range=keys["initializer_range"],
        direction="both",
        num_classes=len(keys["id2label"]) or keys.get("num_labels", 2),
        pool="first",
        image_size=keys["image_size"],
        patch_size=keys["patch_size"],
        image_channels=keys["num_channels"],
    )


def class_names(config: Config, count: int) -> tuple[str, ...]:
    """The names of the classes in their config.json, by their numbers."""
    names = config.get("id2label") or {}
    return tuple(str(names.get(str(n), f"LABEL_{n}")) for n in range(count))


def vit_config(model_config: ModelConfig, classes: tuple[str, ...]) -> Config:
    """Their config.json of a model. classes: the names of its classes, which are numbered where
    there are fewer. Raises SettingsError naming what their class cannot express."""
    attention = model_config.mixers.get("attention", {})
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(model_config.mlp, "")
    names = {number: name for number, name in enumerate(classes)}
    labels = [names.get(n, f"LABEL_{n}") for n in range(model_config.num_classes)]
    config: Config = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_size": model_config.hidden_size,
        "num_hidden_layers": model_config.num_hidden_layers,
        "num_attention_heads": attention.get("num_heads", 0),
        "intermediate_size": model_config.intermediate_size,
        "hidden_act": activation,
        "hidden_dropout_prob": model_config.dropout,
        "attention_probs_dropout_prob": attention.get("dropout", 0.0),
        "initializer_range": model_config.initializer_range,
        "layer_norm_eps": model_config.norm_eps,
        "image_size": model_config.image_size,
        "patch_size": model_config.patch_size,
        "num_channels": model_config.image_channels,
        "qkv_bias": attention.get("qkv_bias", False),
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "dtype": "float32",
    }
    differs = differences(model_config, config)
    if differs:
        raise SettingsError(
            f"{ARCHITECTURE} of transformers cannot express {', '.join(differs)}: leave "
            "the export out (checkpoint.export = false); the checkpoint of the run has the model"
        )
    return config


def differences(model_config: ModelConfig, config: Config) -> list[str]:
    """The settings of a model that its config.json of theirs does not give back."""
    other = sorted({name for name in model_config.layer_types if mixer_of(name) != "attention"})
    if other:
        return [f"layer_types with {name}" for name in other]
    if not config["hidden_act"]:
        return [f"mlp = {model_config.mlp!r}"]
    if not model_config.image_size:
        return ["a model of text"]
    back = config_of_vit(config, "")
    found: list[str] = []
    for field in fields(ModelConfig):
        value = getattr(model_config, field.name)
        if field.name in (*TRAINING_ONLY, "mixers") or value == getattr(back, field.name):
            continue
        found.append(f"{field.name} = {value!r}")
    return found + differences_of_attention(model_config, back)


def differences_of_attention(model_config: ModelConfig, back: ModelConfig) -> list[str]:
    """The same of the settings of attention, where defaults are those of the mixer."""
    from longfire.mixers.attention import AttentionConfig

    ours = AttentionConfig(**model_config.mixers["attention"])
    heads = ours.num_heads
    if ours.num_kv_heads == heads:
        ours = replace(ours, num_kv_heads=0)
    if ours.head_dim * heads == model_config.hidden_size:
        ours = replace(ours, head_dim=0)
    theirs = AttentionConfig(**back.mixers["attention"])
    found: list[str] = []
    for field in fields(AttentionConfig):
        value = getattr(ours, field.name)
        is_rope = field.name.startswith("rope_") and ours.rope == "none"
        if value != getattr(theirs, field.name) and field.name != "dropout" and not is_rope:
            found.append(f"attention.{field.name} = {value!r}")
    return found


def their_name(ours: str) -> str:
    """The name of a parameter in their files."""
    if ours.startswith("layers."):
        _, layer, inside = ours.split(".", 2)
        for prefix, theirs in INSIDE.items():
            if inside.startswith(prefix):
                return f"vit.encoder.layer.{layer}.{theirs}{inside.removeprefix(prefix)}"
    for prefix, theirs in OUTSIDE.items():
        if ours.startswith(prefix):
            return f"{theirs}{ours.removeprefix(prefix)}"
    raise AssertionError(f"{ours} is no parameter of a model that {ARCHITECTURE} can express")


def to_theirs(ours: str, tensor: Tensor, model_config: ModelConfig) -> Tensor:
    """Our tensor in their shape: the same numbers in the same order."""
    if ours in ("embed.weight", "positions.weight"):
        return tensor[None]
    if ours == "patches.projection.weight":
        size = model_config.patch_size
        return tensor.unflatten(1, (model_config.image_channels, size, size))
    return tensor


def to_ours(ours: str, tensor: Tensor) -> Tensor:
    """Their tensor in our shape."""
    if ours in ("embed.weight", "positions.weight"):
        return tensor[0]
    if ours == "patches.projection.weight":
        return tensor.flatten(1)
    return tensor


def read_vit_weights(folder: Path, model_config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, fp32 tensor) of each parameter, one in memory at a time. Names and shapes are
    compared before the first is read. Raises CheckpointError naming missing, extra and wrongly
    shaped tensors."""
    files = WeightFiles(folder)
    extra = set(files.tensors)
    wrong: list[str] = []
    parameters = dict(on_meta(model_config).named_parameters())
    for ours, parameter in parameters.items():
        theirs = their_name(ours)
        extra.discard(theirs)
        shape = tuple(to_theirs(ours, parameter, model_config).shape)
        if theirs not in files.tensors:
            wrong.append(f"{theirs} is missing")
        elif files.tensors[theirs].shape != shape:
            wrong.append(f"{theirs} has {files.tensors[theirs].shape} where {shape} is needed")
    wrong += [f"{name} is not of the model" for name in sorted(extra)]
    if wrong:
        raise CheckpointError(
            f"{folder}: not the weights of this model: {'; '.join(wrong[:NAMES_SHOWN])}"
        )
    for ours in parameters:
        tensor = files.read(their_name(ours)).to(torch.float32, copy=True)
        yield ours, to_ours(ours, tensor).contiguous()


def vit_weights(weights: Mapping[str, Tensor], model_config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors of our parameters, by their names."""
    found: dict[str, Tensor] = {}
    for ours, tensor in weights.items():
        found[their_name(ours)] = to_theirs(ours, tensor.detach(), model_config).contiguous()
    return found
