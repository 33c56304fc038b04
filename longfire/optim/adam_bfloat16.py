"""Adam and AdamW whose mean of gradients is kept in bfloat16 (optimizer.momentum_dtype)."""

import torch

from longfire.optim.contract import Group
from longfire.optim.moments import adam_direction, begin_moments
from longfire.row_shards import local


class AdamBFloat16(torch.optim.Optimizer):
    """torch's AdamW but for the type of `exp_avg`: 2 bytes of a parameter less, and no fused kernel
    (a loop over parameters). A group without weight decay is Adam's."""

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float) -> None:
        super().__init__([dict(group) for group in groups], {})
        self.betas = betas
        self.eps = eps

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the step has its gradients
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                begin_moments(state, parameter, torch.bfloat16)
                direction = adam_direction(state, local(parameter.grad), self.betas, self.eps)
                here = local(parameter)
                here.mul_(1 - group["lr"] * group["weight_decay"])
                here.sub_(direction, alpha=group["lr"])
