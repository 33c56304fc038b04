"""A plugin that brings an optimizer: Muon (Jordan 2024) for the matrices of mixers and MLPs, AdamW for the rest.

    longfire train recipe.toml --model.plugins muon.py --optimizer.name Muon --optimizer.options momentum=0.9

It needs each matrix whole, and is proven for one process and for replicas of the model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longfire.config.settings import POSITIVE, setting
from longfire.optim.adam import STATE
from longfire.optim.contract import Group, Needs, OptimizerRule, Role, StateTensor, Update
from longfire.parallel.sharding import local

MATRIX = Update("muon", Needs.MATRIX, (StateTensor("momentum_buffer"),))
REST = Update("adamw", Needs.NUMBERS, STATE, temporary_bytes=4.0)
# of the quintic that drives singular values towards 1
A, B, C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True)
class MuonOptions:
    momentum: float = setting(0.95, "decay of the mean of a matrix's gradients", "[0, 1)")
    iterations: int = setting(5, "of Newton-Schulz", POSITIVE)


class Muon(OptimizerRule):
    """Muon as longfire knows it."""

    Options: ClassVar[type] = MuonOptions
    decaying: ClassVar[frozenset[Role]] = frozenset({"head", "matrix"})
    proven_axes: ClassVar[frozenset[str]] = frozenset({"dp_replicate"})

    @property
    def updates(self) -> tuple[Update, ...]:
        return (MATRIX, REST)

    def update_of(self, role: Role, parameter: Tensor) -> Update:
        return MATRIX if role == "matrix" and parameter.dim() == 2 else REST

    def make(self, groups: list[Group], device: torch.device) -> torch.optim.Optimizer:
        return MuonAndAdamW(groups, self.options, self.settings)


class MuonAndAdamW(torch.optim.Optimizer):
    """Both updates; the state of both lies in `state`."""

    def __init__(self, groups, options, settings) -> None:
        super().__init__(groups, {})
        self.options = options
        rest = [group for group in self.param_groups if group["update"] == REST]
        betas = (settings.beta1, settings.beta2)
        self.adamw = torch.optim.AdamW(rest, settings.lr, betas, settings.eps)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for group in self.param_groups:
            if group["update"] == MATRIX:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.update(parameter, group)

    def update(self, parameter: Tensor, group: dict) -> None:
        """With replicas of the model parameters are DTensors, of which every process has the whole."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        local(state["momentum_buffer"]).lerp_(local(parameter.grad), 1 - self.options.momentum)
        mean = parameter.grad.clone()
        local(mean).lerp_(local(state["momentum_buffer"]), self.options.momentum)  # Nesterov
        local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
        rows, columns = parameter.shape
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        local(parameter).sub_(self.direction(mean), alpha=scale)

    def direction(self, mean: Tensor) -> Tensor:
        """The step of the local part of a matrix: here that is all of it."""
        return orthogonal(local(mean), self.options.iterations)


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """The matrix with singular values near 1 (Newton-Schulz)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        xx = x @ x.T
        x = A * x + (B * xx + C * xx @ xx) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


OPTIMIZERS = {"Muon": Muon}
