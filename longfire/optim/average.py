"""A moving average of the weights (optimizer.ema_decay; Polyak and Juditsky 1992, with a constant
decay): average = decay * average + (1 - decay) * weights after each step. It begins as the weights
after the first step.

It is part of the optimizer's state, under the name `ema`: so it is sharded as its parameter, is in
checkpoints, and is counted by the planner, whatever the optimizer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from longfire.optim.contract import StateTensor
from longfire.row_shards import local

EMA = "ema"
AVERAGE = StateTensor(EMA)


@torch.no_grad()
def update_averages(optimizer: torch.optim.Optimizer) -> None:
    """After a step of the optimizer: count its weights into their averages, of groups that have
    any. A parameter without gradient has none."""
    for group in optimizer.param_groups:
        decay = group.get("ema_decay", 0.0)
        if not decay:
            continue
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if EMA in state:
                local(state[EMA]).lerp_(local(parameter), 1 - decay)
            else:
                state[EMA] = parameter.detach().clone()


@contextmanager
def averages_in_place(optimizer: torch.optim.Optimizer, wanted: bool = True) -> Iterator[None]:
    """Inside, the parameters are their averages; afterwards what they were, to the bit. Nothing
    happens where it is not wanted. A save in the background must have copied both before."""
    if wanted:
        swap(optimizer)
    try:
        yield
    finally:
        if wanted:
            swap(optimizer)


@torch.no_grad()
def swap(optimizer: torch.optim.Optimizer) -> None:
    """Each parameter and its average change places."""
    for parameter, state in optimizer.state.items():
        if EMA in state:
            average = local(state[EMA])
            weights = local(parameter).clone()
            local(parameter).copy_(average)
            average.copy_(weights)
