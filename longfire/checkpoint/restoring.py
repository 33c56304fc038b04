"""Reading a checkpoint into the state of a run, on whatever layout of processes wrote it, and
choosing the one to resume from."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longfire.checkpoint.folder import (
    checked_facts,
    checked_index,
    damage,
    facts_of,
    index_of,
    may_be_whole,
    recover,
    steps,
)
from longfire.checkpoint.shards import Entry, LocalTensor, Reader
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.errors import CheckpointError
from longfire.mlps.auxiliary import kept_buffers
from longfire.optim.average import EMA
from longfire.optim.state import refuse_another_optimizer, states_of, whole_state
from longfire.parallel.mesh import ALONE, Mesh
from longfire.training.plateau import Plateau
from longfire.training.schedule import Planned

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


def step_to_load(
    folder: Path, wanted: settings.Checkpoint, attempt: int = 0, mesh: Mesh = ALONE
) -> int | None:
    """The step that a run resumes from: load_step until the run has gone back to it, then the
    newest complete checkpoint; None if there is none.

    A run goes back once: the same command after a stop, and a restart by a launcher (`attempt`),
    resume from what was saved since. What was stopped before its first save after going back goes
    back again. Raises CheckpointError. Collective over the mesh.
    """
    asked = wanted.load_step
    if asked < 0:
        return newest(folder, mesh)
    is_asked_again = wanted.load_step_again and not attempt
    with mesh.raise_on_all_ranks():
        saved_since = [was_saved_after_going_back(folder, step, asked) for step in steps(folder)]
    has_gone_back = mesh.broadcast_object(any(saved_since))
    if is_asked_again or not has_gone_back:
        return asked
    step = newest(folder, mesh)
    again = "" if attempt else "; to go back once more, add --checkpoint.load_step_again"
    logger.info(
        f"checkpoint.load_step = {asked} was done before, and this run has continued to step "
        f"{step}{again}"
    )
    return step


def was_saved_after_going_back(
    folder: Path,
    step: int,
    asked: int,
) -> bool:
    """Whether the checkpoint of a step was saved after the run had gone back to step `asked`; not
    if it is damaged. Raises CheckpointError if it cannot be read, and may be whole."""
    if step <= asked:
        return False
    try:
        return facts_of(folder / f"step-{step}").get("went_back_to", -1) == asked
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and may_be_whole(error.__cause__):
            raise
        return False


def newest(folder: Path, mesh: Mesh = ALONE) -> int | None:
    """The step of the newest complete checkpoint; None if there are none. Raises CheckpointError if
    there are only damaged ones. Collective over the mesh: each process examines its share of the
    files."""
    with mesh.raise_on_all_ranks():
        if mesh.rank() == 0:
            recover(folder)
    damaged: list[str] = []
    for step in reversed(mesh.broadcast_object(steps(folder))):
        wrong = damage(folder / f"step-{step}", mesh)
        if wrong is None:
            return step
        damaged.append(wrong)
        logger.info(f"{wrong}; looking for an older one")
    if damaged:
        raise CheckpointError(
            f"{folder} has no complete checkpoint: {'; '.join(damaged)}. Restore one from a copy, "
            "or remove the folder to start anew"
        )
    return None


def load(
    state: State,
    place: Path,
    mesh: Mesh = ALONE,
    is_checked: bool = False,
) -> None:
    """Read into the state what this process has of it, bit for bit, from a checkpoint of any layout
    of processes. Collective over the mesh.

    is_checked: `newest` has just found its files complete. Raises CheckpointError naming the file
    or tensor that is wrong.
    """
    facts = facts_of(place) if is_checked else checked_facts(place, mesh)
    if facts["weights_only"] and facts["step"]:
        raise CheckpointError(
            f"{place} holds the model's weights only (checkpoint.model_weights_only) and cannot be "
            "resumed; export it and start from it with model.weights"
        )
    with mesh.raise_on_all_ranks():
        index = index_of(place)
    parameters = dict(state.model.named_parameters())
    tensors = {**parameters, **kept_buffers(state.model)}
    held: dict[str, LocalTensor] = {}
    for name, tensor in tensors.items():
        held[f"model/{name}"] = state.part(f"model/{name}", tensor.detach())
    check_names(shapes_of_model(index), shapes_of_run(held, mesh), place)
    with mesh.raise_on_all_ranks(), Reader(index) as reader, torch.no_grad():
        dtypes = {name: entry.dtype for name, entry in index.items()}
        refuse_another_optimizer(state.optimizer, dtypes, parameters, place)
        for name, part in held.items():
            reader.fill(part, name)
        for name, what, parameter in states_of(index, parameters):
            tensor = optimizer_state(reader, state, name, parameter)
            state.optimizer.state[parameter][what] = tensor
        if "rng/cpu" in index:
            torch.set_rng_state(reader.whole("rng/cpu"))
        if "rng/cuda" in index and torch.cuda.is_available():
            torch.cuda.set_rng_state(reader.whole("rng/cuda"))
    state.step = facts["step"]
    state.rows_consumed = facts["rows_consumed"]
    state.tokens = facts["tokens"]
    state.skipped_steps = facts["skipped_steps"]
    state.elapsed_seconds = facts["elapsed_seconds"]
    state.plan = tuple(Planned(*entry) for entry in facts.get("plan", ()))
    state.went_back_to = facts.get("went_back_to", -1)
    state.plateau = Plateau(*facts.get("plateau", ()))


def shapes_of_model(index: Mapping[str, Entry]) -> dict[str, Shape]:
    """The whole shape of each parameter in a checkpoint."""
    shapes: dict[str, Shape] = {}
    for name, entry in index.items():
        if name.startswith("model/"):
            shapes[name] = entry.shape
    return shapes


def shapes_of_run(held: Mapping[str, LocalTensor], mesh: Mesh) -> dict[str, Shape]:
    """The whole shape of each parameter of the run; with a pipeline each process has some of them.
    Collective over the mesh."""
    shapes: dict[str, Shape] = {}
    for of_one_process in mesh.all_gather_object({name: p.shape for name, p in held.items()}):
        shapes |= of_one_process
    return shapes


def optimizer_state(
    reader: Reader,
    state: State,
    name: str,
    parameter: nn.Parameter,
) -> Tensor:
    """A tensor of the optimizer's state on this process: sharded as its parameter is, or whole."""
    entry = reader.index[name]
    if not entry.shape:
        # a step counter: fused kernels have it on the parameter's device, torch's loop on the host
        device = parameter.device if state.optimizer.defaults.get("fused") else "cpu"
        return reader.whole(name).to(device)
    if name.split("/")[1] in whole_state(state.optimizer):
        return reader.whole(name).to(parameter.device)
    value = torch.empty_like(parameter, dtype=entry.dtype)
    reader.fill(state.part(name, value), name)
    return value


