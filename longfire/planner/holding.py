"""What a process holds beside its parts: gathered shards, gradients on their way, what crosses the
cuts of sequences."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from longfire.config.settings import Parallelism
from longfire.ops.rounded_weights import matrices_rounded
from longfire.optim.contract import Update
from longfire.parallel.context_cost import CommunicationCost
from longfire.parallel.plan import reshards
from longfire.planner.forecast import Plan
from longfire.planner.part import MASTER_BYTES, pinned_bytes


class Group(NamedTuple):
    """Parameters that are gathered together: a block, or all that is in no block."""

    whole: int  # numbers, of this process's share of matrices
    shard: int  # of those, the first process's rows
    state: float  # bytes that the optimizer keeps for the shard
    temporary: float  # bytes that its update of the shard holds beside that
    pinned: float = 0.0  # bytes of copies of shard and state in pinned memory
    rounded: int = 0  # of the whole, what a step rounds more than once (ops/rounded_weights.py)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        shards: int,
        updates: Mapping[nn.Parameter, Update],
        rounded_to: torch.dtype = torch.float32,
        of_8_bits: Collection[nn.Module] = (),
    ) -> "Group":
        """updates: of the parameters that learn. rounded_to: the type that matrices multiply, but
        for those of 8-bit products."""
        whole = 0
        shard = 0
        state = 0.0
        temporary = 0.0
        pinned = 0.0
        for parameter in module.parameters():
            whole += parameter.numel()
            rows = len(parameter) if parameter.dim() else 1
            here = parameter.numel() // rows * -(-rows // shards)
            shard += here
            here_state = 0.0
            if parameter in updates:
                here_state = here * updates[parameter].state_bytes(parameter.dtype)
                temporary += here * updates[parameter].temporary_bytes
            state += here_state
            pinned += pinned_bytes(MASTER_BYTES * here) * (1 + here_state / (MASTER_BYTES * here))
        rounded = 0
        for matrix in matrices_rounded(module, rounded_to, without=of_8_bits):
            rounded += matrix.weight.numel()
        return cls(whole, shard, state, temporary, pinned, rounded)


NOTHING = Group(0, 0, 0.0, 0.0)


class FSDPMemory(NamedTuple):
    """What crossing the cuts of sequences makes a part hold, in bytes, more than one of the same
    length that is whole."""

    kept: float
    forward: float
    backward: float

    @classmethod
    def of(
        cls,
        exchanges: Sequence[CommunicationCost],
        again: bool,
    ) -> "FSDPMemory":
        """again: what is kept is dropped too, and made again in the backward."""
        kept = sum(one.kept for one in exchanges)
        forward = max((one.forward for one in exchanges), default=0.0)
        backward = max((one.backward for one in exchanges), default=0.0)
        if again:
            return cls(0.0, kept + forward, kept + max(forward, backward))
        return cls(kept, forward, backward)


class Shards:
    """What FSDP2 holds of a process's parts beside the shards themselves, in bytes; nothing where
    rows differ nowhere.

    A block's parameters are held twice while it runs, as they arrived and as they are used, and a
    third time, rounded, while they travel so; in the backward the second place is that of the next
    block's, which arrive meanwhile. What is in no block stays whole from its first use to the end
    of the step. Gradients are copied once to be sent, and the copy lives until the next block's is
    made.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Parallelism,
        names: list[int | str],
        group: dict[int | str, Group],
        sent_bytes: float = 4.0,
    ) -> None:
        """sent_bytes: of a number of a block on its way; what travels in fewer bytes than it is
        used in has a buffer of its own (parallel/parameter_gather.py)."""
        self.plan = plan
        self.names = names
        self.group = group
        self.offload = settings.cpu_offload
        self.wrapped = plan.data * plan.cp > 1 or self.offload
        self.sharded = plan.shards > 1 or self.offload
        self.each = 2 if settings.param_gather_dtype == "bfloat16" else 4
        self.copies = 2.0  # of a block while it runs
        if sent_bytes < self.each:
            self.copies += sent_bytes / self.each
        self.stays = not reshards(settings, plan.pp, plan.shards)
        # Gradients are whole between micro-batches where they are not scattered after each.
        self.accumulates = plan.microbatches > 1 and not (self.sharded and plan.pp == 1)
        self.always = self.whole(*(name for name in names if self.stays or isinstance(name, str)))

    @property
    def gradients_before(self) -> float:
        """What is held when a micro-batch after the first begins."""
        if self.accumulates:
            return float(MASTER_BYTES * sum(g.whole for g in self.group.values()))
        if self.plan.microbatches > 1:
            return sum(map(self.shard, self.names))
        return 0.0

    def gradient(self, name: int | str) -> float:
        """What a part's backward adds to them."""
        if self.plan.microbatches > 1:
            return 0.0
        return self.shard(name)

    def shard(self, name: int | str) -> float:
        """The gradient of the shard of a part, as far as it stays on the device."""
        if self.offload:
            return 0.0
        return float(MASTER_BYTES * self.group[name].shard)

    def whole(self, *names: int | str) -> float:
        """Parts as they are gathered; nothing where FSDP has nothing to share."""
        if self.wrapped:
            return float(self.each * sum(self.group[name].whole for name in names))
        return 0.0

    def of_block(self, name: int | str) -> float:
        """A block while it is gathered; the two ends, and what stays, are in `always`."""
        if isinstance(name, str) or self.stays:
            return 0.0
        return self.whole(name)

    def forward(self, name: int | str) -> float:
        return self.always + self.copies * self.of_block(name)

    def backward(self, name: int | str) -> float:
        """With the gradients of the part before, on their way."""
        after = self.names[self.names.index(name) + 1 :][:1]
        return self.always + self.copies * self.of_block(name) + sum(map(self.sent, after))

    def reduction(self, name: int | str) -> float:
        """When its gradients, whole, have been copied to be sent."""
        return (
            self.always
            + self.of_block(name)
            + (1 if self.accumulates else 2) * self.sent(name)
            + MASTER_BYTES * self.group[name].shard  # with cpu_offload before it leaves the device
        )

    def sent(self, name: int | str) -> float:
        """The copy of a part's gradients that is sent."""
        if self.wrapped:
            return float(MASTER_BYTES * self.group[name].whole)
        return 0.0
