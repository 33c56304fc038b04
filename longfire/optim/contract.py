"""The contract of an optimizer: what the step, the planner, the checkpoint and the check of
settings ask of it.

A rule is a class derived from `OptimizerRule`. It declares, as data,

    updates       how parameters are updated, one `Update` for each way: what of a parameter the
                  update needs whole, what state it keeps, its share of the learning rate
    decaying      the roles whose parameters decay by optimizer.weight_decay
    proven_axes   the axes of a plan under which tests prove that the update is that of one process
    Options       its own settings, a frozen dataclass, given in optimizer.options

and makes a `torch.optim.Optimizer` from groups of parameters (groups.py). A plan that uses another
axis is refused before a device is touched (config/checks.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from longfire.config.named_options import NoOptions, read_named_options
from longfire.config.settings import Optimizer as Settings

Role = Literal["embedding", "head", "matrix", "other"]


class Needs(StrEnum):
    """What of a parameter an update must see at once; the value is what a message says of it."""

    NUMBERS = "each number by itself"
    ROWS = "each row of a matrix whole"
    MATRIX = "each matrix whole"


@dataclass(frozen=True)
class StateTensor:
    """One tensor that an update keeps for each parameter, in torch's `optimizer.state[parameter]`.

    like_parameter: it has the parameter's shape, and is placed as the parameter is. Otherwise every
    process that holds a part of the parameter holds the whole tensor, as a count of steps. A tensor
    without dims is in host memory, unless `fused` is among the defaults of the torch optimizer.
    dtype: None is the parameter's.
    """

    name: str
    like_parameter: bool = True
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Update:
    """One way to update a parameter.

    temporary_bytes: what is held during the update beside the state, of each number of a
    parameter. lr_scale: multiplies the learning rate that the settings give to the role.
    """

    name: str
    needs: Needs
    state: tuple[StateTensor, ...]
    lr_scale: float = 1.0
    temporary_bytes: float = 0.0

    def state_bytes(self, dtype: torch.dtype) -> float:
        """Bytes of state for each number of a parameter of this type. Tensors that do not have the
        parameter's shape are small, and not counted."""
        like_it = [tensor for tensor in self.state if tensor.like_parameter]
        return float(sum((tensor.dtype or dtype).itemsize for tensor in like_it))


class Group(TypedDict):
    """A group of parameters, as torch.optim.Optimizer takes it. The step sets `lr` to the rate of
    the schedule times `lr_scale`, and averages parameters by `ema_decay` (average.py)."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: float
    lr: float
    update: Update
    ema_decay: float


@dataclass(frozen=True)
class OptimizerRule(ABC):
    """An optimizer as longfire knows it, with the settings of a run. Raises SettingsError for
    options that it does not have."""

    settings: Settings
    options: object = field(init=False)

    Options: ClassVar[type] = NoOptions
    decaying: ClassVar[frozenset[Role]] = frozenset()
    proven_axes: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        owner = f"optimizer.name = {self.settings.name!r}"
        options = read_named_options(
            self.Options, self.settings.options, "optimizer.options", owner
        )
        object.__setattr__(self, "options", options)

    @property
    @abstractmethod
    def updates(self) -> tuple[Update, ...]:
        """All ways in which it updates parameters."""

    def update_of(self, role: Role, parameter: Tensor) -> Update:
        """The one for a parameter (which may be on meta, or a part of the whole: ask only for its
        number of dims)."""
        return self.updates[0]

    @abstractmethod
    def make(
        self,
        groups: list[Group],
        device: torch.device,
    ) -> torch.optim.Optimizer:
        """The optimizer on these groups, whose parameters are on `device`. What it keeps in its
        state are the tensors that the group's update declares, and nothing else."""

    @property
    def needs(self) -> Needs:
        """The most that any of its updates needs."""
        order = list(Needs)
        return max((update.needs for update in self.updates), key=order.index)
