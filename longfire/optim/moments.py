"""The mean of gradients and of their squares, as Adam keeps them (Kingma and Ba 2015, algorithm 1),
for rules that are no classes of torch."""

from collections.abc import MutableMapping

import torch
from torch import Tensor

from longfire.config.settings import Optimizer as Settings
from longfire.optim.contract import StateTensor
from longfire.row_shards import local


def momentum_dtype(settings: Settings) -> torch.dtype | None:
    """In which the mean of gradients is kept; None: in the parameter's own."""
    return torch.bfloat16 if settings.momentum_dtype == "bfloat16" else None


def moments(settings: Settings) -> tuple[StateTensor, ...]:
    """The state of a parameter, under the names of torch's own Adam."""
    return (
        StateTensor("step", like_parameter=False),
        StateTensor("exp_avg", dtype=momentum_dtype(settings)),
        StateTensor("exp_avg_sq"),
    )


def begin_moments(
    state: MutableMapping[str, Tensor], parameter: Tensor, momentum: torch.dtype | None
) -> None:
    """Zeros, where nothing is kept yet."""
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter, dtype=momentum)
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def adam_direction(
    state: MutableMapping[str, Tensor],
    gradient: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Update both means in place and return mean / (sqrt(mean of squares) + eps), each corrected
    for its beginning at zero; the part on this process.

    A mean that is kept in bfloat16 is rounded to the nearest when it is stored, and computed with
    in the gradient's type: what this step uses is not rounded (optax's `mu_dtype`).
    """
    beta1, beta2 = betas
    state["step"] += 1
    steps = state["step"].item()
    kept = local(state["exp_avg"])
    squares = local(state["exp_avg_sq"])
    mean = kept.to(gradient.dtype).lerp(gradient, 1 - beta1)
    kept.copy_(mean)
    squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (squares / (1 - beta2**steps)).sqrt_().add_(eps)
    return mean.div_(1 - beta1**steps).div_(denominator)
