"""Logits of a vocabulary, and what of it is on this process."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class VocabularyShard(NamedTuple):
    """The words whose rows of the weight are on this process, of a vocabulary that several
    processes share; all have the same hidden states and labels. Losses are then the same in all,
    and the gradient of the hidden states is a part: their sum is the whole one.
    """

    first: int
    total: int  # words of the whole vocabulary
    add_up: Callable[[Tensor], Tensor]  # over the processes, in place
    take_highest: Callable[[Tensor], Tensor]
    sum_for_all: Callable[[Tensor], Tensor]  # the sum with gradients, for what all make alike
    sum_for_parts: Callable[[Tensor], Tensor]  # the same, for what each makes of its own words


def softcapped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap): never beyond +-cap; 0: the logits as they are."""
    if cap:
        return cap * torch.tanh(logits / cap)
    return logits
