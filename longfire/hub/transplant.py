"""A pretrained model -> another architecture with every matching weight: where continual pretraining of a new mixer begins.

The T2R way (Kasai 2021; GSA, Zhang 2024, section 4.2; flame's convert_from_llama): a new model of the target's config, into which
embeddings, norms, MLPs, head and the q, k, v, o of every mixer are copied by name; gates and convolutions stay fresh.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from longfire.errors import SettingsError
from longfire.hub.convert import Check, export
from longfire.hub.family import variant
from longfire.initialise import build
from longfire.mixers.mixer import Mixer
from longfire.model import Model
from longfire.run import read_shape
from longfire.shape import ModelShape, mixer_of
from longfire.weights import Opened, open_model

# What other mixers call the four projections of softmax attention: queries read the state, keys and values write it.
CALLED = {
    "rwkv7": {"r_proj": "q_proj"},
    "hgrn2": {"i_proj": "v_proj"},
    "mamba2": {"C_proj": "q_proj", "B_proj": "k_proj", "x_proj": "v_proj", "out_proj": "o_proj"},
}
TABLE = "conversion.json"


@dataclass(frozen=True)
class Moved:
    """How one parameter of the new model came to be, in words, from which of the source ("" if it is fresh)."""

    name: str
    how: str
    source: str
    shape: tuple[int, ...]


def transplant(source: Model, shape: ModelShape, seed: int) -> tuple[Model, list[Moved]]:
    """A model of `shape` with the source's weights wherever they match, the rest initialised by (seed, name)."""
    model = build(shape, seed)
    given, moved = source.state_dict(), []
    for name, parameter in model.state_dict().items():
        if name == "head.weight" and shape.tie_word_embeddings:
            continue
        theirs = name_in_source(name, shape)
        if theirs == "head.weight" and theirs not in given:
            theirs = "embed.weight"
        old, how = fitted(name, theirs, given, parameter, source, model)
        if old is not None:
            with torch.no_grad():
                parameter[tuple(slice(size) for size in old.shape)] = old
        moved.append(Moved(name, how, theirs if old is not None else "", tuple(parameter.shape)))
    return model, moved


def name_in_source(name: str, shape: ModelShape) -> str:
    """The parameter of the source that should stand here."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "mixer":
        called = CALLED.get(mixer_of(shape.layer_types[int(parts[1])]), {})
        parts[3] = called.get(parts[3], parts[3])
    return ".".join(parts)


def fitted(
    name: str, theirs: str, given: Mapping[str, Tensor], parameter: Tensor, source: Model, model: Model
) -> tuple[Tensor | None, str]:
    """The source's tensor made to fit, and how; None with the reason."""
    old = given.get(theirs)
    if old is None:
        return None, "fresh: the source has none"
    if old.shape == parameter.shape:
        return old, "copied"
    if name in ("embed.weight", "head.weight", "positions.weight") and old.shape[1:] == parameter.shape[1:]:
        rows = min(len(old), len(parameter))
        return old[:rows], f"copied: rows 0 to {rows - 1} of {len(parameter)}"
    if (
        old.dim() == 2
        and theirs.rpartition(".")[0].endswith(("k_proj", "v_proj"))
        and old.shape[1] == parameter.shape[1]
    ):
        layer, leaf = int(name.split(".")[1]), theirs.split(".")[3]
        sizes = {head_size(m.layers[layer].mixer, leaf) for m in (source, model)}
        if len(sizes) == 1 and None not in sizes:
            return regrouped(old, len(parameter), sizes.pop())
    return None, f"fresh: the source's is {tuple(old.shape)}"


def head_size(mixer: Mixer, leaf: str) -> int | None:
    """Channels of a key or value head."""
    return getattr(mixer, "head_dim", getattr(mixer, "head_v" if leaf == "v_proj" else "head_k", None))


