"""The own settings of all MLPs of a model, read before it is made."""

from longfire.config.model_config import NO_MLP, ModelConfig, mlp_of
from longfire.config.strict import read_own_settings
from longfire.mlps import MLPS


def read_mlp_configs(model: ModelConfig, where: str, toml: bool = False) -> None:
    """Raises SettingsError naming the file, the MLP and the key of a setting that is wrong."""
    for name in dict.fromkeys(model.mlp_types):
        if name != NO_MLP:
            given = model.mlps.get(name, {})
            mlp_class = MLPS[mlp_of(name)]
            read_own_settings(mlp_class, name, given, model.hidden_size, where, toml)
