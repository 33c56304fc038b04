"""The keys of our own config.json, or of the [model] tables of a recipe -> a ModelConfig."""

from dataclasses import fields
from typing import Any

from longfire.config.model_config import TABLES, ModelConfig, mixer_of, mlp_of
from longfire.config.strict import check_type, nearest, placed, require
from longfire.errors import SettingsError


def read_own_keys(
    config: dict[str, Any],
    where: str,
    mixer_names: tuple[str, ...],
    mlp_names: tuple[str, ...],
    toml: bool = False,
) -> ModelConfig:
    """Read our own config.json, or the [model] tables of a recipe (`toml`), strictly.

    where: the file. mixer_names, mlp_names: those that there are, with those of plugins. Raises
    SettingsError naming the file, the key, and the nearest name or what to write.
    """
    config = {k: v for k, v in config.items() if k != "model_type"}
    known = {f.name: f for f in fields(ModelConfig) if f.name not in TABLES}
    mixers = {k: config.pop(k) for k in list(config) if mixer_of(k) in mixer_names}
    mlps = {k: config.pop(k) for k in list(config) if mlp_of(k) in mlp_names}
    for name in config:
        if name not in known:
            raise SettingsError(
                f"{where}: unknown key {name!r}{nearest(name, (*known, *mixer_names, *mlp_names))}"
            )
    require(config, list(known.values()), where, "", toml)
    for name, value in config.items():
        check_type(f"{where}: {name}", value, known[name].type)
    with placed(where):
        made = ModelConfig(
            mixers=mixers, mlps=mlps, **{**config, "layer_types": tuple(config["layer_types"])}
        )
        made.check_mlps(mlp_names)
    return made
