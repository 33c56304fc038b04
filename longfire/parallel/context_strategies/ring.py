"""Ring attention: keys and values go around the processes (Liu 2023).

Each process computes with those that are here while the next ones are on their way: n - 1 hops
forward. In the backward they go around again, n hops with their gradients in fp32, until these are
home. Where no process sees what has come so far around, it goes no further.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from longfire.ops.attention_blocks import first_seen
from longfire.ops.linear import working_dtype
from longfire.parallel import cost
from longfire.parallel.collectives import group_known_as
from longfire.parallel.context_cost import (
    BYTES,
    FULL,
    AttentionHeads,
    CommunicationCost,
    Workload,
    attention_seconds,
    uneven_seconds,
)
from longfire.parallel.context_strategies.contract import Processes
from longfire.parallel.context_strategies.key_blocks import KeyBlockStrategy, work
from longfire.parallel.cost import Device
from longfire.parallel.layout import ContextShard

# Tags of what travels.
KEYS = 0
GRADIENTS = 1


class Ring(KeyBlockStrategy):
    """Keys and values go around; what a hop's attention takes hides what a hop takes to arrive."""

    name = "ring"

    def come(
        self,
        mine: Tensor,
        shard: ContextShard,
        window: int | None,
        processes: Processes,
    ) -> Iterator[tuple[int, Tensor]]:
        return around(mine, farthest(shard, window), processes)

    def bring_home(
        self,
        mine: Tensor,
        shard: ContextShard,
        window: int | None,
        processes: Processes,
        meet: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        return brought_home(mine, farthest(shard, window), processes, meet)

    def cost(
        self,
        heads: AttentionHeads,
        cut: Workload,
        device: Device,
    ) -> CommunicationCost:
        """Two places for keys and values, one at work and one on its way; in the backward their
        gradients likewise, in fp32. Outputs of a hop and of all hops before it are fp32."""
        n = cut.processes
        numbers = cut.sequences * cut.here * heads.keys_values
        narrow = BYTES[cut.dtype]
        rate = cost.between_neighbours(device, n, cut.inner)
        hop = attention_seconds(heads, cut, device) / n
        there = cost.LATENCY + numbers * narrow / rate
        back = cost.LATENCY + numbers * (narrow + FULL) / rate
        waits = (1 + cut.again) * (n - 1) * max(0.0, there - hop) + n * max(0.0, back - 2 * hop)
        sent = (2 + cut.again) * (n - 1) * numbers * narrow + n * numbers * FULL
        outputs = cut.sequences * cut.here * heads.outputs * FULL
        queries = cut.sequences * cut.here * heads.queries * FULL
        return CommunicationCost(
            "keys, values: ring",
            sent,
            (1 + cut.again) * (n - 1) * there + n * back,
            waits,
            uneven_seconds(heads, cut, device),
            forward=2 * numbers * narrow + 2 * outputs,
            backward=2 * numbers * (narrow + FULL) + queries,
            hidden_by="attention",
        )


STRATEGY = Ring()


def farthest(shard: ContextShard, window: int | None) -> int:
    """Hops after which no process sees any more of the keys that come by."""
    if shard.flows and window is None:
        return len(shard.layout.places) - 1
    if window not in shard.hops:
        length = shard.layout.length
        # A segment's first token sees what any of the segment sees before it.
        looks_back: list[int] = []
        for first in range(0, shard.layout.padded_tokens, length):
            looks_back.append(first_seen(first, shard.starts, window) // length)
        shard.hops[window] = hops_needed(shard.layout.places, tuple(looks_back))
    return shard.hops[window]


@lru_cache(maxsize=1024)
def hops_needed(places: tuple[tuple[int, ...], ...], looks_back: tuple[int, ...]) -> int:
    """looks_back: the first segment that each segment sees any of."""
    home: dict[int, int] = {}
    for rank, place in enumerate(places):
        home.update(dict.fromkeys(place, rank))
    hops = 0
    for segment, first in enumerate(looks_back):
        for seen in range(first, segment + 1):
            hops = max(hops, (home[segment] - home[seen]) % len(places))
    return hops


class Parcel:
    """A tensor on its way to another process while one of the same shape is on its way here."""

    def __init__(
        self,
        x: Tensor,
        to: int,
        coming_from: int,
        processes: Processes,
        tag: int,
    ) -> None:
        group = group_known_as(processes.group)
        self.sent = x  # it must live until it has left
        self.room = torch.empty_like(x)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(
                    dist.isend,
                    self.sent,
                    group=group,
                    tag=tag,
                    group_peer=to,
                ),
                dist.P2POp(
                    dist.irecv,
                    self.room,
                    group=group,
                    tag=tag,
                    group_peer=coming_from,
                ),
            ]
        )
        work.sent_bytes += x.nbytes
        work.hops += tag == KEYS

    def arrived(self) -> Tensor:
        for one in self.works:
            one.wait()
        return self.room


def around(
    kv: Tensor,
    hops: int,
    processes: Processes,
) -> Iterator[tuple[int, Tensor]]:
    """(process, its keys and values), the own ones first, then those of the processes before it,
    the nearest first. The next ones come while these are in use; the last ones are not sent on."""
    for hop in range(hops + 1):
        coming = None
        if hop < hops:
            coming = Parcel(
                kv,
                processes.away(1),
                processes.away(-1),
                processes,
                KEYS,
            )
        yield processes.away(-hop), kv
        if coming is not None:
            kv = coming.arrived()


def brought_home(
    mine: Tensor,
    hops: int,
    processes: Processes,
    meet: Callable[[int, Tensor, Tensor], None],
) -> Tensor:
    """The gradient of the keys and values here, of all queries: it goes around with them one hop
    behind, and from the last process straight home."""
    carried = None
    for hop, (source, kv) in enumerate(around(mine, hops, processes)):
        d_kv = torch.zeros_like(kv, dtype=working_dtype(kv))
        meet(source, kv, d_kv)
        if carried is not None:
            d_kv += carried.arrived()
        if hops:
            steps = 1 if hop < hops else -hops
            carried = Parcel(
                d_kv,
                processes.away(steps),
                processes.away(-steps),
                processes,
                GRADIENTS,
            )
    if carried is None:
        return d_kv
    return carried.arrived()
