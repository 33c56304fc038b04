"""The norm of all gradients, and gradients that are at most so long."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def clip_gradients(
    gradients: Sequence[Tensor],
    max_norm: float,
    copies: Sequence[float] = (),
    world_sum: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    """Scale gradients in place so that their joint 2-norm is at most `max_norm` (0: leave them).

    Returns the norm before (fp32 or wider, a scalar on the gradients' device): nothing here waits
    for it. On a CPU it is at hand anyway, and gradients that are short enough are then not passed
    over once more. Where parameters are on many processes, these are the parts on this process:
    `copies` says how many processes hold each, world_sum adds a number over all in place.
    """
    if not gradients:
        return world_sum(torch.zeros((), dtype=torch.float64)).sqrt().float()
    by_copies: dict[float, list[Tensor]] = defaultdict(list)
    for gradient, count in zip(gradients, copies or [1] * len(gradients)):
        by_copies[count].append(gradient)
    squares = [
        torch.nn.utils.get_total_norm(some).double().square() / count
        for count, some in by_copies.items()
    ]
    norm = (
        world_sum(torch.stack(squares).sum())
        .sqrt()
        .to(torch.promote_types(gradients[0].dtype, torch.float32))
    )
    short_enough = (
        norm.device.type == "cpu" and norm + 1e-6 <= max_norm
    )  # 1e-6: torch adds it before it divides
    if max_norm > 0 and not short_enough:
        torch._foreach_mul_(
            list(gradients),
            (max_norm / (norm + 1e-6)).clamp_max(1.0),
        )  # one kernel; no public name has it
    return norm
