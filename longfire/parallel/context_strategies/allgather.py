"""All keys and values of the sequence come to every process at once (Llama 3, section 3.3.2).

In the backward they are gathered again, and their gradients in fp32 go back by a reduce-scatter.
Nothing hides what these take.
"""

from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor

from longfire.ops.linear import working_dtype
from longfire.parallel import cost
from longfire.parallel.collectives import group_known_as
from longfire.parallel.context_cost import (
    BYTES,
    FULL,
    AttentionHeads,
    CommunicationCost,
    Workload,
    uneven_seconds,
)
from longfire.parallel.context_strategies.contract import Processes
from longfire.parallel.context_strategies.key_blocks import KeyBlockStrategy, work
from longfire.parallel.cost import Device
from longfire.parallel.layout import ContextShard


class AllGather(KeyBlockStrategy):
    """One message each way, and the memory of the whole sequence's keys and values."""

    name = "allgather"

    def come(
        self,
        mine: Tensor,
        shard: ContextShard,
        window: int | None,
        processes: Processes,
    ) -> Iterator[tuple[int, Tensor]]:
        return all_at_once(mine, processes)

    def bring_home(
        self,
        mine: Tensor,
        shard: ContextShard,
        window: int | None,
        processes: Processes,
        meet: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        return scattered_home(mine, processes, meet)

    def cost(
        self,
        heads: AttentionHeads,
        cut: Workload,
        device: Device,
    ) -> CommunicationCost:
        """Keys and values of the whole sequence, and in the backward their gradients in fp32."""
        n = cut.processes
        numbers = cut.sequences * cut.here * heads.keys_values
        narrow = BYTES[cut.dtype]
        gathers = 2 + cut.again
        sent = (n - 1) * numbers * (gathers * narrow + FULL)
        seconds = (
            sent / cost.bandwidth(device, n, cut.inner) + (gathers + 1) * (n - 1) * cost.LATENCY
        )
        return CommunicationCost(
            "keys, values: all-gather, reduce-scatter",
            sent,
            seconds,
            seconds,
            uneven_seconds(heads, cut, device),
            forward=n * numbers * narrow,
            backward=n * numbers * (narrow + FULL),
        )


STRATEGY = AllGather()


def all_at_once(kv: Tensor, processes: Processes) -> Iterator[tuple[int, Tensor]]:
    """(process, its keys and values) of all, the own ones first."""
    everyones = kv[None]
    if processes.size > 1:
        everyones = kv.new_empty(processes.size, kv.numel())
        dist.all_gather_single(everyones.view(-1), kv, group=group_known_as(processes.group))
        work.sent_bytes += kv.nbytes * (processes.size - 1)
    for hop in range(processes.size):
        yield processes.away(-hop), everyones[processes.away(-hop)]


def scattered_home(
    kv: Tensor,
    processes: Processes,
    meet: Callable[[int, Tensor, Tensor], None],
) -> Tensor:
    """The gradient of the keys and values here, of all queries. They are gathered again: kept, they
    would be the whole sequence's."""
    d_everyones = kv.new_zeros(processes.size, kv.numel(), dtype=working_dtype(kv))
    for source, others in all_at_once(kv, processes):
        meet(source, others, d_everyones[source])
    if processes.size == 1:
        return d_everyones[0]
    d_kv = d_everyones.new_empty(kv.numel())
    dist.reduce_scatter_single(d_kv, d_everyones.view(-1), group=group_known_as(processes.group))
    work.sent_bytes += d_kv.nbytes * (processes.size - 1)
    return d_kv
