"""The keys of our own config.json, or of the [model] tables of a recipe -> a ModelConfig."""

from dataclasses import fields
from typing import Any

from longfire.config.init_rules import check_init
from longfire.config.model_config import DEFAULT_MLP, NO_MLP, TABLES, ModelConfig, mixer_of, mlp_of
from longfire.config.own_settings import check_type, nearest
from longfire.config.strict import placed, require
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
        check_init(made)
        check_mlps(made, mlp_names)
    return made


def check_mlps(config: ModelConfig, mlp_names: tuple[str, ...]) -> None:
    """Raises SettingsError for an MLP that there is not, and for settings of one that no layer
    has."""
    known = (*mlp_names, NO_MLP)
    if mlp_of(config.mlp) not in known:
        raise SettingsError(f"model config: mlp = {config.mlp!r} is not one of {', '.join(known)}")
    for name in config.mlp_layer_types:
        if mlp_of(name) not in known:
            raise SettingsError(
                f"model config: mlp_layer_types names {name!r}, which is not one of "
                f"{', '.join(known)}"
            )
    if config.mlp not in (DEFAULT_MLP, *config.mlp_types):
        raise SettingsError(
            f"model config: mlp = {config.mlp!r} is not used, since mlp_layer_types names the "
            "MLP of each layer; remove one of them"
        )
    for name in config.mlps:
        if name not in config.mlp_types:
            used = ", ".join(dict.fromkeys(config.mlp_types))
            raise SettingsError(
                f"model config: the table {name!r} is not used: the layers have the MLPs "
                f"{used}; name it in mlp or mlp_layer_types, or remove the table"
            )
