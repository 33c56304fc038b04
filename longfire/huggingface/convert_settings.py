"""The config of a converted model: what the target's config.json sets, and the source's settings
for everything else.

The source's weights were trained with its norm_eps, its rotary base, its biases: a default of the
target's config is no reason to compute with another one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

from longfire.config.init_rules import INIT_KEYS, check_init
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.huggingface.convert_report import Setting
from longfire.huggingface.families import family_of
from longfire.huggingface.family import Config, Family, Settings, leaf_of
from longfire.huggingface.family_layers import Listed, tables_of
from longfire.huggingface.family_reading import asked_of
from longfire.huggingface.family_writing import first_values, normalised, values_of
from longfire.huggingface.own_config import is_own_export, keys_of_model_config

# Never the source's: sizes and layers, which the target decides, and how fresh parameters begin.
TARGETS_OWN = frozenset(
    (
        "hidden_size",
        "num_hidden_layers",
        "layer_types",
        "mixers",
        "vocab_size",
        "pad_vocab_multiple",
        "initializer_range",
        *INIT_KEYS,
    )
)
# Settings of a replaced mixer that are not reported: its tensors show them.
SIZES = ("num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class Explicit:
    """The settings that a config.json sets itself; every other one is a default.

    plain: the model's own. tables: of each name in layer_types.
    """

    plain: frozenset[str]
    tables: Mapping[str, frozenset[str]]


def explicit_in(
    config: Config,
    model_config: ModelConfig,
    source: ModelConfig,
    where: str,
) -> Explicit:
    """What a config sets, ours or a Hugging Face family's. A family's counts as setting also what
    its class cannot have as the source has it.

    model_config: what was read of it.
    """
    if is_own_export(config):
        return explicit_in_ours(keys_of_model_config(config, where))
    if config.get("model_type", "longfire") == "longfire":
        return explicit_in_ours(config)
    family = family_of(config, where)
    asked = asked_of(family, config, where)
    names = explicit_names(family, asked, model_config, source)
    tables = {}
    for name in dict.fromkeys(model_config.layer_types):
        tables[name] = leaves(names, mixer_of(name))
    if isinstance(family.layers, Listed):
        tables |= explicit_in_attn(family, family.layers, asked, model_config)
    plain = frozenset(name for name in names if "." not in name)
    return Explicit(plain, tables)


def explicit_names(
    family: Family,
    asked: Config,
    model_config: ModelConfig,
    source: ModelConfig,
) -> set[str]:
    """Flat names of the settings that a family's config sets. asked: its keys."""
    names = set(family.ours)
    settings = first_values(values_of(normalised(model_config)))
    source_values = values_of(normalised(source))
    for key in family.keys:
        values = source_values.get(key.ours, {}).values()
        if not all(key.has_choice(value) for value in values):
            names.add(key.ours)
        if key.theirs not in asked or not key.applies(settings):
            continue
        # null where null is the default too sets nothing
        if asked[key.theirs] is not None or key.default is not None:
            names.add(key.ours)
    is_listed = isinstance(family.layers, Listed)
    if not is_listed and not asked.keys().isdisjoint(family.layers.reads):
        names |= set(family.layers.places)
    return names


def explicit_in_ours(config: Config) -> Explicit:
    """What a config of ours sets."""
    tables = {}
    for name, table in config.items():
        if isinstance(table, dict):
            tables[name] = frozenset(table)
    return Explicit(frozenset(config.keys() - tables.keys()), tables)


def explicit_in_attn(
    family: Family,
    listed: Listed,
    asked: Config,
    model_config: ModelConfig,
) -> dict[str, frozenset[str]]:
    """Of each name of softmax layers: what its entry of fla's `attn` sets, and what its class has
    with one value only."""
    fixed = set(listed.fixed)
    tables = {}
    for name in model_config.layer_types:
        if name != family.mixer:
            tables[name] = leaves(fixed, "attention")
    for entry in tables_of(asked.get("attn") or None):
        names = {key.ours for key in listed.keys if entry.get(key.theirs) is not None}
        for layer in entry.get("layers", []):
            tables[model_config.layer_types[layer]] = leaves(fixed | names, "attention")
    return tables


