"""The shape of a converted model: what the target's config.json says, and the source's settings
wherever it says nothing.

The source's weights were trained with its norm_eps, its rotary base, its biases: a default of the
target's config is no reason to compute with another one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from longfire.config.model_config import INIT_KEYS, ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.huggingface.convert_report import Setting
from longfire.huggingface.families import family_of
from longfire.huggingface.family import Family, Listed
from longfire.huggingface.family_reading import asked_of
from longfire.huggingface.family_writing import values_of, whole
from longfire.huggingface.own_config import is_own_export, keys_of_model_config

Table = dict[str, Any]

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
# Of a mixer that is replaced, what its tensors show anyway.
SIZES = ("num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class Said:
    """The settings that a config.json says itself; every other one is a default.

    tables: the same of each name in layer_types.
    """

    plain: frozenset[str]
    tables: dict[str, frozenset[str]]


def said_in(config: Table, model_config: ModelConfig, source: ModelConfig, where: str) -> Said:
    """What a config says, ours or a Hugging Face family's. A family's says too what its class
    cannot have as the source has it.

    shape: what was read of it.
    """
    if is_own_export(config):
        return said_in_ours(keys_of_model_config(config, where))
    if config.get("model_type", "longfire") == "longfire":
        return said_in_ours(config)
    family = family_of(config, where)
    asked = asked_of(family, config, where)
    said = set(family.ours)
    settings = {
        name: next(iter(values.values())) for name, values in values_of(whole(model_config)).items()
    }
    source_values = values_of(whole(source))
    for key in family.keys:
        theirs = source_values.get(key.ours, {})
        if key.words is not None and not set(theirs.values()) <= set(key.words.values()):
            said.add(key.ours)
        # null where null is the default too says nothing
        is_there = key.theirs in asked and (
            asked[key.theirs] is not None or key.default is not None
        )
        if is_there and key.applies(settings):
            said.add(key.ours)
    if not isinstance(family.layers, Listed) and not asked.keys().isdisjoint(family.layers.reads):
        said |= set(family.layers.places)
    tables = {
        name: leaves(said, mixer_of(name)) for name in dict.fromkeys(model_config.layer_types)
    }
    if isinstance(family.layers, Listed):
        tables |= said_in_attn(family, family.layers, asked, model_config)
    return Said(frozenset(name for name in said if "." not in name), tables)


def said_in_ours(config: dict[str, Any]) -> Said:
    tables = {name: frozenset(table) for name, table in config.items() if isinstance(table, dict)}
    return Said(frozenset(config.keys() - tables.keys()), tables)


def said_in_attn(
    family: Family, listed: Listed, asked: Table, model_config: ModelConfig
) -> dict[str, frozenset[str]]:
    """Of each name of softmax layers: what its entry of fla's `attn` says, and what its class has
    with one value only."""
    fixed = set(listed.fixed)
    softmax = [name for name in model_config.layer_types if name != family.mixer]
    tables = {name: leaves(fixed, "attention") for name in softmax}
    attn = asked.get("attn")
    for entry in attn if isinstance(attn, list) else [attn] if attn else []:
        said = {key.ours for key in listed.keys if entry.get(key.theirs) is not None}
        for layer in entry.get("layers", []):
            tables[model_config.layer_types[layer]] = leaves(fixed | said, "attention")
    return tables


def leaves(said: set[str], mixer: str) -> frozenset[str]:
    """attention.rope_theta -> rope_theta"""
    return frozenset(name.partition(".")[2] for name in said if name.startswith(f"{mixer}."))


def inherit(
    model_config: ModelConfig, said: Said, source: ModelConfig, kept: tuple[int, ...], where: str
) -> ModelConfig:
    """The target's shape with the source's settings where its config does not say them, and the
    source's mixers in `kept` layers.

    where: the target's config. Raises SettingsError naming a layer that is none, and settings that
    do not go together.
    """
    check_kept(model_config, source, kept, where)
    plain = {name: getattr(source, name) for name in inheritable(model_config, said, source)}
    if "vocab_size" not in said.plain or not model_config.vocab_size:
        plain["vocab_size"] = source.vocab_size
    types: list[str] = []
    mixers: dict[str, Table] = {}
    for layer, (name, their_name) in enumerate(zip(model_config.layer_types, source.layer_types)):
        if layer in kept:
            name, table = their_name, table_of(source, layer)
        elif mixer_of(name) == mixer_of(their_name):
            explicit = said.tables.get(name, frozenset())
            mine = full_table(model_config, name)
            table = table_of(source, layer) | {
                leaf: value for leaf, value in mine.items() if leaf in explicit
            }
        else:
            table = model_config.mixers.get(name, {})
        types.append(placed_under(mixers, name, table))
    try:
        return replace(model_config, **plain, layer_types=tuple(types), mixers=mixers)
    except SettingsError as error:
        said_wrong = str(error).replace("model config:", f"{where}:", 1)
        raise SettingsError(
            f"{said_wrong} (what the config does not say is as in the source)"
        ) from error


def inheritable(model_config: ModelConfig, said: Said, source: ModelConfig) -> Iterator[str]:
    """Names of the model's own settings that the target takes from the source."""
    other_mlp = "mlp" in said.plain and model_config.mlp != source.mlp
    for name in (f.name for f in fields(ModelConfig)):
        if name in TARGETS_OWN or name in said.plain:
            continue
        if name in ("mlp_bias", "intermediate_size") and other_mlp:
            continue  # of an MLP that is not there
        if name == "block" and model_config.mlp == "none" and other_mlp:
            continue  # without an MLP nothing is beside the mixer
        if (
            name == "max_position_embeddings"
            and source.learned_positions
            and "learned_positions" in said.plain
        ):
            continue  # the number of positions that are left behind, or that the target says itself
        yield name


