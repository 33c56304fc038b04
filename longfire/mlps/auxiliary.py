"""What MLPs give beside their outputs: an auxiliary loss of each sequence, and statistics of a
step.

    block(x, seq) -> (x, Observed)     by return values alone, so that a part that is recomputed in
                                       the backward, or compiled, gives them once
    Model.blocks                       keeps both in `seq.observed`, by layer
    loss.loss_sum                      adds weight * loss_B * (labels of each sequence)
    update_buffers                     after the optimizer step, with the sums over all processes

A loss of a sequence needs the whole sequence in one process and one call, and the whole MLP: what
cuts these is refused by name (`refusals`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, mlp_of
from longfire.mixers.mixer import Observed
from longfire.mlps import MLPS
from longfire.mlps.contract import MLP

if TYPE_CHECKING:
    from longfire.model import Block


def with_auxiliary(layers: Iterable["Block"]) -> dict[int, MLP]:
    """The MLPs that have an auxiliary loss, by layer."""
    found: dict[int, MLP] = {}
    for block in layers:
        mlp = getattr(block, "mlp", None)  # layers of a class of transformers have none of ours
        if isinstance(mlp, MLP) and mlp.auxiliary_loss_weight is not None:
            found[block.mixer.layer] = mlp
    return found


def auxiliary_loss(
    layers: Iterable["Block"], observed: Mapping[int, Observed], labels_B: Tensor
) -> Tensor:
    """Sum over layers and sequences of weight * loss * labels, where labels_B counts those of each
    sequence: divided by all labels of a step it is the mean per token, as the loss is."""
    total = torch.zeros((), device=labels_B.device)
    for layer, mlp in with_auxiliary(layers).items():
        weight = mlp.auxiliary_loss_weight
        assert weight is not None, "with_auxiliary gives those that have one"
        loss_B = observed[layer].loss_B
        assert loss_B.shape == labels_B.shape, "an auxiliary loss is one number a sequence"
        total = total + weight * (loss_B.float() * labels_B).sum()
    return total


def keep_statistics(layers: Iterable["Block"], observed: Mapping[int, Observed]) -> None:
    """Add the statistics of a micro-batch to those of the step."""
    for layer, mlp in with_auxiliary(layers).items():
        new = observed[layer].statistics
        if new is not None:
            before = mlp.statistics_of_step
            mlp.statistics_of_step = new.detach() if before is None else before + new.detach()


def update_buffers(
    layers: Iterable["Block"], sum_over_processes: Callable[[Tensor], Tensor], keep: bool
) -> None:
    """End a step: give each MLP the sum of its statistics, unless the step was skipped (keep
    false). Collective where processes train together."""
    for mlp in with_auxiliary(layers).values():
        statistics = mlp.statistics_of_step
        mlp.statistics_of_step = None
        if statistics is not None and keep:
            with torch.no_grad():
                mlp.update(sum_over_processes(statistics))


def refusals(config: ModelConfig, asked: Mapping[str, str]) -> Iterator[str]:
    """Why a run cannot have MLPs with an auxiliary loss. asked: each setting that cuts sequences,
    MLPs or layers, or takes another loss, with what is to be written instead."""
    for name in dict.fromkeys(config.mlp_types):
        if mlp_of(name) not in MLPS or MLPS[mlp_of(name)].auxiliary_loss_weight is None:
            continue
        for setting, fix in asked.items():
            yield f"{setting}: the MLP {name} has an auxiliary loss of whole sequences; {fix}"


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of MLPs, by name: a checkpoint holds them beside the parameters. Every process
    has the whole of each."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, MLP):
            for leaf, buffer in module.named_buffers():
                found[f"{path}.{leaf}"] = buffer
    return found