def leaves(names: set[str], mixer: str) -> frozenset[str]:
    """The settings of one mixer: attention.rope_theta -> rope_theta"""
    return frozenset(leaf_of(name) for name in names if name.startswith(f"{mixer}."))


def inherit(
    model_config: ModelConfig,
    explicit: Explicit,
    source: ModelConfig,
    kept: tuple[int, ...],
    where: str,
) -> ModelConfig:
    """The target's model config with the source's settings where its config does not set them, and
    the source's mixers in `kept` layers.

    where: the target's config. Raises SettingsError naming a layer that does not exist, and
    settings that do not go together.
    """
    check_kept(model_config, source, kept, where)
    plain = {name: getattr(source, name) for name in inheritable(model_config, explicit, source)}
    if "vocab_size" not in explicit.plain or not model_config.vocab_size:
        plain["vocab_size"] = source.vocab_size
    types: list[str] = []
    mixers: dict[str, Settings] = {}
    for layer, (name, their_name) in enumerate(zip(model_config.layer_types, source.layer_types)):
        if layer in kept:
            name = their_name
            table = table_of(source, layer)
        elif mixer_of(name) == mixer_of(their_name):
            table = table_of(source, layer)
            own = full_table(model_config, name)
            own_leaves = explicit.tables.get(name, frozenset())
            table |= {leaf: value for leaf, value in own.items() if leaf in own_leaves}
        else:
            table = dict(model_config.mixers.get(name, {}))
        types.append(add_table(mixers, name, table))
    try:
        made = replace(model_config, **plain, layer_types=tuple(types), mixers=mixers)
        check_init(made)
    except SettingsError as error:
        message = str(error).replace("model config:", f"{where}:", 1)
        raise SettingsError(
            f"{message} (settings that the config does not name are the source's)"
        ) from error
    return made


def inheritable(
    model_config: ModelConfig,
    explicit: Explicit,
    source: ModelConfig,
) -> Iterator[str]:
    """Names of the model's own settings that the target takes from the source."""
    has_other_mlp = "mlp" in explicit.plain and model_config.mlp != source.mlp
    for field in fields(ModelConfig):
        name = field.name
        if name in TARGETS_OWN or name in explicit.plain:
            continue
        if name in ("mlp_bias", "intermediate_size") and has_other_mlp:
            continue  # of an MLP that the target does not have
        if name == "block" and model_config.mlp == "none" and has_other_mlp:
            continue  # without an MLP nothing is beside the mixer
        is_about_positions = name == "max_position_embeddings" and source.learned_positions
        if is_about_positions and "learned_positions" in explicit.plain:
            continue  # positions that are left behind, or whose number the target sets itself
        yield name


def check_kept(
    model_config: ModelConfig,
    source: ModelConfig,
    kept: tuple[int, ...],
    where: str,
) -> None:
    """Raises SettingsError where the attention of these layers cannot be kept."""
    last = min(model_config.num_hidden_layers, source.num_hidden_layers) - 1
    wrong = [layer for layer in kept if not 0 <= layer <= last]
    if wrong:
        raise SettingsError(
            f"--keep-attention {','.join(map(str, wrong))}: the layers are 0 to {last}"
        )
    with_norm = [layer for layer in kept if table_of(source, layer).get("qk_norm")]
    if with_norm and source.norm_affine and not model_config.norm_affine:
        raise SettingsError(
            f"{where}: norm_affine = false, but the attention that is kept in layer "
            f"{with_norm[0]} has norms with weights; remove norm_affine"
        )


def table_of(model_config: ModelConfig, layer: int) -> Settings:
    """Every setting of a layer's mixer, defaults too; those without effect at their default."""
    full = normalised(model_config)
    return dict(full.mixers[full.layer_types[layer]])


