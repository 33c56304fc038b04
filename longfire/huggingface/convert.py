"""A pretrained model -> another architecture with every matching weight: where continual
pretraining of a new mixer begins.

The T2R way (Kasai 2021; GSA, Zhang 2024, section 4.2; flame's convert_from_llama): a new model of
the target's config, into which embeddings, norms, MLPs, head and the q, k, v, o of every mixer are
copied by name; gates and convolutions stay fresh. A weight is copied where it does in the new model
what it did in the old one: never into an MLP or a norm of another kind.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from longfire.checkpoint.weights import open_model
from longfire.config.config_file import read_config
from longfire.config.model_config import INIT_KEYS, ModelConfig, mixer_of
from longfire.config.run import read_model_config
from longfire.errors import SettingsError
from longfire.huggingface.convert_report import TABLE, Conversion, Left, Moved
from longfire.huggingface.convert_settings import compared, full_table, inherit, said_in
from longfire.huggingface.export import Check, export
from longfire.huggingface.families import choose_family, family_named, family_of, ignored_line
from longfire.huggingface.family_writing import left_out
from longfire.huggingface.tensors import layout
from longfire.initialise import build
from longfire.model import Model

# What other mixers call the projections of softmax attention: queries read the state, keys and
# values write it.
CALLED = {
    "rwkv7": {"r_proj": "q_proj"},
    "hgrn2": {"i_proj": "v_proj", "i_conv1d": "v_conv1d"},
    "mamba2": {
        "C_proj": "q_proj",
        "B_proj": "k_proj",
        "x_proj": "v_proj",
        "out_proj": "o_proj",
        "C_conv1d": "q_conv1d",
        "B_conv1d": "k_conv1d",
        "x_conv1d": "v_conv1d",
    },
}
# What has one meaning in every mixer that has it, by the names of attention: g_proj makes the
# output's gate, b_proj the delta rule's beta. Whatever else two mixers call alike (a norm, a decay)
# is not the same.
SHARED = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_norm",
    "k_norm",
    "q_conv1d",
    "k_conv1d",
    "v_conv1d",
    "g_proj",
    "b_proj",
)
# Where the size of a head stands, for mixers that have no head_k and head_v: (of queries and keys,
# of values).
HEAD_SIZES = {"mamba2": ("state_size", "head_dim"), "hgrn2": ("expand_ratio", "expand_ratio")}
RESIDUAL_NORMS = ("mixer_norm", "mlp_norm", "norm", "embed_norm")
VOCABULARY = ("embed.weight", "head.weight", "positions.weight")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a model. role: of a mixer's part, by attention's names; else the
    name of the block's part."""

    layer: int | None
    part: str  # mixer, mlp, mixer_norm ...; outside the layers embed, norm ...
    role: str = ""
    rest: str = ""  # weight, bias ...

    @classmethod
    def of(cls, name: str, model_config: ModelConfig) -> "Place":
        parts = name.split(".")
        if parts[0] != "layers":
            return cls(None, parts[0], "", ".".join(parts[1:]))
        layer, part = int(parts[1]), parts[2]
        if part != "mixer":
            return cls(layer, part, "", ".".join(parts[3:]))
        called = CALLED.get(mixer_of(model_config.layer_types[layer]), {})
        return cls(layer, part, called.get(parts[3], parts[3]), ".".join(parts[4:]))

    def matrix(self) -> "Place":
        """The matrix whose outputs this tensor acts on: a bias, QK-norm or convolution means
        nothing with another one."""
        role, _, kind = self.role.partition("_")
        if kind in ("norm", "conv1d") and role in ("q", "k", "v"):
            return replace(self, role=f"{role}_proj", rest="weight")
        return replace(self, rest="weight") if self.rest == "bias" else self


def convert_weights(
    source: Model, model_config: ModelConfig, seed: int
) -> tuple[Model, list[Moved], list[Left]]:
    """A model of `shape` with the source's weights wherever they match, the rest initialised by
    (seed, name); what became of each of its parameters, and of each of the source's that is in none
    of them."""
    model = build(model_config, seed)
    given = own_tensors(source)
    at = {Place.of(name, source.config): name for name in given}
    moved: list[Moved] = []
    fresh: set[Place] = set()
    refused: dict[
        str, str
    ] = {}  # tensors of the source that were looked at and not taken, with the reason
    for name, parameter in own_tensors(model).items():
        place = Place.of(name, model_config)
        theirs = at.get(place, "")
        if name == "head.weight" and not theirs:
            theirs = "embed.weight"  # a tied head
        old, how = None, difference(place, source.config, model_config)
        if theirs and place.matrix() in fresh:
            how = how or "the matrix before it is fresh"
        if theirs and not how:
            old, how = fitted(place, given[theirs], parameter, source, model)
        if old is not None:
            with torch.no_grad():
                parameter[tuple(slice(size) for size in old.shape)] = old
            moved.append(Moved(name, how, theirs, tuple(parameter.shape)))
            continue
        fresh.add(place)
        if theirs:
            refused[theirs] = how
        elif place.part == "mixer" or not how:
            how = "the source has none"
        moved.append(Moved(name, f"fresh: {how}", "", tuple(parameter.shape)))
    used = {one.source for one in moved}
    left = [
        Left(
            name,
            refused.get(name)
            or without(Place.of(name, source.config), source.config, model_config),
            tuple(tensor.shape),
        )
        for name, tensor in given.items()
        if name not in used
    ]
    return model, moved, left


