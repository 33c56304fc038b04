"""A shape -> the config.json of a family, by the family's table, or why it has none; free of torch."""

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

from longfire.config.model_config import INIT_KEYS, ModelConfig, mixer_of
from longfire.huggingface.family import Family, Key, Settings, variant

# Settings that change training and not what a trained model computes: where a family has no key for
# one, an export leaves it out (and its card says so) instead of being refused.
TRAINING_ONLY = (
    "dropout",
    "embed_dropout",
    "residual_in_fp32",
    "attention.dropout",
    "use_l2warp",
    *INIT_KEYS,
)
# What each kind of rotary positions uses beside rope_theta; the rest of the settings is without
# effect then.
ROPE_USES = {
    "none": (),
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "yarn": (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_length", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
}


def whole(model_config: ModelConfig) -> ModelConfig:
    """The same model said in one way: every setting of its mixers, defaults too; those without
    effect at their default; variants numbered as they come."""
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch
    from longfire.mixers.mixer import read_mixer_config

    mixers: dict[str, Settings] = {}
    names = {}
    for name in dict.fromkeys(model_config.layer_types):
        mixer = MIXERS[mixer_of(name)]
        given = asdict(
            read_mixer_config(
                mixer, name, model_config.mixers.get(name, {}), model_config.hidden_size
            )
        )
        quiet(given, {f.name: f.default for f in fields(mixer.Config)}, model_config)
        names[name] = variant(mixers, given, mixer_of(name))
    plain = {f.name: f.default for f in fields(ModelConfig)}
    idle = {"pad_vocab_multiple": 1}  # vocab_size has its rows
    if model_config.mlp == "none":
        idle |= {"intermediate_size": plain["intermediate_size"], "mlp_bias": plain["mlp_bias"]}
    if model_config.norm == "rmsnorm" or not model_config.norm_affine:
        idle["norm_bias"] = plain["norm_bias"]
    return replace(
        model_config,
        **idle,
        layer_types=tuple(names[name] for name in model_config.layer_types),
        mixers=mixers,
    )


def quiet(given: Settings, defaults: Settings, model_config: ModelConfig) -> None:
    """Give settings of a mixer that have no effect their default, and 0 where it means the same."""
    for name in ("num_kv_heads", "num_v_heads"):  # 0 means as many as num_heads
        if name in given and given[name] == given["num_heads"]:
            given[name] = 0
    for name, size in {
        "intermediate_size": 2 * model_config.hidden_size,
        "dt_rank": -(-model_config.hidden_size // 16),
    }.items():
        if given.get(name) == size:  # Mamba's, as it is when it is not said
            given[name] = 0
    if "rope" not in given:
        return
    if given["head_dim"] * given["num_heads"] == model_config.hidden_size:
        given["head_dim"] = 0
    given["qk_norm_eps"] = (
        (given["qk_norm_eps"] or model_config.norm_eps) if given["qk_norm"] else 0.0
    )
    for name in [name for name in given if name.startswith("rope_")]:
        if name.removeprefix("rope_") not in ("theta", *ROPE_USES[given["rope"]]):
            given[name] = defaults[name]
    if given["rope"] == "none":
        given |= {name: defaults[name] for name in ("rope_theta", "rotary_fraction")}


def said_in_full(model_config: ModelConfig) -> ModelConfig:
    """A whole shape with numbers where 0 leaves them to others: some classes refuse a null."""
    mixers = {name: dict(given) for name, given in model_config.mixers.items()}
    for given in mixers.values():
        for name in ("num_kv_heads", "num_v_heads"):
            if given.get(name) == 0:
                given[name] = given["num_heads"]
        if "rope" in given and not given["head_dim"]:
            given["head_dim"] = model_config.hidden_size // given["num_heads"]
    return replace(model_config, mixers=mixers)


def values_of(model_config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Flat setting -> its value under each name of layer_types (of the model's own: under "")."""
    out = {
        name: {"": value}
        for name, value in asdict(model_config).items()
        if name not in ("mixers", "layer_types")
    }
    for name, given in model_config.mixers.items():
        for leaf, value in given.items():
            out.setdefault(f"{mixer_of(name)}.{leaf}", {})[name] = value
    return out


def refusals(family: Family, model_config: ModelConfig) -> Iterator[str]:
    """Why a whole shape cannot be one of this family; nothing if it can."""
    yield from family.layers.refusals(model_config, family)
    values = values_of(model_config)
    settings = {name: next(iter(said.values())) for name, said in values.items()}
    keys = {key.ours: key for key in family.keys}
    mixers = {key.partition(".")[0] for key in family.placed() if "." in key}
    for name, said in values.items():
        value, mixer = settings[name], name.partition(".")[0] if "." in name else ""
        key = keys.get(name)
        if name in family.layers.places or (mixer and mixer not in mixers) or idle(name, values):
            continue  # `layers` has spoken
        if name in INIT_KEYS:
            continue  # a trained model has no use for how it began
        if len(set(map(repr, said.values()))) > 1:
            yield (
                ", ".join(f"{full}.{name.partition('.')[2]} = {v!r}" for full, v in said.items())
                + ": its layers have one"
            )
        elif name in family.ours and value != family.ours[name]:
            yield f"{name} = {value!r}, it has {family.ours[name]!r} only"
        elif key and key.words is not None and value not in key.words.values():
            yield f"{name} = {value!r}, it has {' or '.join(map(repr, dict.fromkeys(key.words.values())))} only"
        elif key and key.writes is not None and key.reads(key.writes(settings), settings) != value:
            yield f"{name} = {value!r}, which its {key.theirs} cannot be"
        elif name not in family.placed() and name not in TRAINING_ONLY:
            yield f"{name} = {value!r}, which it does not know"
    yield from contradictions(family, settings)


def idle(name: str, values: dict[str, dict[str, Any]]) -> bool:
    """Whether a setting has no effect: the size of an MLP that is none, or one of rotary positions
    that theirs do not use."""
    if name == "intermediate_size":
        return values["mlp"][""] == "none"
    if not name.startswith("attention.rope_"):
        return False
    used = {leaf for kind in values["attention.rope"].values() for leaf in ROPE_USES[kind]}
    used |= {"theta"} if set(values["attention.rope"].values()) != {"none"} else set()
    return name.removeprefix("attention.rope_") not in used


def contradictions(family: Family, settings: Settings) -> Iterator[str]:
    """Settings of ours that are one of theirs, and differ."""
    said: dict[str, Key] = {}
    for key in family.keys:
        if not {key.ours, *key.when[:1]} <= settings.keys() or not key.applies(settings):
            continue
        if key.words is not None and settings[key.ours] not in key.words.values():
            continue
        first = said.setdefault(key.theirs, key)
        one, other = (k.said(settings) for k in (first, key))
        if one != other and None not in (one, other):
            yield f"{first.ours} = {settings[first.ours]!r} and {key.ours} = {settings[key.ours]!r}, which are one {key.theirs}"


def left_out(family: Family, model_config: ModelConfig) -> list[str]:
    """What a family's config cannot say of a shape, though it changes no logits: settings of
    training that are not at rest."""
    if not family.keys:  # our own class, whose config has every key
        return []
    values = values_of(whole(model_config))
    at_rest = (
        {f.name: f.default for f in fields(ModelConfig)}
        | {"attention.dropout": 0.0}
        | family.begins
    )
    placed = family.placed()
    said = {name: next(iter(values[name].values())) for name in TRAINING_ONLY if name in values}
    unplaced = {
        name: value for name, value in said.items() if name not in placed or name in INIT_KEYS
    }
    return [f"{name} = {value!r}" for name, value in unplaced.items() if value != at_rest[name]]


def config_of(
    family: Family, model_type: str, model_config: ModelConfig, length: int
) -> dict[str, Any]:
    """The config.json of a whole shape that the family can express, without what is not the
    shape's.

    length: written as the number of positions where the shape sets no limit, since their classes
    want one.
    """
    full = said_in_full(model_config)
    settings = {name: next(iter(said.values())) for name, said in values_of(full).items()}
    config: dict[str, Any] = {"model_type": model_type, "architectures": [family.architecture]}
    said = {name: allowed[0] for name, allowed in family.fixed.items() if None not in allowed}
    for key in family.keys:
        if key.applies(settings):
            value = key.said(settings)
            said[key.theirs] = said.get(key.theirs) if value is None else value
    for key in family.keys:
        if key.ours == "max_position_embeddings" and said[key.theirs] is None:
            said[key.theirs] = length
    if family.both_spellings:
        said |= {older: said[name] for older, name in family.older.items() if name in said}
    for name, value in said.items():
        outer, dot, leaf = name.partition(".")
        if not dot:
            config[name] = value
        elif value is not None:
            config.setdefault(outer, {})[leaf] = value
    return older_too(config | family.layers.write(full, family))


def older_too(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with rotary positions as readers before transformers 5 look for them
    (transformers 4, llama.cpp): theta at the top, the scaling in rope_scaling. They would take the
    default theta without a word."""
    rope = config.get("rope_parameters")
    if not rope:
        return config
    scaling = {
        name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")
    }
    kind = rope.get("rope_type", "default")
    older = (
        {"rope_type": kind, "type": kind, **scaling} if kind != "default" else None
    )  # "type": before 4.43
    return {**config, "rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": older}
