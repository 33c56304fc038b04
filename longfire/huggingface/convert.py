"""A pretrained model -> another architecture with every matching weight: where continual
pretraining of a new mixer begins.

The T2R way (Kasai 2021; GSA, Zhang 2024, section 4.2; flame's convert_from_llama): a new model of
the target's config, into which embeddings, norms, MLPs, head and the q, k, v, o of every mixer are
copied by name; gates and convolutions stay fresh. A weight is copied only where it has the same use
in the new model: never into an MLP or a norm of another kind. convert_places.py says where that is
so.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longfire.checkpoint.weights import open_model
from longfire.config.config_file import read_config
from longfire.config.init_rules import INIT_KEYS
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.read_model import read_model_config
from longfire.errors import SettingsError
from longfire.huggingface.convert_places import PROJECTIONS, Place, absence, difference
from longfire.huggingface.convert_report import TABLE, Conversion, Left, Moved
from longfire.huggingface.convert_settings import compared, explicit_in, inherit
from longfire.huggingface.export import Check, export
from longfire.huggingface.families import choose_family, family_named, family_of, ignored_line
from longfire.huggingface.family_writing import left_out
from longfire.huggingface.tensors import layout
from longfire.initialise import build
from longfire.mixers.mixer import Mixer
from longfire.model import Model
from longfire.work_progress import WorkProgress

logger = logging.getLogger(__name__)

# The settings with the size of a head, for mixers without head_k and head_v: (of queries and keys,
# of values).
HEAD_SIZES = {
    "mamba2": ("state_size", "head_dim"),
    "hgrn2": ("expand_ratio", "expand_ratio"),
}
VOCABULARY = ("embed.weight", "head.weight", "positions.weight")


def convert_weights(
    source: Model,
    model_config: ModelConfig,
    seed: int,
) -> tuple[Model, list[Moved], list[Left]]:
    """A model of this config with the source's weights wherever they match, the rest initialised
    by (seed, name); how each of its parameters was made; and each tensor of the source that is in
    none of them, with the reason."""
    model = build(model_config, seed)
    given = own_tensors(source)
    names: dict[Place, str] = {}
    for name in given:
        names[Place.of(name, source.config)] = name
    moved: list[Moved] = []
    fresh: set[Place] = set()
    refused: dict[str, str] = {}  # tensors of the source that did not fit -> the reason
    for name, parameter in shown_progress(own_tensors(model)):
        place = Place.of(name, model_config)
        theirs = names.get(place, "")
        if name == "head.weight" and not theirs:
            theirs = "embed.weight"  # a tied head
        old = None
        how = difference(place, source.config, model_config)
        if theirs and place.matrix() in fresh:
            how = how or "the matrix before it is fresh"
        if theirs and not how:
            old, how = fitted(place, given[theirs], parameter, source, model)
        if old is not None:
            copy_into(parameter, old)
            moved.append(Moved(name, how, theirs, tuple(parameter.shape)))
            continue
        fresh.add(place)
        if theirs:
            refused[theirs] = how
        elif place.part == "mixer" or not how:
            how = "the source has none"
        moved.append(Moved(name, f"fresh: {how}", "", tuple(parameter.shape)))
    unused = dict(given)
    for made in moved:
        unused.pop(made.source, None)
    left: list[Left] = []
    for name, tensor in unused.items():
        place = Place.of(name, source.config)
        why = refused.get(name) or absence(place, source.config, model_config)
        left.append(Left(name, why, tuple(tensor.shape)))
    return model, moved, left


def shown_progress(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, while it is shown how many of their numbers are done."""
    total = sum(tensor.numel() for tensor in tensors.values())
    with WorkProgress("convert", total, "parameters") as progress:
        for name, tensor in tensors.items():
            yield name, tensor
            progress.add(tensor.numel())


@torch.no_grad()
def copy_into(parameter: Tensor, old: Tensor) -> None:
    """Copy a tensor into the beginning of a parameter along each dim."""
    beginning = tuple(map(slice, old.shape))
    parameter[beginning] = old


def own_tensors(model: Model) -> dict[str, Tensor]:
    """Every tensor of a model once: a tied head is the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("head.weight", None)
    return tensors


def fitted(
    place: Place,
    old: Tensor,
    parameter: Tensor,
    source: Model,
    model: Model,
) -> tuple[Tensor | None, str]:
    """The source's tensor made to fit, and how; None with the reason."""
    old_size = head_size(source, place)
    size = head_size(model, place)
    if old.shape == parameter.shape:
        if old_size is not None and size is not None and old_size != size:
            return old, f"copied: as heads of {size} channels, {old_size} in the source"
        return old, "copied"
    has_same_columns = old.shape[1:] == parameter.shape[1:]
    if f"{place.part}.{place.rest}" in VOCABULARY and has_same_columns:
        return cut_rows(old, len(parameter))
    is_grouped = place.role in ("k_proj", "v_proj") and old_size == size
    if is_grouped and size is not None and has_same_columns:
        return regrouped(old, len(parameter), size)
    return None, f"the source's is {tuple(old.shape)}, this one {tuple(parameter.shape)}"


def cut_rows(old: Tensor, rows: int) -> tuple[Tensor, str]:
    """As many rows of a vocabulary or of positions as both have."""
    copied = min(len(old), rows)
    whose = f"the source's {len(old)}"
    if copied < rows:
        whose = f"{rows}"
    return old[:copied], f"copied: rows 0 to {copied - 1} of {whose}"