def regrouped(old: Tensor, rows: int, size: int) -> tuple[Tensor | None, str]:
    """Key or value heads for another number of groups: each repeated, or the mean of neighbours (Ainslie 2023, section 2.1)."""
    if rows % len(old) == 0:
        times = rows // len(old)
        return old.unflatten(0, (-1, size)).repeat_interleave(times, 0).flatten(
            0, 1
        ), f"reshaped: each head {times} times"
    if len(old) % rows == 0:
        heads = len(old) // rows
        return old.unflatten(0, (-1, heads, size)).mean(1).flatten(0, 1), f"reshaped: means of {heads} heads"
    return None, f"fresh: {len(old)} rows do not divide into {rows}"


def with_attention_kept(shape: ModelShape, source: ModelShape, layers: tuple[int, ...]) -> ModelShape:
    """The target with the source's mixer, and its settings, in these layers. Raises SettingsError for a layer that is none."""
    types, mixers = list(shape.layer_types), dict(shape.mixers)
    wrong = [i for i in layers if not 0 <= i < min(shape.num_hidden_layers, source.num_hidden_layers)]
    if wrong:
        raise SettingsError(
            f"--keep-attention {','.join(map(str, wrong))}: the layers are 0 to {shape.num_hidden_layers - 1}"
        )
    for i in layers:
        name = source.layer_types[i]
        types[i] = variant(mixers, source.mixers.get(name, {}), mixer_of(name))
    used = {name: mixers[name] for name in dict.fromkeys(types) if name in mixers}
    return replace(shape, layer_types=tuple(types), mixers=used)


def check_fits(shape: ModelShape, source: ModelShape, config: Path) -> None:
    """Raises SettingsError where nothing could be copied that matters."""
    for key in ("hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(shape, key), getattr(source, key)
        if ours != theirs:
            raise SettingsError(
                f"{config}: {key} = {ours}, but the source's is {theirs}: a converted model keeps width and depth; set it to "
                f"{theirs}"
            )


def convert(
    source: Path, config: Path, out: Path, keep_attention: tuple[int, ...] = (), seed: int = 42,
    plugins: tuple[str, ...] = (), note: Callable[[str], None] = print,
) -> Check:  # fmt: skip
    """`longfire convert`: write the transplanted model to `out` as Hugging Face weights, checked, with a table of what was moved.

    source: a run folder or a folder of Hugging Face weights. config: the target's config.json. Raises SettingsError naming what
    does not fit, or what no Hugging Face class can express.
    """
    opened: Opened = open_model(source, note=note, plugins=plugins)
    shape = read_shape(config)
    shape = replace(shape, vocab_size=shape.vocab_size or opened.model.shape.vocab_size)
    check_fits(shape, opened.model.shape, config)
    shape = with_attention_kept(shape.with_vocabulary(opened.tokenizer.vocab_size), opened.model.shape, keep_attention)
    model, moved = transplant(opened.model, shape, seed)
    show(moved)
    facts = {"converted from": source.absolute().name, "parameters": summary(model, moved)}
    files = {TABLE: json.dumps([vars(m) for m in moved], indent=1) + "\n"}
    adds_bos = opened.run.tokenizer.add_bos if opened.run else None
    return export(model, opened.tokenizer, out, facts=facts, files=files, adds_bos=adds_bos)


def summary(model: Model, moved: list[Moved]) -> str:
    sizes = {name: p.numel() for name, p in model.state_dict().items()}
    kinds: Counter[str] = Counter()
    for one in moved:
        kinds[one.how.partition(":")[0]] += sizes[one.name]
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())


def show(moved: list[Moved]) -> None:
    """One line for parameters that are alike in every layer."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for one in moved:
        parts = one.name.split(".")
        place = ".".join(["layers", "*", *parts[2:]]) if parts[0] == "layers" else one.name
        rows.setdefault((place, one.shape, one.how), []).append(parts[1] if parts[0] == "layers" else "")
    table = Table("parameter", "layers", "shape", "how")
    for (place, shape, how), layers in rows.items():
        table.add_row(place, ranges(layers), " x ".join(map(str, shape)), how)
    Console().print(table)


def ranges(numbers: list[str]) -> str:
    """0, 1, 2, 5 -> 0-2, 5"""
    runs: list[list[int]] = []
    for number in (int(n) for n in numbers if n):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
