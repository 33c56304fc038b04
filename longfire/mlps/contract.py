"""The contract of an MLP: the part of a block that computes each token by itself, or with a few
others that it asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key
from longfire.mixers.mixer import Initialiser, Observed, Sequence
from longfire.ops.recurrence import RecurrenceOp


def no_forward(mlp: "MLP", x_BTD: Tensor, *others_BTD: Tensor) -> Tensor:
    """The forward of a class that has not defined one."""
    raise TypeError(f"{type(mlp).__name__} has no forward: an MLP must define it")


@dataclass(frozen=True)
class WidthConfig:
    """The settings of an MLP that has inner channels and nothing else to set."""

    intermediate_size: int = key(0, "inner channels; 0: the model's intermediate_size")

    def check(self, hidden_size: int) -> None:
        """Nothing more than the types to check."""


class MLP(nn.Module):
    """One layer's MLP: x_BTD -> y_BTD.

    A subclass declares, as data read by the code that acts on it:
      Config:         frozen dataclass of its own settings (a config's `"swiglu": {...}`), with
                      `check(hidden_size)`
      roles:          how tensor parallelism splits each submodule or parameter, as of a mixer
                      (mixers/mixer.py); without them tensor parallelism is refused
      divided:        where it counts something that divides the processes: as of a mixer
      context:        the kinds of context that it needs; () for an MLP that sees one token only
      recurrences:    as of a mixer
      own_init:       parameters and buffers that always begin by a rule of their own, by name
      published_init: the same of matrices that begin so unless the model config's init_* says
                      otherwise
      keep_fp32:      parameters that no compute dtype may round
      auxiliary_loss_weight: what its auxiliary loss is multiplied by; None: it has none. With one,
                      forward returns (y_BTD, Observed), and an instance may have another number
                      from its settings (mlps/auxiliary.py)
    Registered buffers are kept in checkpoints; they change in `update` only. An MLP never knows of
    processes.
    """

    Config: ClassVar[type] = WidthConfig
    roles: dict[str, str] = {}
    divided: dict[str, str]
    heads: int  # on this process, where it has heads, of which first_head is the first
    kv_heads: int
    first_head: int
    context: ClassVar[tuple[str, ...]] = ()
    recurrences: ClassVar[tuple[RecurrenceOp, ...]] = ()
    own_init: dict[str, Initialiser] = {}
    published_init: dict[str, Initialiser] = {}
    keep_fp32: ClassVar[tuple[str, ...]] = ()
    auxiliary_loss_weight: float | None = None
    # With `context`: the processes whose tokens, one's after another's, are in a sequence inside
    # (sequence parallel).
    tokens_from: int = 1
    statistics_of_step: Tensor | None = None

    def __init__(self, model: ModelConfig, config: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.name = model.mlp_types[layer]

    def others(self, x_BTD: Tensor, seq: Sequence) -> tuple[Tensor, ...]:
        """What `forward` takes of other tokens, each (B, T, D); asked for where `context` says that
        it needs any."""
        return ()

    # (x_BTD, *others_BTD): the outputs of tokens one by one, each with its own of `others`.
    forward: Callable[..., Tensor | tuple[Tensor, Observed]] = no_forward

    def update(self, statistics: Tensor) -> None:
        """Change the buffers, after each optimizer step, by the sum of its statistics."""
        raise TypeError(f"{type(self).__name__} gives statistics, but has no update")

    def flops_per_token(self) -> float:
        """Forward floating-point operations of a token; multiply-add = 2. Of the parameters that a
        token meets, which may be fewer than those that are held."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