def check_kept(
    model_config: ModelConfig, source: ModelConfig, kept: tuple[int, ...], where: str
) -> None:
    last = min(model_config.num_hidden_layers, source.num_hidden_layers) - 1
    wrong = [layer for layer in kept if not 0 <= layer <= last]
    if wrong:
        raise SettingsError(
            f"--keep-attention {','.join(map(str, wrong))}: the layers are 0 to {last}"
        )
    normed = [layer for layer in kept if table_of(source, layer).get("qk_norm")]
    if normed and source.norm_affine and not model_config.norm_affine:
        raise SettingsError(
            f"{where}: norm_affine = false, but the attention that is kept in layer {normed[0]} has norms with weights; "
            "remove norm_affine"
        )


def table_of(model_config: ModelConfig, layer: int) -> Table:
    """Every setting of a layer's mixer, defaults too; those without effect at their default."""
    full = whole(model_config)
    return full.mixers[full.layer_types[layer]]


def full_table(model_config: ModelConfig, name: str) -> Table:
    """Every setting of a name in layer_types, as it was said or by default."""
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch
    from longfire.mixers.mixer import read_mixer_config

    given = model_config.mixers.get(name, {})
    return asdict(read_mixer_config(MIXERS[mixer_of(name)], name, given, model_config.hidden_size))


def placed_under(mixers: dict[str, Table], name: str, table: Table) -> str:
    """The name under which a table stands in `mixers`: the wanted one, or one with the same table,
    or the first that is free."""
    mixer = mixer_of(name)
    same = [known for known, given in mixers.items() if mixer_of(known) == mixer and given == table]
    if name in mixers and name not in same:
        number = 2
        while f"{mixer}:{number}" in mixers:
            number += 1
        name = same[0] if same else f"{mixer}:{number}"
    mixers[name] = table
    return name


def compared(read: ModelConfig, made: ModelConfig, source: ModelConfig) -> list[Setting]:
    """Settings that the new model took from the source, or has otherwise. read: the target's shape
    as its config says it."""
    found = list(plain_compared(whole(read), whole(made), whole(source)))
    layers: dict[tuple[str, str, str, str], list[int]] = {}
    values: dict[tuple[str, str, str, str], Setting] = {}
    for layer in range(made.num_hidden_layers):
        for one in layer_compared(read, made, source, layer):
            key = (one.name, one.how, repr(one.value), repr(one.source))
            layers.setdefault(key, []).append(layer)
            values[key] = one
    return [*found, *(replace(one, layers=tuple(layers[key])) for key, one in values.items())]


def plain_compared(read: ModelConfig, made: ModelConfig, source: ModelConfig) -> Iterator[Setting]:
    for name in (f.name for f in fields(ModelConfig)):
        if name in TARGETS_OWN and name != "vocab_size":
            continue
        was, value, theirs = (getattr(model_config, name) for model_config in (read, made, source))
        if value != theirs:
            yield Setting(name, "differs", value, theirs)
        elif was != value and name != "vocab_size":
            yield Setting(name, "inherited", value, theirs)


def layer_compared(
    read: ModelConfig, made: ModelConfig, source: ModelConfig, layer: int
) -> Iterator[Setting]:
    was, value, theirs = (table_of(model_config, layer) for model_config in (read, made, source))
    read_mixer, mixer, their_mixer = (
        mixer_of(model_config.layer_types[layer]) for model_config in (read, made, source)
    )
    if mixer != their_mixer:
        for leaf in saying(their_mixer, theirs):
            if leaf not in value or value[leaf] != theirs[leaf]:
                yield Setting(f"{their_mixer}.{leaf}", "left behind", mixer, theirs[leaf])
        return
    for leaf in value:
        if value[leaf] != theirs[leaf]:
            yield Setting(f"{mixer}.{leaf}", "differs", value[leaf], theirs[leaf])
        elif read_mixer == mixer and was[leaf] != value[leaf]:
            yield Setting(f"{mixer}.{leaf}", "inherited", value[leaf], theirs[leaf])


def saying(mixer: str, table: Table) -> Iterator[str]:
    """Settings of a mixer that are not at their default, and the rotary positions that it has."""
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch

    for field in fields(MIXERS[mixer].Config):
        name, value = field.name, table[field.name]
        is_rotary = name in ("rope", "rope_theta") and table["rope"] != "none"
        if is_rotary or (name not in (*SIZES, "rope") and value != field.default):
            yield name
