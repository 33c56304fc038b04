"""Parameter groups, AdamW, gradient clipping."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longfire import settings

# Where torch's fused Adam(W) kernel exists; elsewhere its foreach form is used.
FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def parameter_groups(model: nn.Module, optimizer: settings.Optimizer) -> list[dict]:
    """Two groups: matrices, which decay, and the rest, which does not.

    Weight decay keeps matrices from growing; a norm's scale, a bias, a decay rate (`A_log`) or a word's vector has no
    reason to shrink because it was not used. So 0-D and 1-D parameters, what is no module's `weight` (rates and bounds may
    have two dims) and every embedding are left out, and with it a head that shares the embedding's parameter.
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trained = {p: name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for p, leaf in trained.items() if p.ndim >= 2 and leaf == "weight" and p not in embeddings]
    kept = [p for p in trained if p not in set(decayed)]
    weight_decay = optimizer.weight_decay if optimizer.name == "AdamW" else 0.0
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, optimizer: settings.Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or Adam (Kingma and Ba 2015) on those groups, fused where the device can."""
    kind = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[optimizer.name]
    return kind(
        parameter_groups(model, optimizer),
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=optimizer.fused and device.type in FUSED_DEVICES,
    )


def clip_gradients(
    gradients: Sequence[Tensor],
    max_norm: float,
    copies: Sequence[float] = (),
    world_sum: Callable[[Tensor], Tensor] = lambda total: total,
) -> Tensor:
    """Scale gradients in place so that their joint 2-norm is at most `max_norm` (0: leave them).

    Returns the norm before (fp32 or wider, a scalar on the gradients' device): nothing here waits for it. On a CPU it is at hand
    anyway, and gradients that are short enough are then not passed over once more. Where parameters lie in many processes,
    these are the parts that lie here: `copies` says how many processes hold each, world_sum adds a number over all in place.
    """
    if not gradients:
        return world_sum(torch.zeros((), dtype=torch.float64)).sqrt().float()
    by_copies: dict[float, list[Tensor]] = defaultdict(list)
    for gradient, count in zip(gradients, copies or [1] * len(gradients)):
        by_copies[count].append(gradient)
    squares = [torch.nn.utils.get_total_norm(some).double().square() / count for count, some in by_copies.items()]
    norm = world_sum(torch.stack(squares).sum()).sqrt().to(torch.promote_types(gradients[0].dtype, torch.float32))
    short_enough = norm.device.type == "cpu" and norm + 1e-6 <= max_norm  # 1e-6: torch adds it before it divides
    if max_norm > 0 and not short_enough:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0))  # one kernel; no public name has it
    return norm
