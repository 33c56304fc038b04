"""The state of a run: all that a step changes, and which part of it each process writes."""

from dataclasses import dataclass
from threading import Event
from typing import TypedDict

import torch
from torch import Tensor

from longfire.checkpoint.shards import LocalTensor
from longfire.mlps.auxiliary import kept_buffers
from longfire.model import Model
from longfire.optim.average import EMA
from longfire.optim.state import refuse_undeclared_state, whole_state
from longfire.parallel.axes import SHARDS
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.sharding import WHOLE, global_shape, local, sharding_of, slices_of
from longfire.training.plateau import NO_VALIDATION, Plateau
from longfire.training.schedule import Plan

COUNTERS = ("step", "rows_consumed", "tokens", "skipped_steps", "elapsed_seconds")


class Counters(TypedDict):
    """What state.json holds of a State."""

    step: int
    rows_consumed: int
    tokens: int
    skipped_steps: int
    elapsed_seconds: float
    plan: Plan
    went_back_to: int
    plateau: Plateau


@dataclass
class State:
    """All that a step changes. The position in the data is one integer, so any number of processes
    can resume from it."""

    model: Model
    optimizer: torch.optim.Optimizer
    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    elapsed_seconds: float = 0.0  # of training: steps, and the evaluations and saves between them
    plan: Plan = ()  # of its steps, where they are planned (training/schedule.py)
    went_back_to: int = -1  # the step that checkpoint.load_step went back to last
    plateau: Plateau = NO_VALIDATION  # of the schedule of that name: its validations
    mesh: Mesh = ALONE  # the processes that share model and optimizer
    # happens when a save in the background has copied every tensor: until then none may change
    snapshot_done: Event | torch.cuda.Event | None = None

    def wait_for_snapshot(self) -> None:
        """Wait until a save has copied what the optimizer is about to change: most of it was
        copied while the step computed. (The event of a device makes its stream wait, and not the
        host.)"""
        if self.snapshot_done:
            self.snapshot_done.wait()
            self.snapshot_done = None

    def counters(self) -> Counters:
        """The numbers of the state, as state.json holds them."""
        return {
            "step": self.step,
            "rows_consumed": self.rows_consumed,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "elapsed_seconds": self.elapsed_seconds,
            "plan": self.plan,
            "went_back_to": self.went_back_to,
            "plateau": self.plateau,
        }

    def tensors(self, weights_only: bool = False) -> dict[str, Tensor]:
        """Every tensor of this process, not copied, under a flat name that depends on no device or
        layout: model/<parameter>, optimizer/<what>/<parameter>, rng/<device>. weights_only: those
        of the model, and their averages."""
        named = dict(self.model.named_parameters())
        tensors = {f"model/{name}": parameter.detach() for name, parameter in named.items()}
        for name, buffer in kept_buffers(self.model).items():
            tensors[f"model/{name}"] = buffer
        for name, parameter in named.items():
            for what, value in self.optimizer.state.get(parameter, {}).items():
                if what == EMA or not weights_only:
                    tensors[f"optimizer/{what}/{name}"] = value
        if weights_only:
            return tensors
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        return tensors

    def held(self, weights_only: bool = False) -> dict[str, LocalTensor]:
        """The same, each as the slices of the whole tensor that it consists of."""
        parts: dict[str, LocalTensor] = {}
        for name, tensor in self.tensors(weights_only).items():
            parts[name] = self.part(name, tensor)
        return parts

    def part(self, name: str, tensor: Tensor) -> LocalTensor:
        """The slices of a tensor that are on this process. State of the optimizer is sharded as its
        parameter is, unless its rule declares it whole."""
        if self.is_whole(name, tensor):
            spec = WHOLE
        else:
            spec = sharding_of(self.model, parameter_of(name))
        return LocalTensor(
            local(tensor),
            tuple(global_shape(tensor, spec)),
            slices_of(tensor, spec),
        )

    def is_whole(self, name: str, tensor: Tensor) -> bool:
        """Whether every process that holds anything of a tensor holds all of it."""
        kind, what, *_ = name.split("/")
        if kind == "optimizer" and what in whole_state(self.optimizer):
            return True
        return kind == "rng" or not tensor.dim() or self.is_buffer(parameter_of(name))

    def is_buffer(self, name: str) -> bool:
        """Whether a name of the model is that of a buffer."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        return leaf in dict(owner.named_buffers(recurse=False))

    def written(self, weights_only: bool = False) -> dict[str, LocalTensor]:
        """What this process writes: each slice of the run is written by one of the processes that
        hold it."""
        refuse_undeclared_state(self.optimizer)
        if self.mesh.rank("dp_replicate"):
            return {}
        held = self.held(weights_only)
        return {name: part for name, part in held.items() if self.writes(name, part)}

    def writes(self, name: str, held: LocalTensor) -> bool:
        """Whether this process, one of the first replica, writes its part of a tensor."""
        if name.startswith("rng/"):
            return self.mesh.rank() == 0
        spec = sharding_of(self.model, parameter_of(name))
        first_of_split = not self.mesh.rank("tp")
        if spec.is_copy or not (spec.split or first_of_split):
            return False
        first_of_shards = not self.mesh.rank(*SHARDS)
        return not self.is_whole(name, held.tensor) or (first_of_shards and first_of_split)


def parameter_of(name: str) -> str:
    """The parameter in the name of a tensor: model/<parameter>, optimizer/<what>/<parameter>."""
    return name.rpartition("/")[2]
