"""Parameter groups, AdamW, gradient clipping."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longfire.config import settings

# Where torch's fused Adam(W) kernel exists; elsewhere its foreach form is used.
FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def parameter_groups(model: nn.Module, optimizer: settings.Optimizer) -> list[dict]:
    """Parameters with equal weight decay and equal `lr_scale`, a group each.

    `lr_scale` is by role, and stays in the group: a step's rate is the schedule's times it.
    Matrices (and an untied head) decay, the rest does not. Weight decay keeps matrices from
    growing; a norm's scale, a bias, a decay rate (`A_log`) or a word's vector has no reason to
    shrink because it was not used.
    """
    scales = {
        "embedding": optimizer.embedding_lr_scale,
        "head": optimizer.head_lr_scale,
        "matrix": optimizer.matrix_lr_scale,
        "other": optimizer.other_lr_scale,
    }
    decays = {"head", "matrix"} if optimizer.name == "AdamW" else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, role in roles(model).items():
        weight_decay = optimizer.weight_decay if role in decays else 0.0
        groups.setdefault((weight_decay, scales[role]), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay,
            "lr_scale": scale,
            "lr": optimizer.lr * scale,
        }
        for (weight_decay, scale), parameters in groups.items()
    ]


def roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """Each parameter that learns: embedding, head, matrix, or other.

    embedding: of every nn.Embedding, and so of a head that is tied to one. matrix: what has at
    least two dims and is a module's `weight` (rates and bounds may have two dims, too).
    """
    embeddings = {
        p
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    head = model.head_weight
    found: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in embeddings:
            found[parameter] = "embedding"
        elif parameter is head:
            found[parameter] = "head"
        elif parameter.ndim >= 2 and name.rpartition(".")[2] == "weight":
            found[parameter] = "matrix"
        else:
            found[parameter] = "other"
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its multiple of the step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def make_optimizer(
    model: nn.Module, optimizer: settings.Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or Adam (Kingma and Ba 2015) on those groups, fused where
    the device can."""
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

    Returns the norm before (fp32 or wider, a scalar on the gradients' device): nothing here waits
    for it. On a CPU it is at hand anyway, and gradients that are short enough are then not passed
    over once more. Where parameters lie in many processes, these are the parts on this process:
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
            gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0)
        )  # one kernel; no public name has it
    return norm
