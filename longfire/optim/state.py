"""The state of an optimizer as a checkpoint has it: tensors named optimizer/<what>/<parameter>, of
which the rule declares how they are placed."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longfire.errors import CheckpointError
from longfire.optim.average import EMA
from longfire.optim.contract import StateTensor, Update


def update_of_group(group: Mapping[str, object]) -> Update | None:
    """What a group of a torch optimizer declares; None for one that was not made from a rule."""
    update = group.get("update")
    if isinstance(update, Update):
        return update
    return None


def declared_updates(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Update]:
    """The update of each parameter of an optimizer that was made from a rule."""
    found: dict[nn.Parameter, Update] = {}
    for group in optimizer.param_groups:
        update = update_of_group(group)
        if update is not None:
            found |= dict.fromkeys(group["params"], update)
    return found


def whole_state(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the state tensors that are not placed as their parameter is."""
    found: set[str] = set()
    for group in optimizer.param_groups:
        update = update_of_group(group)
        declared = () if update is None else update.state
        found |= {tensor.name for tensor in declared if not tensor.like_parameter}
    return found


def refuse_undeclared_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises CheckpointError when an optimizer keeps what its rule does not declare, or what is no
    tensor: the planner would not count it, and no checkpoint could keep it."""
    for parameter, update in declared_updates(optimizer).items():
        declared = {tensor.name for tensor in update.state}
        for name, value in optimizer.state.get(parameter, {}).items():
            if name not in declared or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"the optimizer keeps {name!r} ({type(value).__name__}) of a parameter, but "
                    f"its update {update.name!r} declares tensors named "
                    f"{', '.join(sorted(declared))}: correct `state` of the update, or what the "
                    "optimizer keeps"
                )


def states_of(
    names: Iterable[str],
    mine: Mapping[str, nn.Parameter],
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, kind and parameter of what a checkpoint keeps for the parameters on this process."""
    for name in names:
        kind, _, rest = name.partition("/")
        what, _, parameter = rest.partition("/")
        if kind == "optimizer" and parameter in mine:
            yield name, what, mine[parameter]


def refuse_another_optimizer(
    optimizer: torch.optim.Optimizer,
    dtypes: Mapping[str, torch.dtype],
    mine: Mapping[str, nn.Parameter],
    place: Path,
) -> None:
    """Raises CheckpointError when what a checkpoint keeps of a parameter is not what this optimizer
    keeps of it, or is of another type. (A parameter that has not learned yet has no state.)

    dtypes: of the tensors of the checkpoint, by name.
    """
    kept: dict[nn.Parameter, dict[str, torch.dtype]] = {}
    for name, what, parameter in states_of(dtypes, mine):
        kept.setdefault(parameter, {})[what] = dtypes[name]
    updates = declared_updates(optimizer)
    for name, parameter in mine.items():
        if parameter not in updates or parameter not in kept:
            continue
        wanted = {tensor.name for tensor in updates[parameter].state}
        for tensor in updates[parameter].state:
            refuse_another_type(tensor, kept[parameter].get(tensor.name), name, place)
        if kept[parameter].keys() ^ wanted == {EMA}:
            there = "an average" if EMA in kept[parameter] else "no average"
            raise CheckpointError(
                f"{place} keeps {there} of the weights: set optimizer.ema_decay as the run was "
                "begun with, or begin another run from its weights (model.weights, another "
                "job.dump_folder)"
            )
        if kept[parameter].keys() != wanted:
            raise CheckpointError(
                f"{place} is of another optimizer: it keeps {', '.join(sorted(kept[parameter]))} "
                f"of {name}, and the one of this run keeps {', '.join(sorted(wanted))}. Set "
                "optimizer.name to the one that it was trained with, or begin another run from its "
                "weights (model.weights, another job.dump_folder)"
            )


def refuse_another_type(
    declared: StateTensor, there: torch.dtype | None, name: str, place: Path
) -> None:
    """Raises CheckpointError when a checkpoint keeps a tensor, whose type a setting decides, in
    another one. there: None where it does not keep it."""
    wanted = declared.dtype or torch.float32
    narrow = torch.bfloat16 in (wanted, there)
    if there is not None and narrow and there != wanted:
        raise CheckpointError(
            f"{place} keeps {declared.name} of {name} in {there}, and the optimizer of this run in "
            f"{wanted}: set optimizer.momentum_dtype as the run was begun with"
        )