def head_size(model: Model, place: Place) -> int | None:
    """Channels of a head of the queries, keys or values that a matrix makes or reads; None for any
    other tensor, or where a mixer does not have the number."""
    if place.layer is None or place.role not in PROJECTIONS:
        return None
    mixer = model.layers[place.layer].mixer
    assert isinstance(mixer, Mixer), "a block of our own model"
    is_value = place.role in ("v_proj", "o_proj")
    names = HEAD_SIZES.get(mixer_of(model.config.layer_types[place.layer]))
    if names is not None:
        return getattr(mixer.config, names[is_value])
    general = getattr(mixer, "head_dim", getattr(mixer.config, "head_dim", None))
    return getattr(mixer, "head_v" if is_value else "head_k", general)


def regrouped(
    old: Tensor,
    rows: int,
    size: int,
) -> tuple[Tensor | None, str]:
    """Key or value heads for another number of groups: each repeated, or the mean of neighbours
    (Ainslie 2023, section 2.1). size: channels of a head."""
    if rows % len(old) == 0:
        times = rows // len(old)
        heads = old.unflatten(0, (-1, size))
        new = heads.repeat_interleave(times, 0).flatten(0, 1)
        return new, f"reshaped: each head {times} times"
    if len(old) % rows == 0:
        count = len(old) // rows
        groups = old.unflatten(0, (-1, count, size))
        new = groups.mean(1).flatten(0, 1)
        return new, f"reshaped: means of {count} heads"
    return None, f"{len(old)} rows do not divide into {rows}"


def check_fits(
    target: ModelConfig,
    source: ModelConfig,
    config: Path,
) -> None:
    """Raises SettingsError where nothing could be copied that matters."""
    for key in ("hidden_size", "num_hidden_layers"):
        ours = getattr(target, key)
        theirs = getattr(source, key)
        if ours != theirs:
            raise SettingsError(
                f"{config}: {key} = {ours}, but the source's is {theirs}: a converted model keeps "
                f"width and depth; set it to {theirs}"
            )


def target_config(
    config: Path,
    source: ModelConfig,
    keep_attention: tuple[int, ...],
) -> tuple[ModelConfig, ModelConfig]:
    """The target's model config as its file describes it, and with what it takes from the source.
    Raises SettingsError."""
    where = str(config / "config.json" if config.is_dir() else config)
    read = read_model_config(config)
    assert isinstance(read, ModelConfig), "no setting asks for a class of transformers"
    check_fits(read, source, config)
    explicit = explicit_in(read_config(config), read, source, where)
    return read, inherit(read, explicit, source, keep_attention, where)


def convert(
    source: Path,
    config: Path,
    out: Path,
    keep_attention: tuple[int, ...] = (),
    seed: int = 42,
    plugins: tuple[str, ...] = (),
) -> Check:
    """`longfire convert`: write the converted model to `out` as Hugging Face weights, checked, with
    a table of what was moved.

    source: a run folder or a folder of Hugging Face weights. config: the target's config.json;
    settings that it does not have are the source's. Raises SettingsError naming what does not fit.
    """
    opened = open_model(source, plugins=plugins)
    if not isinstance(opened.model, Model):
        raise SettingsError(
            f"{source}: a run of model.backend = 'transformers', whose class computes as it is; "
            "export it, and convert the export if longfire has its family"
        )
    theirs = opened.model.config
    folders = [config]
    if opened.run is None:
        folders = [source, config]
    for folder in folders:
        for line in ignored_line(read_config(folder), str(folder)):
            logger.info(line)
    read, model_config = target_config(config, theirs, keep_attention)
    model_config = model_config.with_vocabulary(opened.tokenizer.vocab_size)
    model, moved, left = convert_weights(opened.model, model_config, seed)
    if opened.run:
        files = {name: name for name in own_tensors(opened.model)}
    else:
        files = names_in_files(source, theirs)
    conversion = Conversion(moved, left, compared(read, model_config, theirs), files)
    conversion.show(str(config))
    for line in warnings(model_config, theirs):
        logger.info(line)
    facts = {"converted from": source.absolute().name, **conversion.facts()}
    adds_bos = opened.run.tokenizer.add_bos if opened.run else None
    table = {TABLE: conversion.to_json()}
    return export(
        model,
        opened.tokenizer,
        out,
        facts=facts,
        files=table,
        adds_bos=adds_bos,
    )


def names_in_files(folder: Path, model_config: ModelConfig) -> dict[str, str]:
    """Our name of each tensor -> its name in a folder of Hugging Face weights."""
    family = family_of(read_config(folder), str(folder / "config.json"))
    names = {}
    for theirs, stored in layout(family, model_config).items():
        for ours in stored.ours:
            names[ours] = theirs
    return names


def warnings(model_config: ModelConfig, source: ModelConfig) -> list[str]:
    """What the user must know before the new model is trained: settings of training that its
    config.json has no key for, and a teacher that it cannot learn from."""
    family = family_named(choose_family(model_config))
    found = []
    for setting in left_out(family, model_config):
        if not setting.startswith(INIT_KEYS):
            found.append(
                f"{setting}: {family.architecture} has no key for it; write it in the [model] "
                "table of the recipe that trains the model"
            )
    if model_config.vocab_size != source.vocab_size:
        found.append(
            f"vocab_size = {model_config.vocab_size}, in the source {source.vocab_size}: "
            "distillation.kind = 'logits' needs the same; leave vocab_size out of the config"
        )
    return found