def own_tensors(model: Model) -> dict[str, Tensor]:
    """Every tensor of a model once: a tied head is the embedding."""
    tied = ("head.weight",) if model.config.tie_word_embeddings else ()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def difference(place: Place, source: ModelConfig, model_config: ModelConfig) -> str:
    """Why a tensor of the source would do something else at this place of a model of `shape`; "" if
    it would do the same."""
    if place.part == "mlp":
        return mlp_difference(source, model_config)
    if place.part in RESIDUAL_NORMS:
        if source.norm != model_config.norm:
            return f"norms of the source are {source.norm}, these {model_config.norm}"
        if (
            "post" in (source.block, model_config.block)
            and source.block != model_config.block
            and place.part != "embed_norm"
        ):
            return f"blocks of the source are {source.block!r}, these {model_config.block!r}"
    if place.part == "mixer" and place.layer is not None:
        mixer, theirs = (
            mixer_of(model_config.layer_types[place.layer]),
            mixer_of(source.layer_types[place.layer]),
        )
        if mixer != theirs and place.role not in SHARED:
            return f"{theirs}, the source's mixer, means another thing by it"
    if place.part == "shared" and not {place.rest.partition(".")[0]} <= set(
        map(mixer_of, model_config.layer_types)
    ):
        return f"no layer has {place.rest.partition('.')[0]}"
    return ""


def mlp_difference(source: ModelConfig, model_config: ModelConfig) -> str:
    """Why the matrices of the source's MLPs are none of a model of `shape`."""
    if source.mlp != model_config.mlp:
        return f"the source's MLP is {source.mlp}, this one {model_config.mlp}"
    if source.intermediate_size != model_config.intermediate_size:
        return f"the source's MLP has {source.intermediate_size} channels, this one {model_config.intermediate_size}"
    return ""


def without(place: Place, source: ModelConfig, model_config: ModelConfig) -> str:
    """Why a model of `shape` has no such tensor as the source has at this place."""
    if why := difference(place, source, model_config):
        if place.part == "mixer" and place.layer is not None:
            return f"{mixer_of(model_config.layer_types[place.layer])} has none"
        return why
    if place.part == "mixer" and place.layer is not None:
        name = model_config.layer_types[place.layer]
        if (
            place.role in ("q_norm", "k_norm")
            and full_table(model_config, name).get("qk_norm") is False
        ):
            return f"{name}.qk_norm = false"
        if place.rest == "bias" and place.role in ("q_proj", "k_proj", "v_proj", "o_proj"):
            return f"{name} has no such bias"
        return f"{name} has none"
    if place.part == "mlp":
        return "mlp_bias = false"
    if place.part == "head":
        return "the head is the embedding: tie_word_embeddings = true"
    if place.part == "positions":
        return "learned_positions = false"
    if place.part == "embed_norm" and not model_config.embed_norm:
        return "embed_norm = false"
    if place.part == "mlp_norm" and (
        model_config.mlp == "none" or model_config.block == "parallel_tied"
    ):
        return f"mlp = {model_config.mlp!r} and block = {model_config.block!r} have no norm before an MLP"
    if place.part in RESIDUAL_NORMS:
        return f"norm_affine = {str(model_config.norm_affine).lower()}, norm_bias = {str(model_config.norm_bias).lower()}"
    return "the new model has none"


def fitted(
    place: Place, old: Tensor, parameter: Tensor, source: Model, model: Model
) -> tuple[Tensor | None, str]:
    """The source's tensor made to fit, and how; None with the reason."""
    was, size = (head_size(one, place) for one in (source, model))
    if old.shape == parameter.shape:
        if was is not None and size is not None and was != size:
            return old, f"copied: as heads of {size} channels, {was} in the source"
        return old, "copied"
    if f"{place.part}.{place.rest}" in VOCABULARY and old.shape[1:] == parameter.shape[1:]:
        rows = min(len(old), len(parameter))
        whose = f"{len(parameter)}" if rows < len(parameter) else f"the source's {len(old)}"
        return old[:rows], f"copied: rows 0 to {rows - 1} of {whose}"
    is_grouped = place.role in ("k_proj", "v_proj") and was is not None and was == size
    if is_grouped and old.shape[1:] == parameter.shape[1:]:
        return regrouped(old, len(parameter), was)
    return None, f"the source's is {tuple(old.shape)}, this one {tuple(parameter.shape)}"