def full_table(model_config: ModelConfig, name: str) -> Settings:
    """Every setting of a name in layer_types, as it was set or by default."""
    from longfire.config.strict import read_own_settings
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch

    given = model_config.mixers.get(name, {})
    return asdict(read_own_settings(MIXERS[mixer_of(name)], name, given, model_config.hidden_size))


def add_table(
    mixers: dict[str, Settings],
    name: str,
    table: Settings,
) -> str:
    """Add a table to `mixers`. Returns its name: the wanted one, or one with the same table, or the
    first that is free."""
    mixer = mixer_of(name)
    same = [known for known, given in mixers.items() if mixer_of(known) == mixer and given == table]
    if name not in mixers or name in same:
        mixers[name] = table
        return name
    if same:
        return same[0]
    number = 2
    while f"{mixer}:{number}" in mixers:
        number += 1
    mixers[f"{mixer}:{number}"] = table
    return f"{mixer}:{number}"


class Configs(NamedTuple):
    """read: the target's config as its file describes it. made: with what it takes from the source.
    source: the source's."""

    read: ModelConfig
    made: ModelConfig
    source: ModelConfig


def compared(
    read: ModelConfig,
    made: ModelConfig,
    source: ModelConfig,
) -> list[Setting]:
    """Settings that the new model took from the source, or has otherwise."""
    found = list(compared_plain(normalised(read), normalised(made), normalised(source)))
    layers: dict[tuple[str, str, str, str], list[int]] = {}
    settings: dict[tuple[str, str, str, str], Setting] = {}
    for layer in range(made.num_hidden_layers):
        for setting in compared_layer(Configs(read, made, source), layer):
            key = (setting.name, setting.how, repr(setting.value), repr(setting.source))
            layers.setdefault(key, []).append(layer)
            settings[key] = setting
    for key, setting in settings.items():
        found.append(replace(setting, layers=tuple(layers[key])))
    return found


def compared_plain(
    read: ModelConfig,
    made: ModelConfig,
    source: ModelConfig,
) -> Iterator[Setting]:
    """The same of the model's own settings."""
    for field in fields(ModelConfig):
        name = field.name
        if name in TARGETS_OWN and name != "vocab_size":
            continue
        value = getattr(made, name)
        theirs = getattr(source, name)
        if value != theirs:
            yield Setting(name, "differs", value, theirs)
        elif getattr(read, name) != value and name != "vocab_size":
            yield Setting(name, "inherited", value, theirs)


def compared_layer(configs: Configs, layer: int) -> Iterator[Setting]:
    """The same of the settings of a layer's mixer."""
    values = table_of(configs.made, layer)
    their_values = table_of(configs.source, layer)
    mixer = mixer_of(configs.made.layer_types[layer])
    their_mixer = mixer_of(configs.source.layer_types[layer])
    if mixer != their_mixer:
        for leaf in reported(their_mixer, their_values):
            theirs = their_values[leaf]
            if leaf not in values or values[leaf] != theirs:
                yield Setting(f"{their_mixer}.{leaf}", "left behind", mixer, theirs)
        return
    read_values = table_of(configs.read, layer)
    is_same_mixer = mixer_of(configs.read.layer_types[layer]) == mixer
    for leaf, value in values.items():
        theirs = their_values[leaf]
        if value != theirs:
            yield Setting(f"{mixer}.{leaf}", "differs", value, theirs)
        elif is_same_mixer and read_values[leaf] != value:
            yield Setting(f"{mixer}.{leaf}", "inherited", value, theirs)


def reported(mixer: str, table: Settings) -> Iterator[str]:
    """Settings of a mixer that do not have their default, and the rotary positions that it has."""
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch

    for field in fields(MIXERS[mixer].Config):
        name = field.name
        value = table[name]
        is_rotary = name in ("rope", "rope_theta") and table["rope"] != "none"
        if is_rotary or (name not in (*SIZES, "rope") and value != field.default):
            yield name
