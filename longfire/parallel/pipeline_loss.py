"""The loss of a micro-batch in a pipeline, with gradients that are made at once and kept for the
backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from longfire.data.batch import Batch
from longfire.model import Model
from longfire.parallel.autograd_context import SavedTensors

Loss = Callable[[Model, Tensor, Batch], Tensor]  # (model, hidden states, batch) -> scalar


def with_gradients(
    loss: Loss,
    model: Model,
    hidden_BTD: Tensor,
    batch: Batch,
) -> Tensor:
    """The loss (1,), with its gradients made at once and kept for the backward.

    The fused loss gives all its gradients together and once. Schedules that halve the backward ask
    for those of hidden states first and for those of parameters later: so each has a node of its
    own in the graph.
    """
    leaf_BTD = hidden_BTD.detach().requires_grad_()
    value = loss(model, leaf_BTD, batch)
    parameters: list[Tensor] = []
    if model.head.weight.requires_grad:
        parameters.append(model.head.weight)
    for_hidden_BTD, *for_parameters = torch.autograd.grad(value, [leaf_BTD, *parameters])
    total = _Known.apply(hidden_BTD, for_hidden_BTD, value.detach()[None])
    for parameter, gradient in zip(parameters, for_parameters):
        total = total + _Known.apply(parameter, gradient, torch.zeros_like(total))
    return total


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(
        ctx: SavedTensors,
        x: Tensor,
        gradient: Tensor,
        value: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: SavedTensors, d_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_value, None, None
