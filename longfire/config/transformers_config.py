"""The config of a model that is made by a class of transformers (model.backend)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from longfire.errors import SettingsError


@dataclass(frozen=True)
class TransformersConfig:
    """What a run asks of the config of a model that is made by a class of transformers
    (model.backend); `config` is theirs."""

    config: dict[str, Any]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int = 0

    drops = False  # their dropout is their own
    mlp = ""
    mixers: ClassVar[dict[str, Any]] = {}
    has_mlps = True

    @property
    def learned_positions(self) -> bool:
        """Whether they are learned is unknown: no sequence is longer than the config's limit, if it
        has one."""
        return self.max_position_embeddings > 0

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def layer_types(self) -> tuple[str, ...]:
        return (self.model_type,) * self.num_hidden_layers

    def with_vocabulary(self, vocab_size: int) -> "TransformersConfig":
        """The same. Raises SettingsError when the config has fewer words than the tokenizer."""
        if self.vocab_size < vocab_size:
            raise SettingsError(
                f"vocab_size = {self.vocab_size} of the model's config is smaller than the "
                f"tokenizer's {vocab_size} words; set it to at least {vocab_size} there"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.config