def check_names(
    there: Mapping[str, Shape],
    here: Mapping[str, Shape],
    place: Path,
) -> None:
    """Compare the parameters of a checkpoint (there) with those of the run (here). Raises
    CheckpointError naming those that are missing, extra or of another shape."""
    wrong = [f"{name} is missing" for name in here if name not in there]
    wrong += [f"{name} has no place in this model" for name in there if name not in here]
    for name in here:
        if name in there and there[name] != here[name]:
            wrong.append(f"{name} is {there[name]} there and {here[name]} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{place} is of another model: {'; '.join(wrong[:3])}{more}. Name its own "
            "model.config, or another job.dump_folder"
        )


def refuse_another_vocabulary(
    place: Path,
    vocabulary: str,
    named: str,
) -> None:
    """Raises CheckpointError when the ids of a checkpoint mean other text than those of this
    vocabulary; named: the setting or file that the vocabulary is from."""
    recorded = facts_of(place).get("vocabulary")
    if recorded and vocabulary and recorded != vocabulary:
        raise CheckpointError(
            f"{place} was trained with another tokenizer than {named}: the same ids mean other "
            "text. Take the tokenizer that it was trained with, or begin another run from its "
            "weights (model.weights, another job.dump_folder)"
        )


def load_model_weights(place: Path) -> dict[str, Tensor]:
    """The fp32 parameters of a complete checkpoint, by the model's own names. Raises
    CheckpointError."""
    return dict(OnDisk.at(place))


class OnDisk(Mapping[str, Tensor]):
    """The parameters of a checkpoint by the model's own names, each read when it is looked up:
    their averages where its run uses those."""

    def __init__(self, index: dict[str, Entry], uses_average: bool = False) -> None:
        self.reader = Reader(index)
        self.names = [name.removeprefix("model/") for name in index if name.startswith("model/")]
        self.uses_average = uses_average

    @classmethod
    def at(cls, place: Path) -> "OnDisk":
        """Those of a checkpoint that was found complete. Raises CheckpointError."""
        index = checked_index(place)
        return cls(index, facts_of(place).get("uses_average", False))

    def __getitem__(self, name: str) -> Tensor:
        average = f"optimizer/{EMA}/{name}"
        if self.uses_average and average in self.reader.index:
            return self.reader.whole(average)
        return self.reader.whole(f"model/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
