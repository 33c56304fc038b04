"""Stochastic gradient descent with momentum, which is torch's own."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from longfire.config.settings import setting
from longfire.errors import SettingsError
from longfire.optim.contract import Group, Needs, OptimizerRule, Role, StateTensor, Update


@dataclass(frozen=True)
class SGDOptions:
    """momentum: decay of the sum of gradients; 0: none is kept. nesterov: the step looks ahead by
    one momentum (Sutskever et al. 2013)."""

    momentum: float = setting(0.0, "decay of the sum of gradients; 0: none is kept", "[0, 1)")
    nesterov: bool = setting(False, "the step looks ahead by one momentum")


class SGD(OptimizerRule):
    """torch.optim.SGD. Its weight decay is added to the gradient, as there: it is not decoupled.
    Matrices and an untied head decay. Raises SettingsError for nesterov without momentum."""

    Options: ClassVar[type] = SGDOptions
    decaying: ClassVar[frozenset[Role]] = frozenset({"head", "matrix"})
    proven_axes: ClassVar[frozenset[str]] = frozenset(
        {"dp_replicate", "dp_shard", "cp", "tp", "pp"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given.nesterov and not self.given.momentum:
            raise SettingsError(
                "optimizer.options: nesterov=true looks ahead by the momentum, which is 0: add "
                "momentum=0.9"
            )

    @property
    def given(self) -> SGDOptions:
        """Its own settings."""
        assert isinstance(self.options, SGDOptions), "made by read_options"
        return self.options

    @property
    def updates(self) -> tuple[Update, ...]:
        kept = (StateTensor("momentum_buffer"),) if self.given.momentum else ()
        return (Update("sgd", Needs.NUMBERS, kept),)

    def make(self, groups: list[Group], device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [dict(group) for group in groups],
            lr=self.settings.lr,
            momentum=self.given.momentum,
            nesterov=self.given.nesterov,
        )
