"""How the step sizes of Mamba's family begin."""

import math

import torch
from torch import Tensor


def init_step_size(dt_bias_H: Tensor, generator: torch.Generator) -> None:
    """softplus(dt_bias) log-uniform in [0.001, 0.1] (Mamba's rule); the inverse of softplus is x +
    log(1 - exp(-x))."""
    dt = (
        dt_bias_H.uniform_(math.log(0.001), math.log(0.1), generator=generator)
        .exp_()
        .clamp_min_(1e-4)
    )
    dt_bias_H.copy_(dt + torch.log(-torch.expm1(-dt)))
