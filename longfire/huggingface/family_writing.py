"""A model config -> the config.json of a family, by the family's table, or why it has none; free of
torch."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, fields, replace

from longfire.config.init_rules import INIT_KEYS
from longfire.config.model_config import ModelConfig, leave_out_rare, mixer_of
from longfire.huggingface.family import Config, Family, Key, Settings, leaf_of
from longfire.huggingface.family_layers import variant

# Settings that change training and not what a trained model computes. Where a family has no key for
# one, an export leaves it out (and its card names it) instead of being refused.
TRAINING_ONLY = (
    "dropout",
    "embed_dropout",
    "residual_in_fp32",
    "attention.dropout",
    "use_l2warp",
    *INIT_KEYS,
)
# What each kind of rotary positions uses beside rope_theta; its other settings have no effect.
ROPE_USES: dict[str, tuple[str, ...]] = {
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
    "longrope": (
        "factor",
        "original_length",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "llama3": (
        "factor",
        "original_length",
        "low_freq_factor",
        "high_freq_factor",
    ),
}
DEFAULTS: Settings = {field.name: field.default for field in fields(ModelConfig)}
HEAD_COUNTS = ("num_kv_heads", "num_v_heads")  # 0 means as many as num_heads

# Flat setting -> its value under each name of layer_types (of the model's own settings: under "").
Values = Mapping[str, Settings]


def normalised(model_config: ModelConfig) -> ModelConfig:
    """The same model, written in one way: with every setting of its mixers, defaults too; those
    without effect at their default; variants numbered in their order."""
    from longfire.config.strict import read_own_settings
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch

    mixers: dict[str, Settings] = {}
    names: dict[str, str] = {}
    for name in dict.fromkeys(model_config.layer_types):
        mixer = MIXERS[mixer_of(name)]
        given = model_config.mixers.get(name, {})
        read = read_own_settings(mixer, name, given, model_config.hidden_size)
        settings = asdict(read)
        defaults = {field.name: field.default for field in fields(mixer.Config)}
        reset_without_effect(settings, defaults, model_config)
        names[name] = variant(mixers, settings, mixer_of(name))
    layer_types = tuple(names[name] for name in model_config.layer_types)
    changed = replace(
        model_config,
        layer_types=layer_types,
        mixers=mixers,
        pad_vocab_multiple=1,  # vocab_size includes the padding
    )
    if changed.mlp == "none":
        changed = replace(
            changed,
            intermediate_size=DEFAULTS["intermediate_size"],
            mlp_bias=DEFAULTS["mlp_bias"],
        )
    if changed.norm == "rmsnorm" or not changed.norm_affine:
        changed = replace(changed, norm_bias=DEFAULTS["norm_bias"])
    return changed


def reset_without_effect(
    settings: Settings,
    defaults: Settings,
    model_config: ModelConfig,
) -> None:
    """Give settings of a mixer that have no effect their default, and 0 where it means the same."""
    for name in HEAD_COUNTS:
        if name in settings and settings[name] == settings["num_heads"]:
            settings[name] = 0
    # Mamba's sizes, as they are when they are not given.
    if settings.get("intermediate_size") == 2 * model_config.hidden_size:
        settings["intermediate_size"] = 0
    if settings.get("dt_rank") == -(-model_config.hidden_size // 16):
        settings["dt_rank"] = 0
    if "rope" in settings:
        reset_attention(settings, defaults, model_config)


def reset_attention(
    settings: Settings,
    defaults: Settings,
    model_config: ModelConfig,
) -> None:
    """The same for settings that only softmax attention has."""
    if settings["head_dim"] * settings["num_heads"] == model_config.hidden_size:
        settings["head_dim"] = 0
    if not settings["qk_norm"]:
        settings["qk_norm_eps"] = 0.0
    elif not settings["qk_norm_eps"]:
        settings["qk_norm_eps"] = model_config.norm_eps
    used = {"rope_theta"}
    for leaf in ROPE_USES[settings["rope"]]:
        used.add(f"rope_{leaf}")
    for name in settings:
        if name.startswith("rope_") and name not in used:
            settings[name] = defaults[name]
    if settings["rope"] == "none":
        settings["rope_theta"] = defaults["rope_theta"]
        settings["rotary_fraction"] = defaults["rotary_fraction"]


def with_all_sizes(model_config: ModelConfig) -> ModelConfig:
    """A normalised config with numbers where 0 means a default: some classes refuse a null."""
    mixers = deepcopy(model_config.mixers)
    for given in mixers.values():
        for name in HEAD_COUNTS:
            if given.get(name) == 0:
                given[name] = given["num_heads"]
        if "rope" in given and not given["head_dim"]:
            given["head_dim"] = model_config.hidden_size // given["num_heads"]
    return replace(model_config, mixers=mixers)


def values_of(model_config: ModelConfig) -> dict[str, Settings]:
    """Flat setting -> its value under each name of layer_types (of the model's own: under "")."""
    values: dict[str, Settings] = {}
    keys = asdict(model_config)
    leave_out_rare(keys)
    for name, value in keys.items():
        if name in ("mixers", "layer_types"):
            continue
        if value or name != "mlps":
            values[name] = {"": value}
    for name, given in model_config.mixers.items():
        for leaf, value in given.items():
            values.setdefault(f"{mixer_of(name)}.{leaf}", {})[name] = value
    return values


def first_values(values: Values) -> Settings:
    """Flat setting -> its value, of several the first."""
    found: Settings = {}
    for name, by_name in values.items():
        found[name] = next(iter(by_name.values()))
    return found


def refusals(family: Family, model_config: ModelConfig) -> Iterator[str]:
    """Why a family cannot express a normalised model config; nothing if it can."""
    yield from family.layers.refusals(model_config, family.mixer)
    values = values_of(model_config)
    settings = first_values(values)
    mixers = {key.partition(".")[0] for key in family.placed() if "." in key}
    for name in values:
        has_mixer = "." not in name or name.partition(".")[0] in mixers
        if name in family.layers.places or not has_mixer:
            continue  # what `layers` has refused
        if name in INIT_KEYS or is_idle(name, values):
            continue  # a trained model does not depend on how it began
        reason = refusal(family, name, values, settings)
        if reason:
            yield reason
    yield from contradictions(family, settings)


def refusal(
    family: Family,
    name: str,
    values: Values,
    settings: Settings,
) -> str:
    """Why a family cannot have the value of a setting; "" if it can."""
    value = settings[name]
    if len(set(map(repr, values[name].values()))) > 1:
        each_layer: list[str] = []
        for full_name, own in values[name].items():
            each_layer.append(f"{full_name}.{leaf_of(name)} = {own!r}")
        return f"{', '.join(each_layer)}: its layers have one"
    if name in family.ours and value != family.ours[name]:
        return f"{name} = {value!r}, it has {family.ours[name]!r} only"
    key = last_key(family, name)
    if key and key.choices is not None and not key.has_choice(value):
        known = " or ".join(map(repr, dict.fromkeys(key.choices.values())))
        return f"{name} = {value!r}, it has {known} only"
    if key and key.reads and key.writes:
        as_read_again = key.reads(key.writes(settings), settings)
        if as_read_again != value:
            return f"{name} = {value!r}, which its {key.theirs} cannot be"
    if name not in family.placed() and name not in TRAINING_ONLY:
        return f"{name} = {value!r}, which it does not know"
    return ""


def last_key(family: Family, name: str) -> Key | None:
    """The key of one of our settings; of several the last one."""
    found = None
    for key in family.keys:
        if key.ours == name:
            found = key
    return found


def is_idle(name: str, values: Values) -> bool:
    """Whether a setting has no effect: the size of an MLP that does not exist, or a setting of
    other rotary positions."""
    if name == "intermediate_size":
        return values["mlp"][""] == "none"
    if not name.startswith("attention.rope_"):
        return False
    used: set[str] = set()
    for kind in values["attention.rope"].values():
        used.update(ROPE_USES[kind])
        if kind != "none":
            used.add("theta")
    return name.removeprefix("attention.rope_") not in used


def contradictions(family: Family, settings: Settings) -> Iterator[str]:
    """Settings of ours that are one key of theirs, and differ."""
    first_keys: dict[str, Key] = {}
    for key in family.keys:
        is_known = {key.ours, *key.when[:1]} <= settings.keys()
        if not is_known or not key.applies(settings) or not key.has_choice(settings[key.ours]):
            continue
        first = first_keys.setdefault(key.theirs, key)
        one = first.written(settings)
        other = key.written(settings)
        if one != other and None not in (one, other):
            yield (
                f"{first.ours} = {settings[first.ours]!r} and {key.ours} = "
                f"{settings[key.ours]!r}, which are one {key.theirs}"
            )


def left_out(family: Family, model_config: ModelConfig) -> list[str]:
    """The settings of training that a family's config has no key for, unless they have their
    default. They change no logits."""
    if not family.keys:  # our own class, whose config has every key
        return []
    settings = first_values(values_of(normalised(model_config)))
    defaults = DEFAULTS | {"attention.dropout": 0.0} | family.initial
    placed = family.placed()
    found: list[str] = []
    for name in TRAINING_ONLY:
        has_key = name in placed and name not in INIT_KEYS
        if name in settings and not has_key and settings[name] != defaults[name]:
            found.append(f"{name} = {settings[name]!r}")
    return found


def config_of(
    family: Family,
    model_type: str,
    model_config: ModelConfig,
    length: int,
) -> Config:
    """The config.json of a normalised model config that the family can express: the keys that
    describe the model.

    length: written as the number of positions where the config sets no limit, since their classes
    need one.
    """
    model_config = with_all_sizes(model_config)
    written = written_keys(family, first_values(values_of(model_config)), length)
    config: Config = {"model_type": model_type, "architectures": [family.architecture]}
    for name, value in written.items():
        table, dot, leaf = name.partition(".")
        if not dot:
            config[name] = value
        elif value is not None:
            config.setdefault(table, {})[leaf] = value
    return with_older_rope(config | family.layers.write(model_config))


def written_keys(
    family: Family,
    settings: Settings,
    length: int,
) -> Config:
    """Their flat keys and values for our settings."""
    written: Config = {}
    for name, allowed in family.fixed.items():
        if None not in allowed:
            written[name] = allowed[0]
    for key in family.keys:
        if key.applies(settings):
            value = key.written(settings)
            if value is None:
                value = written.get(key.theirs)
            written[key.theirs] = value
    for key in family.keys:
        if key.ours == "max_position_embeddings" and written[key.theirs] is None:
            written[key.theirs] = length
    if family.both_spellings:
        for older, name in family.older.items():
            if name in written:
                written[older] = written[name]
    return written


def with_older_rope(config: Config) -> Config:
    """The same config with rotary positions also where readers before transformers 5 look for them
    (transformers 4, llama.cpp): theta at the top, the scaling in rope_scaling. Without these they
    would take the default theta, without a warning."""
    rope = config.get("rope_parameters")
    if not rope:
        return config
    kind = rope.get("rope_type", "default")
    older = None
    if kind != "default":
        older = {"rope_type": kind, "type": kind}  # "type": before transformers 4.43
        for name, value in rope.items():
            if name not in ("rope_theta", "rope_type"):
                older[name] = value
    return {
        **config,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": older,
    }
