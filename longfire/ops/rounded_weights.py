"""Weights that are rounded once, for a model that no longer learns."""

import torch
from torch import nn

from longfire.ops.linear import Linear


def keep_rounded(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a model that will only generate once, and not again for every token: the
    same results."""
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.dtype != dtype:
            module.rounded_WD = module.weight.detach().to(dtype)
