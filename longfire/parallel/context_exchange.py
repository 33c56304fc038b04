"""What crosses the cuts of a sequence for recurrences, convolutions and token shifts: maps of
states and the last inputs of segments, one message each way."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.maps.contract import Affine
from longfire.parallel.autograd_context import SavedTensors
from longfire.parallel.collectives import gathered, scattered
from longfire.parallel.layout import ContextShard


@torch.compiler.disable(
    reason="which segments are on this process may differ from sequence to sequence"
)
def states_before(
    mine: Affine,
    shard: ContextShard,
    group: str,
) -> Tensor:
    """The state before each segment here (B * each, ...), given the maps of these segments."""
    return _StatesBefore.apply(
        mine.transition,
        mine.write,
        mine.is_matrix,
        shard,
        group,
    )


class StatesContext(SavedTensors):
    """What the forward of _StatesBefore leaves for its backward."""

    is_matrix: bool
    shard: ContextShard
    group: str


class _StatesBefore(torch.autograd.Function):
    """One exchange each way. With s counting segments, D_s for the gradient of the state after s
    and G_s for that of the one before:

        before_{s+1} = M_s before_s + B_s       0 where a document begins with s + 1
        D_s   = G_{s+1}                         0 there too
        G_s   = (from the outputs of s) + M_s^T D_s
        d M_s = D_s before_s^T
        d B_s = D_s

    One node in the graph of every process: those whose states depend on nobody must take part in
    the way back all the same.
    """

    @staticmethod
    def forward(
        ctx: StatesContext,
        transition: Tensor,
        write: Tensor,
        is_matrix: bool,
        shard: ContextShard,
        group: str,
    ) -> Tensor:
        transitions, writes = in_sequence_order(shard, group, transition, write)
        state = torch.zeros_like(writes[:, 0])
        before: dict[int, Tensor] = {}
        for segment in range(shard.mine[-1] + 1):
            state = continuing_state(shard, segment, state)
            before[segment] = state
            affine = Affine(transitions[:, segment], writes[:, segment], is_matrix)
            state = affine(state)
        mine = torch.stack([before[segment] for segment in shard.mine], 1).flatten(0, 1)
        ctx.save_for_backward(transition, mine)
        ctx.is_matrix = is_matrix
        ctx.shard = shard
        ctx.group = group
        return mine

    @staticmethod
    @once_differentiable
    def backward(ctx: StatesContext, d_before: Tensor) -> tuple[Tensor | None, ...]:
        transition, before = ctx.saved_tensors
        shard = ctx.shard
        is_matrix = ctx.is_matrix
        transitions, d_befores = in_sequence_order(shard, ctx.group, transition, d_before)
        later = torch.zeros_like(d_befores[:, 0])
        d_after: dict[int, Tensor] = {}
        for segment in range(shard.layout.segments - 1, shard.mine[0] - 1, -1):
            d_after[segment] = later
            back = transitions[:, segment]
            if is_matrix:
                back = back.mT
            affine = Affine(back, d_befores[:, segment], is_matrix)
            later = continuing_state(shard, segment, affine(later))
        d_write = torch.stack([d_after[segment] for segment in shard.mine], 1).flatten(0, 1)
        if is_matrix:
            d_transition = d_write @ before.mT
        else:
            d_transition = (d_write * before).sum_to_size(transition.shape)
        return d_transition, d_write, None, None, None


def in_sequence_order(
    shard: ContextShard,
    group: str,
    *mine: Tensor,
) -> list[Tensor]:
    """Of what belongs to the segments here (B * each, ...): that of all segments, (B, segments,
    ...) each. One message."""
    packed = torch.cat([x.flatten(1) for x in mine], 1).unflatten(0, (-1, len(shard.mine)))
    whole = gathered(packed, group)[:, shard.layout.in_sequence_order()]
    parts = whole.split([x[0].numel() for x in mine], 2)
    return [part.unflatten(2, x.shape[1:]) for part, x in zip(parts, mine)]


def continuing_state(
    shard: ContextShard,
    segment: int,
    state: Tensor,
) -> Tensor:
    """The state from before a segment; nothing where that was another document, or no segment."""
    if segment == 0:
        return torch.zeros_like(state)
    continues_B = shard.continues(1, segment)
    ones = [1] * (state.dim() - 1)
    return torch.where(continues_B.view(-1, *ones), state, 0.0)


@torch.compiler.disable(
    reason="which segments are on this process may differ from sequence to sequence"
)
def inputs_before(
    x: Tensor,
    count: int,
    shard: ContextShard,
    group: str,
) -> Tensor:
    """The `count` inputs before each segment here: (B * each, length, D) -> (B * each, count, D);
    zeros for those of another document. A segment may be shorter than that."""
    kept = min(count, shard.layout.length)
    return _InputsBefore.apply(x[:, -kept:], count, shard, group)


class InputsContext(SavedTensors):
    """What the forward of _InputsBefore leaves for its backward."""

    shard: ContextShard
    group: str
    kept: int  # inputs of each segment that were sent
    count: int  # inputs before each segment that were asked for


class _InputsBefore(torch.autograd.Function):
    """The last inputs of all segments come to every process, and the gradients of those that were
    used go home."""

    @staticmethod
    def forward(
        ctx: InputsContext,
        tails: Tensor,
        count: int,
        shard: ContextShard,
        group: str,
    ) -> Tensor:
        ctx.shard = shard
        ctx.group = group
        ctx.kept = tails.shape[1]
        ctx.count = count
        (tails_BSPD,) = in_sequence_order(shard, group, tails)
        tails_BPD = tails_BSPD.flatten(1, 2)
        before = tails.new_zeros(len(tails_BPD), len(shard.mine) * count, tails.shape[-1])
        for here, there, continues_B in sources(shard, tails.shape[1], count):
            before[:, here] = torch.where(continues_B[:, None], tails_BPD[:, there], 0.0)
        return before.unflatten(1, (-1, count)).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: InputsContext, d_before: Tensor) -> tuple[Tensor | None, ...]:
        shard = ctx.shard
        kept = ctx.kept
        each = len(shard.mine)
        d_before = d_before.unflatten(0, (-1, each)).flatten(1, 2)
        d_tails_BPD = d_before.new_zeros(
            len(d_before),
            shard.layout.segments * kept,
            d_before.shape[-1],
        )
        for here, there, continues_B in sources(shard, kept, ctx.count):
            d_tails_BPD[:, there] += torch.where(continues_B[:, None], d_before[:, here], 0.0)
        d_tails_BSPD = d_tails_BPD.unflatten(1, (-1, kept))
        mine = scattered(d_tails_BSPD[:, shard.layout.by_rank()], ctx.group)
        return mine.flatten(0, 1), None, None, None


def sources(
    shard: ContextShard,
    kept: int,
    count: int,
) -> Iterator[tuple[int, int, Tensor]]:
    """Of each input before a segment here: its place among those (each * count), among the kept
    ones of all segments (segments * kept), and the sequences (B,) in which it is of the same
    document."""
    length = shard.layout.length
    for number, segment in enumerate(shard.mine):
        for back in range(1, min(count, segment * length) + 1):
            place, within = divmod(segment * length - back, length)
            yield (
                (number + 1) * count - back,
                place * kept + within - (length - kept),
                shard.continues(back, segment),
            )
