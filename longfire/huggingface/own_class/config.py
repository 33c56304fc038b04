"""LongfireConfig: config.json of our own class as an object of transformers; own_config.py says
what its keys mean."""

from transformers import AutoConfig, PreTrainedConfig

from longfire.config.model_config import ModelConfig
from longfire.errors import SettingsError
from longfire.huggingface.family import Config
from longfire.huggingface.own_config import FORMAT_VERSION, MODEL_TYPE, read_model_config

NO_EXPORT = (
    "config.json: shape is empty: this is the config of a run; `longfire export` writes one that "
    "transformers can load"
)


class LongfireConfig(PreTrainedConfig):
    """The settings of LongfireForCausalLM.

    shape: the keys of a model config (docs/model_config.md) that are not arguments here; the other
    arguments have the meaning that they have in transformers. `model_shape` checks all of them.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        shape: Config | None = None,
        vocab_size: int = 0,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        intermediate_size: int = 0,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        format_version: int = FORMAT_VERSION,
        use_cache: bool = True,
        **kwargs: object,
    ) -> None:
        if not shape and "layer_types" in kwargs:
            raise SettingsError(NO_EXPORT)
        self.shape = {} if shape is None else shape
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.initializer_range = initializer_range
        self.format_version = format_version
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)  # type: ignore[arg-type]  # each class takes its own keys

    def model_shape(self) -> ModelConfig:
        """Raises SettingsError naming what this version of longfire does not have."""
        return read_model_config(self.to_dict(), self.name_or_path or "LongfireConfig")


AutoConfig.register(MODEL_TYPE, LongfireConfig, exist_ok=True)
