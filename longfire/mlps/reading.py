"""The own settings of all MLPs of a model, read before it is made."""

from longfire.config.model_config import NO_MLP, ModelConfig
from longfire.mlps import read_mlp_config


def read_mlp_configs(model: ModelConfig, where: str, toml: bool = False) -> None:
    """Raises SettingsError naming the file, the MLP and the key of a setting that is wrong."""
    for name in dict.fromkeys(model.mlp_types):
        if name != NO_MLP:
            read_mlp_config(model, name, where, toml)
