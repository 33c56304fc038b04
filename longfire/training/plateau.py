"""When the schedule `plateau` lowers the learning rate: after more validations without an
improvement than lr_scheduler.patience; free of torch.

The rule is that of torch's ReduceLROnPlateau (mode "min", threshold_mode "rel", without cooldown).
What it depends on is no function of the step, so it is part of a checkpoint, and the same on all
processes. A checkpoint is saved before its step is evaluated: a run that resumes from there
evaluates first, and so comes to the same state.
"""

import math
from typing import NamedTuple

from longfire.config.settings import LRScheduler


class Plateau(NamedTuple):
    """The validations so far.

    step: of the last one; -1 before the first. best: the lowest loss (nats a token); None before
    the first. without_improvement: validations since then, or since the rate was lowered. drops:
    how often it was.
    """

    step: int = -1
    best: float | None = None
    without_improvement: int = 0
    drops: int = 0


NO_VALIDATION = Plateau()


def after_validation(plateau: Plateau, step: int, loss: float, scheduler: LRScheduler) -> Plateau:
    """The state after the validation of a step; as it was where that validation is counted
    already. A loss that is not finite is no improvement."""
    if step <= plateau.step:
        return plateau
    lowest = math.inf if plateau.best is None else plateau.best * (1 - scheduler.threshold)
    if loss < lowest:
        return Plateau(step, loss, 0, plateau.drops)
    without_improvement = plateau.without_improvement + 1
    if without_improvement > scheduler.patience:
        return Plateau(step, plateau.best, 0, plateau.drops + 1)
    return Plateau(step, plateau.best, without_improvement, plateau.drops)
