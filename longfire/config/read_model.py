"""The config of a model, read: from a config.json (ours, a Hugging Face family's, or one of
transformers), from the [model] tables of a recipe, or from both."""

from collections.abc import Mapping
from pathlib import Path

from longfire.config.config_file import read_config
from longfire.config.init_rules import check_init
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.own_keys import read_own_keys
from longfire.config.own_settings import nearest
from longfire.config.strict import placed
from longfire.config.transformers_config import TransformersConfig
from longfire.errors import SettingsError
from longfire.huggingface.families import config_from_hf
from longfire.huggingface.own_config import is_own_export

# The keys of a config.json, or of the [model] tables of a recipe
Keys = Mapping[str, object]


def model_config_at(path: Path, backend: str) -> ModelConfig | TransformersConfig:
    """The config in a config.json: ours, or with model.backend = "transformers" one that
    transformers reads. Raises SettingsError."""
    if backend == "longfire":
        return read_model_config(path)
    from longfire.huggingface import transformers_model

    config = read_config(path)
    if "model_type" not in config:
        raise SettingsError(
            f"{path}: model_type is missing; model.backend = 'transformers' takes a config.json of "
            "transformers"
        )
    return transformers_model.read_model_config(config, str(path))


def read_model_config(path: Path) -> ModelConfig:
    """The config in a config.json, ours or a Hugging Face family's, with the settings of every
    mixer checked. Raises SettingsError naming the file."""
    file = path / "config.json" if path.is_dir() else path
    return model_config_of(read_config(path), str(file))


def read_tables(tables: Keys, place: str, config: Path | None) -> ModelConfig:
    """The config that the [model] tables of a recipe describe: alone, or over those of a
    config.json. place: where the tables are written. Raises SettingsError."""
    if config is None:
        return model_config_of(tables, place, toml=True)
    keys = with_tables(read_model_config(config).to_dict(), tables)
    return model_config_of(keys, f"{config} with {place}", toml=True)


def with_tables(config: Keys, tables: Keys) -> dict[str, object]:
    """The keys of a config.json with others in their place; the tables of mixers are joined key by
    key.

    Another depth repeats the pattern of layers of the config; another width has its own default
    width of the MLP.
    """
    layer_types = config["layer_types"]
    assert isinstance(layer_types, list)
    merged = {**config, "layer_types": layer_types[: period_of(layer_types)]}
    mlp_layer_types = config.get("mlp_layer_types")
    if isinstance(mlp_layer_types, list):
        merged["mlp_layer_types"] = mlp_layer_types[: period_of(mlp_layer_types)]
    if "hidden_size" in tables or "mlp" in tables:
        merged.pop("intermediate_size")
    for name, value in tables.items():
        before = merged.get(name, {})
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            merged[name] = {**before, **value}
        else:
            merged[name] = value
    mlps = merged.get("mlp_layer_types") or [merged["mlp"]]
    names_used = {*layer_names(merged["layer_types"]), *layer_names(mlps), *tables}
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in names_used:
            del merged[name]  # of a mixer that the other layer_types do not have
    return merged


def layer_names(layer_types: object) -> list[str]:
    """The entries of layer_types that are names; whether all are is checked later."""
    if not isinstance(layer_types, list | tuple):
        return []
    return [name for name in layer_types if isinstance(name, str)]


def period_of(layer_types: list[str]) -> int:
    """The length of the shortest pattern that the types of the layers repeat."""
    layers = len(layer_types)
    for length in range(1, layers):
        is_divisor = layers % length == 0
        if is_divisor and layer_types == layer_types[:length] * (layers // length):
            return length
    return layers


def model_config_of(config: Keys, where: str, toml: bool = False) -> ModelConfig:
    """The config that these keys describe, ours or a Hugging Face family's. where: the place that
    errors name. Raises SettingsError."""
    from longfire.config.strict import read_own_settings
    from longfire.mixers import MIXERS  # they need torch, which other settings do not need
    from longfire.mlps import MLPS
    from longfire.mlps.reading import read_mlp_configs

    keys = dict(config)
    if keys.get("model_type", "longfire") == "longfire" and not is_own_export(keys):
        model_config = read_own_keys(keys, where, tuple(MIXERS), tuple(MLPS), toml)
    else:
        with placed(where):
            model_config = config_from_hf(keys, where)
            check_init(model_config)
    for name in dict.fromkeys(model_config.layer_types):
        if mixer_of(name) not in MIXERS:
            raise SettingsError(
                f"{where}: layer_types names {name!r}, which is no mixer of longfire "
                f"({', '.join(MIXERS)}){nearest(mixer_of(name), MIXERS)}"
            )
        mixer = MIXERS[mixer_of(name)]
        own = model_config.mixers.get(name, {})
        read_own_settings(mixer, name, own, model_config.hidden_size, where, toml)
    read_mlp_configs(model_config, where, toml)
    unused = [name for name in model_config.mixers if name not in model_config.layer_types]
    if unused:
        table = f"[model.{unused[0]}]" if toml else f"the table {unused[0]!r}"
        raise SettingsError(
            f"{where}: {table} is not used: layer_types has "
            f"{', '.join(dict.fromkeys(model_config.layer_types))}; name it there, or remove the "
            "table"
        )
    return model_config
