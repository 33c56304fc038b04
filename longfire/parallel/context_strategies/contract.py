"""What a context strategy is: how softmax attention goes over processes that share sequences.

One object in one file: how it runs, what it costs, and which heads it cannot share. It is given its
process groups, one for each mesh axis that it goes over. Today's three take one group. A ring over
all-to-all would take two, groups = (ring, heads): heads in exchange for tokens within `heads`, as
alltoall.py does, and in place of the local attention there that of ring.py within `ring`, on the
longer segments that the exchange makes.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from longfire.ops.attention import attention_reference
from longfire.ops.attention_blocks import Manner
from longfire.ops.sequence_ops import LocalSequence
from longfire.parallel.context_cost import AttentionHeads, CommunicationCost, Workload
from longfire.parallel.cost import Device
from longfire.parallel.layout import ContextShard


class Processes(NamedTuple):
    """The processes along one axis that share sequences, and this one's place among them.

    group: the name of their process group (collectives.known_as).
    """

    size: int
    rank: int
    group: str

    def away(self, steps: int) -> int:
        return (self.rank + steps) % self.size


@dataclass(frozen=True)
class AttentionCall:
    """What a layer asks of attention. noise_BT is None where nothing is dropped. local: which
    attention computes in one process."""

    local: LocalSequence
    window: int | None = None
    scale: float | None = None
    dropout: float = 0.0
    noise_BT: Tensor | None = None
    first_head: int = 0

    def manner(self, q: Tensor, v: Tensor) -> Manner:
        """The same for the engine that computes block by block."""
        made = Manner.of(
            q,
            v,
            self.window,
            self.scale,
            self.dropout,
            self.first_head,
        )
        fused = made.fused and self.local.attend is not attention_reference
        return made._replace(chunks=self.local.chunks, fused=fused)


class ContextStrategy(Protocol):
    """A way of softmax attention over processes; `name` is that of the setting."""

    name: str

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        shard: ContextShard,
        groups: tuple[Processes, ...],
    ) -> Tensor:
        """q (B, T, H, K), k (B, T, G, K), v (B, T, G, V) of the tokens here, in the shard's order
        -> (B, T, H, V) in q's dtype. Collective over the groups, its backward too."""
        ...

    def cost(
        self,
        heads: AttentionHeads,
        cut: Workload,
        device: Device,
    ) -> CommunicationCost:
        """What one layer sends and holds for a micro-batch."""
        ...

    def refusal(
        self,
        layer: str,
        heads: int,
        kv_heads: int,
        sizes: tuple[int, ...],
    ) -> str:
        """Why groups of these sizes cannot share a layer's heads (of one tensor-parallel process),
        with the fix; "" if they can."""
        ...
