"""The contract of an MLP: the part of a block that computes each token by itself, or with a few
others that it asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from longfire.config.model_config import ModelConfig, key
from longfire.mixers.mixer import BlockPart, Observed, Sequence


@dataclass(frozen=True)
class WidthConfig:
    """The settings of an MLP that has inner channels and nothing else to set."""

    intermediate_size: int = key(0, "inner channels; 0: the model's intermediate_size")

    def check(self, hidden_size: int) -> None:
        """Nothing more than the types to check."""


class MLP(BlockPart):
    """One layer's MLP: x_BTD -> y_BTD.

    A subclass declares what every part of a block does (without `roles` tensor parallelism is
    refused), and:
      auxiliary_loss_weight: what its auxiliary loss is multiplied by; None: it has none. With one,
                      forward returns (y_BTD, Observed), and an instance may have another number
                      from its settings (mlps/auxiliary.py)
    Registered buffers are kept in checkpoints; they change in `update` only.
    """

    Config: ClassVar[type] = WidthConfig
    auxiliary_loss_weight: float | None = None
    # With `context`: the processes whose tokens, one's after another's, are in a sequence inside
    # (sequence parallel).
    tokens_from: int = 1
    statistics_of_step: Tensor | None = None

    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.name = model.mlp_types[layer]

    def others(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        """What `forward` takes of other tokens, each (B, T, D); asked for where `context` says that
        it needs any."""
        return ()

    # (x_BTD, *others_BTD): the outputs of tokens one by one, each with its own of `others`.
    forward: Callable[..., Tensor | tuple[Tensor, Observed]]

    def update(self, statistics: Tensor) -> None:
        """Change the buffers, after each optimizer step, by the sum of its statistics."""
        raise TypeError(f"{type(self).__name__} gives statistics, but has no update")

    def flops_per_token(self) -> float:
        """Forward floating-point operations of a token; multiply-add = 2. Of the parameters that a
        token meets, which may be fewer than those that are held."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