def head_size(model: Model, place: Place) -> int | None:
    """Channels of a head of the queries, keys or values that a matrix makes or reads; None of any
    other tensor, or where a mixer does not say it."""
    if place.layer is None or place.role not in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return None
    mixer, is_value = model.layers[place.layer].mixer, place.role in ("v_proj", "o_proj")
    named = HEAD_SIZES.get(mixer_of(model.config.layer_types[place.layer]))
    if named is not None:
        return getattr(mixer.config, named[is_value])
    general = getattr(mixer, "head_dim", getattr(mixer.config, "head_dim", None))
    return getattr(mixer, "head_v" if is_value else "head_k", general)


def regrouped(old: Tensor, rows: int, size: int) -> tuple[Tensor | None, str]:
    """Key or value heads for another number of groups: each repeated, or the mean of neighbours
    (Ainslie 2023, section 2.1)."""
    if rows % len(old) == 0:
        times = rows // len(old)
        new = old.unflatten(0, (-1, size)).repeat_interleave(times, 0).flatten(0, 1)
        return new, f"reshaped: each head {times} times"
    if len(old) % rows == 0:
        heads = len(old) // rows
        return old.unflatten(0, (-1, heads, size)).mean(1).flatten(
            0, 1
        ), f"reshaped: means of {heads} heads"
    return None, f"{len(old)} rows do not divide into {rows}"


def check_fits(model_config: ModelConfig, source: ModelConfig, config: Path) -> None:
    """Raises SettingsError where nothing could be copied that matters."""
    for key in ("hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(model_config, key), getattr(source, key)
        if ours != theirs:
            raise SettingsError(
                f"{config}: {key} = {ours}, but the source's is {theirs}: a converted model keeps width and depth; set it to "
                f"{theirs}"
            )


def target_config(
    config: Path, source: ModelConfig, keep_attention: tuple[int, ...]
) -> tuple[ModelConfig, ModelConfig]:
    """The target's shape as its config says it, and with what it takes from the source. Raises
    SettingsError."""
    where = str(config / "config.json" if config.is_dir() else config)
    read = read_model_config(config)
    check_fits(read, source, config)
    said = said_in(read_config(config), read, source, where)
    return read, inherit(read, said, source, keep_attention, where)


def convert(
    source: Path,
    config: Path,
    out: Path,
    keep_attention: tuple[int, ...] = (),
    seed: int = 42,
    plugins: tuple[str, ...] = (),
    note: Callable[[str], None] = print,
) -> Check:
    """`longfire convert`: write the transplanted model to `out` as Hugging Face weights, checked,
    with a table of what was moved.

    source: a run folder or a folder of Hugging Face weights. config: the target's config.json;
    settings that it does not say are the source's. Raises SettingsError naming what does not fit.
    """
    opened = open_model(source, note=note, plugins=plugins)
    if not isinstance(opened.model, Model):
        raise SettingsError(
            f"{source}: a run of model.backend = 'transformers', whose class computes as it is; export it, and convert the "
            "export if longfire has its family"
        )
    theirs = opened.model.config
    for folder in (config,) if opened.run else (source, config):
        for line in ignored_line(read_config(folder), str(folder)):
            note(line)
    read, model_config = target_config(config, theirs, keep_attention)
    model_config = model_config.with_vocabulary(opened.tokenizer.vocab_size)
    model, moved, left = convert_weights(opened.model, model_config, seed)
    files = (
        {name: name for name in own_tensors(opened.model)}
        if opened.run
        else names_in_files(source, theirs)
    )
    conversion = Conversion(moved, left, compared(read, model_config, theirs), files)
    conversion.show(str(config), note)
    for line in not_written(model_config, theirs):
        note(line)
    facts = {"converted from": source.absolute().name, **conversion.facts()}
    adds_bos = opened.run.tokenizer.add_bos if opened.run else None
    table = {TABLE: conversion.to_json()}
    return export(model, opened.tokenizer, out, facts=facts, files=table, adds_bos=adds_bos)


def names_in_files(folder: Path, model_config: ModelConfig) -> dict[str, str]:
    """Our name of each tensor -> its name in a folder of Hugging Face weights."""
    family = family_of(read_config(folder), str(folder / "config.json"))
    return {
        ours: theirs
        for theirs, stored in layout(family, model_config).items()
        for ours in stored.ours
    }


def not_written(model_config: ModelConfig, source: ModelConfig) -> list[str]:
    """What is to be known before the new model is trained: settings of training that its
    config.json has no key for, and a teacher that it cannot learn from."""
    family = family_named(choose_family(model_config))
    found = [
        f"{setting}: {family.architecture} has no key for it; write it in the [model] table of the recipe that trains the model"
        for setting in left_out(family, model_config)
        if not setting.startswith(INIT_KEYS)
    ]
    if model_config.vocab_size != source.vocab_size:
        found.append(
            f"vocab_size = {model_config.vocab_size}, in the source {source.vocab_size}: distillation.kind = 'logits' needs the "
            "same; leave vocab_size out of the config"
        )
    return found
