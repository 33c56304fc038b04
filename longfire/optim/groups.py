"""Parameters by role, their groups with a learning rate and a weight decay of their own, and the
optimizer on them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from longfire.config import settings
from longfire.optim.average import AVERAGE
from longfire.optim.contract import Group, OptimizerRule, Role, Update
from longfire.optim.table import rule_of


def make_optimizer(
    model: nn.Module,
    optimizer: settings.Optimizer,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, on the model's parameters, which are on `device`.
    Raises SettingsError for one that is not known."""
    return rule_of(optimizer).make(parameter_groups(model, optimizer), device)


def parameter_groups(model: nn.Module, optimizer: settings.Optimizer) -> list[Group]:
    """Parameters with equal update, weight decay and `lr_scale`, a group each.

    `lr_scale` is by role, and stays in the group: a step's rate is the schedule's times it. Which
    roles decay, the rule says (`OptimizerRule.decaying`).
    """
    rule = rule_of(optimizer)
    scales: dict[Role, float] = {
        "embedding": optimizer.embedding_lr_scale,
        "head": optimizer.head_lr_scale,
        "matrix": optimizer.matrix_lr_scale,
        "other": optimizer.other_lr_scale,
    }
    members: dict[tuple[Update, float, float], list[nn.Parameter]] = {}
    for parameter, role in roles(model).items():
        update = update_of(rule, role, parameter)
        weight_decay = optimizer.weight_decay if role in rule.decaying else 0.0
        key = (update, weight_decay, scales[role] * update.lr_scale)
        members.setdefault(key, []).append(parameter)
    return [
        Group(
            params=parameters,
            weight_decay=weight_decay,
            lr_scale=scale,
            lr=optimizer.lr * scale,
            update=update,
            ema_decay=optimizer.ema_decay,
        )
        for (update, weight_decay, scale), parameters in members.items()
    ]


def roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """Each parameter that learns: embedding, head, matrix, or other.

    embedding: of every nn.Embedding, and so of a head that is tied to one. matrix: what has at
    least two dims and is a module's `weight` (rates and bounds may have two dims, too).
    """
    embeddings = set()
    for m in model.modules():
        if isinstance(m, nn.Embedding):
            for p in m.parameters(recurse=False):
                embeddings.add(p)
    head = model.head_weight
    found: dict[nn.Parameter, Role] = {}
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


def updates_of(model: nn.Module, rule: OptimizerRule) -> dict[nn.Parameter, Update]:
    """The update of each parameter that learns."""
    found: dict[nn.Parameter, Update] = {}
    for parameter, role in roles(model).items():
        found[parameter] = update_of(rule, role, parameter)
    return found


def update_of(rule: OptimizerRule, role: Role, parameter: Tensor) -> Update:
    """The rule's update of a parameter; with optimizer.ema_decay its average is part of the
    state."""
    update = rule.update_of(role, parameter)
    if not rule.settings.ema_decay:
        return update
    return replace(update, state=(*update.state, AVERAGE))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its multiple of the step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
