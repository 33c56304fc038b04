"""The starter recipe that `longfire init` writes: one TOML file, every line explained, the model in
it; free of torch."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from longfire.config.recipe import SHAPE_KEYS
from longfire.errors import SettingsError

COMMENT_COLUMN = 40


@dataclass(frozen=True)
class Size:
    """A size by name: the model, and how much of what it is trained with. Heads have 64 channels.

    The learning rate of 10m was tried on a hybrid. The others are starting points and not tuned:
    they fall with the width, as those of GPT-3 do (Brown 2020, table 2.1).
    """

    hidden_size: int
    layers: int
    vocab_size: int
    seq_len: int
    batch_size: int
    steps: int
    lr: float

    @property
    def heads(self) -> int:
        return self.hidden_size // 64


SIZES: Mapping[str, Size] = {
    "1m": Size(128, 4, 2048, 256, 8, 500, 4e-3),
    "4m": Size(192, 8, 4096, 256, 4, 500, 4e-3),
    "10m": Size(320, 8, 4096, 256, 2, 500, 4e-3),
    "30m": Size(512, 8, 8192, 512, 8, 2000, 2e-3),
    "100m": Size(768, 12, 16384, 1024, 16, 5000, 1e-3),
    "350m": Size(1024, 24, 32768, 2048, 8, 10000, 5e-4),
    "1b": Size(2048, 20, 32768, 2048, 4, 20000, 3e-4),
}
FOR_A_CPU = ("1m", "4m", "10m")  # which a laptop trains in minutes


@dataclass(frozen=True)
class Kind:
    """A kind of model: its layers by name, each mixer's own table, and what else it needs in
    [model]."""

    layer_types: tuple[str, ...]
    tables: Callable[[Size], dict[str, dict[str, object]]]
    keys: Mapping[str, object]
    about: str
    layers_factor: int = 1  # a block without an MLP has about half the parameters: twice as many


def kind(name: str, about: str, table: Callable[[Size], dict[str, object]], **keys: object) -> Kind:
    """A model of one mixer."""
    factor = 2 if keys.get("mlp") == "none" else 1
    return Kind((name,), lambda size: {name: table(size)}, keys, about, factor)


def heads(size: Size) -> dict[str, object]:
    return {"num_heads": size.heads}


KINDS: Mapping[str, Kind] = {
    "transformer": kind("attention", "softmax attention in every layer", heads),
    "hybrid": Kind(
        ("gla", "gla", "gla", "attention"),
        lambda size: {"gla": heads(size), "attention": heads(size)},
        {},
        "gated linear attention, softmax attention in every fourth layer",
    ),
    "gla": kind("gla", "gated linear attention", heads),
    "linear_attention": kind("linear_attention", "linear attention", heads),
    "retention": kind(
        "retention",
        "RetNet's retention",
        lambda size: {**heads(size), "expand_k": 0.5, "expand_v": 1.0},
    ),
    "gsa": kind("gsa", "gated slot attention", heads),
    "hgrn2": kind("hgrn2", "HGRN2", lambda size: {"expand_ratio": 64}),
    "mamba": kind("mamba", "Mamba's selective scan", lambda size: {"state_size": 16}, mlp="none"),
    "mamba2": kind(
        "mamba2", "Mamba-2", lambda size: {"head_dim": 64, "state_size": 64}, mlp="none"
    ),
    "delta_net": kind("delta_net", "DeltaNet", heads),
    "gated_delta_net": kind(
        "gated_delta_net",
        "Gated DeltaNet",
        lambda size: {"num_heads": max(1, size.hidden_size // 128), "head_dim": 64},
    ),
    "kda": kind("kda", "Kimi delta attention", lambda size: {**heads(size), "head_dim": 64}),
    "rwkv7": kind(
        "rwkv7",
        "RWKV-7",
        lambda size: {"head_dim": 64},
        mlp="channel_mix",
        norm="layernorm",
        norm_eps=1e-5,
        embed_norm=True,
        use_l2warp=True,
    ),
}
OTHER_NAMES = {
    "attention": "transformer",
    "gated_deltanet": "gated_delta_net",
    "deltanet": "delta_net",
}
# The help of the keys of mixers, in short: the mixers need torch, which is slow to import
MIXER_KEYS = {
    "num_heads": "heads",
    "head_dim": "channels of a head",
    "expand_k": "key size of all heads / hidden_size",
    "expand_v": "value size of all heads / hidden_size",
    "expand_ratio": "channels of a head",
    "state_size": "numbers that a channel's state has",
}


def chosen(known: Mapping[str, object], name: str, what: str, other: Mapping[str, str] = {}) -> str:
    """The key that a word of the command line means. Raises SettingsError naming the nearest and
    all."""
    word = name.lower().replace("-", "_")
    word = other.get(word, word)
    if word in known:
        return word
    near = get_close_matches(word, [*known, *other], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise SettingsError(f"--{what} {name}: unknown{hint}; there are {', '.join(known)}")


def starter(kind_name: str, size_name: str, data: tuple[str, ...]) -> str:
    """The text of the recipe. data: the entries of data.dataset."""
    size = SIZES[size_name]
    model = KINDS[kind_name]
    machine = "minutes on a laptop's CPU" if size_name in FOR_A_CPU else "meant for a GPU"
    lines = [
        f"# A starter recipe, written by `longfire init`: a {kind_name} of some {size_name} "
        f"parameters, {machine}.",
        "# Each key is a setting; on the command line it wins over this file: --training.steps "
        "100.",
        "# All settings: `longfire train --help all`. All keys of [model]: `longfire init "
        "--model-keys`.",
        *of_job(f"runs/{name_of(data[0])}-{kind_name}-{size_name}"),
        *of_model(model, size),
        *of_data(data, size),
        *of_training(size),
        *of_the_end(size, data),
    ]
    return "\n".join(lines) + "\n"


def name_of(source: str) -> str:
    """A name for a folder: of a file without its ending, of a folder or a dataset its last part, of
    a glob what is left of it."""
    last = source.rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^\w-]+", "-", last).strip("-") or "data"


def section(name: str, about: str) -> list[str]:
    return ["", commented(f"[{name}]", about)]


def line(key: str, value: object, about: str) -> str:
    return commented(f"{key} = {toml(value)}", about)


def commented(code: str, about: str) -> str:
    return f"{code:<{COMMENT_COLUMN - 1}} # {about}"


def toml(value: object) -> str:
    """A value as TOML; its texts and lists are those of JSON, but for characters that JSON splits
    in two."""
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def of_job(folder: str) -> list[str]:
    return [
        *section("job", "the run"),
        line(
            "dump_folder",
            folder,
            "everything it writes: checkpoints, metrics.jsonl, report.html, hf/",
        ),
    ]


def of_model(model: Kind, size: Size) -> list[str]:
    lines = [
        *section("model", model.about),
        line("hidden_size", size.hidden_size, "channels of the residual stream"),
        line("num_hidden_layers", size.layers * model.layers_factor, "blocks"),
        line("layer_types", model.layer_types, "the mixer of each layer; a shorter list repeats"),
        line("tie_word_embeddings", True, "embedding and head share one matrix"),
        *(
            line(key, value, SHAPE_KEYS[f"model.{key}"].metadata["help"])
            for key, value in model.keys.items()
        ),
    ]
    for name, table in model.tables(size).items():
        lines += section(f"model.{name}", f"what the {name} layers have of their own")
        lines += [line(key, value, MIXER_KEYS[key]) for key, value in table.items()]
    return lines


def of_data(data: tuple[str, ...], size: Size) -> list[str]:
    return [
        *section("data", "the text"),
        line(
            "dataset",
            data,
            "files, folders, globs, datasets of the hub; `embedded`: Python's own source",
        ),
        line(
            "validation_fraction",
            0.05,
            "share of it that training never sees: what the model is evaluated on",
        ),
        *section("tokenizer", "how text becomes ids"),
        line(
            "path",
            "train",
            "a byte-level BPE of this text; or `bytes`, a tokenizer.json, a name of the hub",
        ),
        line("train_vocab_size", size.vocab_size, "entries of its vocabulary"),
    ]


def of_training(size: Size) -> list[str]:
    return [
        *section("training", "the steps"),
        line("seq_len", size.seq_len, "tokens of a sequence"),
        line("batch_size", size.batch_size, "sequences at a time on one device"),
        line(
            "gradient_accumulation_steps",
            1,
            "such batches in a step; more: a larger step, no more memory",
        ),
        line("steps", size.steps, "optimizer steps; the schedule below ends with the last one"),
        line("seed", 42, "of initialisation, data order and sampling: the same seed, the same run"),
        *section("optimizer", "AdamW"),
        line("lr", size.lr, "peak learning rate; lower it if the loss jumps"),
        line("weight_decay", 0.1, "of matrices"),
        *section("lr_scheduler", "how the learning rate moves"),
        line("name", "cosine", "or linear, wsd, constant"),
        line("warmup_steps", min(1000, size.steps // 10), "steps in which it rises to its peak"),
    ]


def of_the_end(size: Size, data: tuple[str, ...]) -> list[str]:
    prompt = "def " if data == ("embedded",) else "\n"
    interval = size.steps // 5
    return [
        *section("checkpoint", "what is kept on disk"),
        line(
            "interval",
            interval,
            "save every so many steps; the same command resumes from the newest",
        ),
        line("keep_latest_k", 2, "how many are kept"),
        line("export", True, "at the end write Hugging Face weights to hf/ of the run folder"),
        *section("eval", "on the validation text"),
        line("interval", interval, "evaluate every so many steps, and at the end"),
        line("tokens", 32768, "tokens that an evaluation reads, at most"),
        line("sample_prompt", prompt, "at the end show how the model continues this"),
        *section("metrics", "what is shown"),
        line("log_freq", 10, "print every so many steps"),
    ]
