"""The next id of a text, drawn from its logits."""

import torch
from torch import Tensor

from longfire.config.options import Sampling
from longfire.errors import CheckpointError


def penalised(
    logits_V: Tensor,
    seen_V: Tensor,
    penalty: float,
) -> Tensor:
    """The logits, with those of seen tokens divided by a penalty, or multiplied where they are
    negative (CTRL, Keskar 2019, section 4.1)."""
    lowered_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(seen_V, lowered_V, logits_V)


def draw(
    logits_V: Tensor,
    sampling: Sampling,
    chance: torch.Generator,
) -> int:
    """An id by its probability among those that top_k, top_p and min_p leave, in fp64 on the CPU:
    the same on every device.

    min_p: those at least as likely as this share of the most likely one (Nguyen 2024). Raises
    CheckpointError for logits that are NaN.
    """
    logits_V = logits_V.cpu()
    if logits_V.isnan().any():
        raise CheckpointError(
            "the model's logits are NaN: its weights are broken, or training diverged; take an "
            "earlier --step"
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits, ids = likeliest(logits_V, sampling.top_k)
    p = (logits.double() / sampling.temperature).softmax(-1)
    before = p.cumsum(-1) - p
    stays = (before < sampling.top_p) & (p >= sampling.min_p * p[0])  # the likeliest always does
    p = p[stays]
    place = torch.rand((), generator=chance, dtype=torch.float64) * p.sum()
    number = int(torch.searchsorted(p.cumsum(-1), place, right=True))
    return int(ids[min(number, len(p) - 1)])


def likeliest(logits_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest (0: all), largest first, and their ids; of equals the lower ids."""
    if not 0 < k < len(logits_V):
        return logits_V.sort(descending=True, stable=True)
    # sorting the whole vocabulary takes longer than a small model
    ids = (logits_V >= logits_V.topk(k).values[-1]).nonzero()[:, 0]
    logits, order = logits_V[ids].sort(descending=True, stable=True)
    return logits[:k], ids[order[:k]]
