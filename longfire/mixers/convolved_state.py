"""Mixers with a matrix state whose queries, keys and values may pass short convolutions first."""

from typing import Any, ClassVar

from torch import Tensor

from longfire.config.model_config import ModelConfig
from longfire.mixers.convolved import convolved
from longfire.mixers.matrix_state import MatrixState
from longfire.mixers.mixer import Sequence, divides, positive
from longfire.ops.short_conv import ShortConv


class ConvolvedState(MatrixState):
    """A MatrixState whose settings have `use_short_conv`, and `conv_size`: the inputs that a
    convolution sees."""

    roles = {
        **MatrixState.roles,
        "q_conv1d": "head",
        "k_conv1d": "head",
        "v_conv1d": "head",
    }
    context: ClassVar[tuple[str, ...]] = ("state", "halo")

    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        super().__init__(model, config, layer)
        self.conv_size = config.conv_size if config.use_short_conv else 0

    def make_projection(self, name: str, channels: int) -> None:
        super().make_projection(name, channels)
        if self.conv_size:
            self.add_module(f"{name}_conv1d", ShortConv(channels, self.conv_size))

    def project(self, name: str, x_BTD: Tensor, seq: Sequence, silu: bool) -> Tensor:
        """q, k or v, convolved; SiLU is a part of the convolution."""
        if not self.conv_size:
            return super().project(name, x_BTD, seq, silu)
        y_BTD = getattr(self, f"{name}_proj")(x_BTD)
        return convolved(self, name, y_BTD, seq, silu=silu)


def check_value_heads(mixer: str, config: Any) -> None:
    """Raises SettingsError unless num_v_heads heads of head_dim * expand_v channels can share
    num_heads query/key heads."""
    divides(
        mixer, "num_heads", config.num_heads, "num_v_heads", config.num_v_heads or config.num_heads
    )
    divides(mixer, "1", 1, "head_dim * expand_v", config.head_dim * config.expand_v)
    positive(mixer, conv_size=config.conv_size)
