"""LAMB (You et al. 2020, "Large batch optimization for deep learning", algorithm 2): Adam's step,
scaled for each tensor so that its length is a share of the tensor's."""

from typing import ClassVar

import torch
from torch import Tensor

from longfire.optim.contract import Group, Needs, OptimizerRule, Role, Update
from longfire.optim.moments import adam_direction, begin_moments, moments, momentum_dtype
from longfire.row_shards import local, sums_over_shards

UPDATE_BYTES = 4  # of each number: the step of all parameters is there before any is taken


class LAMB(OptimizerRule):
    """The trust ratio is |x| / |u| for every parameter, 1 where one of them is 0; without limits on
    |x| (the paper's phi is the identity). Rows may be sharded: norms are those of whole tensors,
    summed over processes."""

    decaying: ClassVar[frozenset[Role]] = frozenset({"head", "matrix"})
    proven_axes: ClassVar[frozenset[str]] = frozenset({"dp_replicate", "dp_shard", "cp", "pp"})

    @property
    def updates(self) -> tuple[Update, ...]:
        state = moments(self.settings)
        return (Update("lamb", Needs.MATRIX, state, temporary_bytes=UPDATE_BYTES),)

    def make(self, groups: list[Group], device: torch.device) -> torch.optim.Optimizer:
        betas = (self.settings.beta1, self.settings.beta2)
        return LambSteps(groups, betas, self.settings.eps, momentum_dtype(self.settings))


class LambSteps(torch.optim.Optimizer):
    """LAMB on the parts of parameters that are on this process."""

    def __init__(
        self,
        groups: list[Group],
        betas: tuple[float, float],
        eps: float,
        momentum: torch.dtype | None,
    ) -> None:
        super().__init__([dict(group) for group in groups], {})
        self.betas = betas
        self.eps = eps
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the step has its gradients
        """Collective over the processes that share parameters."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            steps = [self.step_of(p, group["weight_decay"]) for p in learning]
            squares = [squared_lengths(local(p), u) for p, u in zip(learning, steps)]
            totals = sums_over_shards(learning, squares)
            for parameter, step, total in zip(learning, steps, totals):
                of_parameter, of_step = total.sqrt()
                ratio = torch.where((of_parameter > 0) & (of_step > 0), of_parameter / of_step, 1.0)
                local(parameter).sub_(step.mul_(ratio), alpha=group["lr"])

    def step_of(self, parameter: Tensor, weight_decay: float) -> Tensor:
        """u of the algorithm: Adam's direction and the decay, the part on this process."""
        assert parameter.grad is not None, "only what learns is given"
        state = self.state[parameter]
        begin_moments(state, parameter, self.momentum)
        direction = adam_direction(state, local(parameter.grad), self.betas, self.eps)
        return direction.add_(local(parameter), alpha=weight_decay)


def squared_lengths(*tensors: Tensor) -> Tensor:
    """The squared 2-norm of each, in float64: one vector."""
    lengths = [torch.linalg.vector_norm(tensor).double() for tensor in tensors]
    return torch.stack(lengths).square_()
