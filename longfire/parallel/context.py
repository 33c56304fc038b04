"""One row over many processes: its tokens are cut among them, and what a mixer calls to look along
the sequence looks over all.

Mixers call `attend`, `recur`, `convolve` and `shift`, and know of no process. Here these attributes
are replaced by what gives the same numbers on segments (layout.py), with the `Share` that stands
for `documents` saying where they lie:

    attend           ring, all-gather or all-to-all of keys and values: ring.py
    recur            each segment's map of the state (ops/maps.py) goes to all processes once, S_in of each segment follows from
                     those before it, and the op runs as ever, from there
    convolve, shift  the last inputs of each segment go to all, and are the state before the next one

What is sent for recurrences and convolutions does not depend on the length of the row. All of it is
differentiable: the gradients of what was gathered are added up and scattered.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longfire.config.settings import Parallelism
from longfire.ops.attention import attention, attention_reference
from longfire.ops.blockwise import blockwise
from longfire.ops.documents import Documents
from longfire.ops.maps import RECURRENCES, Affine, Recurrence
from longfire.ops.short_conv import short_conv
from longfire.ops.token_shift import previous_token
from longfire.parallel import ring, strategy
from longfire.parallel.collectives import gathered, known_as, scattered
from longfire.parallel.layout import Layout, Share, keys_seen, segments_each
from longfire.parallel.mesh import Mesh
from longfire.parallel.strategy import DEGREE

SEAMS = ("attend", "recur", "convolve", "shift")


@dataclass
class Context:
    """The processes that share this process's rows, and how: what the step cuts batches with.

    asked: the layout, auto among them; softmax: whether some layers' work grows with what a token
    sees. multiple: what must divide the tokens of a process (tensor parallelism shares them
    further). balance: of the last rows, the most attention work of a process over the mean;
    padded_tokens: what they got at their ends, a row.
    """

    size: int
    rank: int
    group: str
    asked: str
    strategy: str
    softmax: bool
    multiple: int = 1
    balance: float = 1.0
    padded_tokens: int = 0

    def share(self, positions_BT: Tensor, documents: Documents | None) -> Share:
        """Where the tokens of these rows lie; the same on every process that shares them."""
        seen_BT, tokens = keys_seen(positions_BT), positions_BT.shape[1]
        kind = layout_kind(self.asked, self.softmax, documents is not None)
        layout = Layout.of_kind(kind, self.size, tokens, self.multiple, seen_BT.sum(0))
        self.balance = layout.balance(seen_BT) if self.softmax else 1.0
        self.padded_tokens = layout.filled - tokens
        return Share.of_rows(layout, self.rank, documents, len(positions_BT))

    def describe(self) -> dict[str, float]:
        """Of the last rows, for a step's record."""
        return {"context_balance": self.balance, "context_filled_tokens": self.padded_tokens}

    def cut(self, share: Share, x_BT: Tensor, fill: float = 0) -> Tensor:
        """What of the rows (B, T) is on this process, in memory of its own."""
        return share.layout.cut(x_BT, self.rank, fill)


def share_rows(model: nn.Module, mesh: Mesh, parallelism: Parallelism) -> Context:
    """Let the mixers and MLPs of a model look over all processes along cp, in place; the context
    that cuts its batches."""
    softmax = any(hasattr(module, "attend") for module in model.modules())
    tokens = mesh.size("tp") if parallelism.sequence_parallel else 1
    context = Context(
        mesh.size("cp"),
        mesh.rank("cp"),
        known_as(mesh.group("cp")),
        parallelism.context_parallel_layout,
        parallelism.context_parallel_strategy,
        softmax,
        tokens,
    )
    for module in model.modules():
        for seam in SEAMS:
            if hasattr(module, seam):
                setattr(module, seam, over_all(getattr(module, seam), context))
    return context


def layout_kind(asked: str, softmax: bool, documents: bool) -> str:
    """auto: work is even where it grows with the tokens alone, so only softmax attention asks for
    more than contiguous pieces."""
    if asked != "auto":
        return asked
    return "contiguous" if not softmax else "balanced" if documents else "zigzag"


def over_all(op: Callable, context: Context) -> Callable:
    """The same op on segments."""
    if (
        op in (attention, attention_reference) or getattr(op, "func", None) is blockwise
    ):  # as [attention] says
        return ring.attend_over(context.size, context.rank, context.group, context.strategy, op)
    if op is short_conv:
        return convolve_over(context.group)
    if op is previous_token:
        return shift_over(context.group)
    (recurrence,) = (one for one in RECURRENCES if one.op is op)
    return recur_over(recurrence, context.group)


def recur_over(recurrence: Recurrence, group: str) -> Callable:
    """A recurrence of which each process has some segments."""

    def recur(*inputs: Tensor | None, documents: Share, **options: Any) -> tuple[Tensor, None]:
        assert options.pop(recurrence.state, None) is None, "rows begin at their beginning"
        inputs = tuple(folded(x, documents) for x in inputs)
        options = {name: folded(x, documents) for name, x in options.items()} | {
            "documents": documents.folded
        }
        state_before = partial(states_before, share=documents, group=group)
        return documents.unfold(recurrence.on_segments(state_before, *inputs, **options)), None

    return recur


def folded(x: Any, share: Share) -> Any:
    """Segments as rows, of whatever has tokens: (B, T, ...); not of numbers, rates (H,) or (D,
    N)."""
    return share.fold(x) if isinstance(x, Tensor) and x.dim() > 2 else x


@torch.compiler.disable(reason="which segments are on this process may differ from row to row")
def states_before(mine: Affine, share: Share, group: str) -> Tensor:
    """The state before each segment here (B * each, ...), given the maps of these segments."""
    return _StatesBefore.apply(mine.transition, mine.write, mine.is_matrix, share, group)


class _StatesBefore(torch.autograd.Function):
    """One exchange each way. With s counting segments, D_s for the gradient of the state after s
    and G_s for that of the one before:

        before_{s+1} = M_s before_s + B_s                           0 where a document begins with s + 1
        D_s = G_{s+1} (0 where ...)   G_s = (from the outputs of s) + M_s^T D_s   d M_s = D_s before_s^T   d B_s = D_s

    One node in the graph of every process: those whose states depend on nobody must take part in
    the way back all the same.
    """

    @staticmethod
    def forward(
        ctx: Any, transition: Tensor, write: Tensor, is_matrix: bool, share: Share, group: str
    ) -> Tensor:
        transitions, writes = in_row_order(share, group, transition, write)
        state, before = torch.zeros_like(writes[:, 0]), {}
        for segment in range(share.mine[-1] + 1):
            before[segment] = state = where_it_goes_on(share, segment, state)
            state = Affine(transitions[:, segment], writes[:, segment], is_matrix)(state)
        mine = torch.stack([before[segment] for segment in share.mine], 1).flatten(0, 1)
        ctx.save_for_backward(transition, mine)
        ctx.is_matrix, ctx.share, ctx.group = is_matrix, share, group
        return mine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor) -> tuple[Tensor | None, ...]:
        transition, before = ctx.saved_tensors
        share, is_matrix = ctx.share, ctx.is_matrix
        transitions, d_befores = in_row_order(share, ctx.group, transition, d_before)
        later, d_after = torch.zeros_like(d_befores[:, 0]), {}
        for segment in range(share.layout.segments - 1, share.mine[0] - 1, -1):
            d_after[segment] = later
            back = transitions[:, segment].mT if is_matrix else transitions[:, segment]
            later = where_it_goes_on(
                share, segment, Affine(back, d_befores[:, segment], is_matrix)(later)
            )
        d_write = torch.stack([d_after[segment] for segment in share.mine], 1).flatten(0, 1)
        d_transition = (
            d_write @ before.mT if is_matrix else (d_write * before).sum_to_size(transition.shape)
        )
        return d_transition, d_write, None, None, None


def in_row_order(share: Share, group: str, *mine: Tensor) -> list[Tensor]:
    """Of what belongs to the segments here (B * each, ...): that of all segments, (B, segments,
    ...) each. One message."""
    packed = torch.cat([x.flatten(1) for x in mine], 1).unflatten(0, (-1, len(share.mine)))
    whole = gathered(packed, group)[:, share.layout.in_row_order()]
    parts = whole.split([x[0].numel() for x in mine], 2)
    return [part.unflatten(2, x.shape[1:]) for part, x in zip(parts, mine)]


def where_it_goes_on(share: Share, segment: int, state: Tensor) -> Tensor:
    """The state from before a segment; nothing where that was another document, or no segment."""
    if segment == 0:
        return torch.zeros_like(state)
    return torch.where(share.goes_on(1, segment).view(-1, *[1] * (state.dim() - 1)), state, 0.0)


def convolve_over(group: str) -> Callable:
    """A short convolution of which each process has some segments."""

    def convolve(
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None = None,
        *,
        silu: bool = True,
        state_BDW: None = None,
        documents: Share,
    ) -> tuple[Tensor, None]:
        assert state_BDW is None, "rows begin at their beginning"
        x, width = documents.fold(x_BTD), weight_DW.shape[1]
        before = inputs_before(x, width - 1, documents, group)
        y, _ = short_conv(
            x, weight_DW, bias_D, silu=silu, state_BDW=before.mT, documents=documents.folded
        )
        return documents.unfold(y), None

    return convolve


def shift_over(group: str) -> Callable:
    """A token shift of which each process has some segments."""

    def shift(x_BTD: Tensor, *, before_BD: None = None, documents: Share) -> tuple[Tensor, None]:
        assert before_BD is None, "rows begin at their beginning"
        x = documents.fold(x_BTD)
        y, _ = previous_token(
            x, before_BD=inputs_before(x, 1, documents, group)[:, 0], documents=documents.folded
        )
        return documents.unfold(y), None

    return shift


@torch.compiler.disable(reason="which segments are on this process may differ from row to row")
def inputs_before(x: Tensor, count: int, share: Share, group: str) -> Tensor:
    """The `count` inputs before each segment here: (B * each, length, D) -> (B * each, count, D);
    zeros for those of another document. A segment may be shorter than that."""
    kept = min(count, share.layout.length)
    return _InputsBefore.apply(x[:, -kept:], count, share, group)


class _InputsBefore(torch.autograd.Function):
    """The last inputs of all segments come to every process, and the gradients of those that were
    used go home."""

    @staticmethod
    def forward(ctx: Any, tails: Tensor, count: int, share: Share, group: str) -> Tensor:
        ctx.share, ctx.group, ctx.kept, ctx.count = share, group, tails.shape[1], count
        (tails_BSPD,) = in_row_order(share, group, tails)
        tails_BPD = tails_BSPD.flatten(1, 2)
        before = tails.new_zeros(len(tails_BPD), len(share.mine) * count, tails.shape[-1])
        for here, there, goes_on_B in sources(share, tails.shape[1], count):
            before[:, here] = torch.where(goes_on_B[:, None], tails_BPD[:, there], 0.0)
        return before.unflatten(1, (-1, count)).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor) -> tuple[Tensor | None, ...]:
        share, kept, each = ctx.share, ctx.kept, len(ctx.share.mine)
        d_before = d_before.unflatten(0, (-1, each)).flatten(1, 2)
        d_tails_BPD = d_before.new_zeros(
            len(d_before), share.layout.segments * kept, d_before.shape[-1]
        )
        for here, there, goes_on_B in sources(share, kept, ctx.count):
            d_tails_BPD[:, there] += torch.where(goes_on_B[:, None], d_before[:, here], 0.0)
        mine = scattered(
            d_tails_BPD.unflatten(1, (-1, kept))[:, share.layout.by_process()], ctx.group
        )
        return mine.flatten(0, 1), None, None, None


def sources(share: Share, kept: int, count: int) -> Iterator[tuple[int, int, Tensor]]:
    """Of each input before a segment here: its place among those (each * count), among the kept
    ones of all segments (segments * kept), and the rows (B,) in which it is of the same
    document."""
    length = share.layout.length
    for number, segment in enumerate(share.mine):
        for back in range(1, min(count, segment * length) + 1):
            place, within = divmod(segment * length - back, length)
            yield (
                (number + 1) * count - back,
                place * kept + within - (length - kept),
                share.goes_on(back, segment),
            )


def refusals(
    model: nn.Module, cp: int, tp: int, tokens: int, parallelism: Parallelism
) -> Iterator[str]:
    """What of a run with this whole model (on meta) so many processes cannot share, with the key,
    the number and the fix."""
    if cp == 1:
        return
    degree = f"{DEGREE} = {cp}"
    if model.head is None:
        yield f"{degree} cuts the rows of our own layers, not of model.backend = 'transformers'; set it to 1"
        return
    kinds = {name: module for module, name in parts_of(model)}
    for name, part in kinds.items():
        yield from unshareable(part, name, degree)
    softmax = {name: part for name, part in kinds.items() if hasattr(part, "attend")}
    # of rows of documents there are never more
    kind = layout_kind(parallelism.context_parallel_layout, bool(softmax), documents=False)
    segments = cp * segments_each(kind, cp, tokens)
    if tokens < segments:
        yield (
            f"training.seq_len = {tokens} is shorter than the {segments} segments that {degree} cuts a row into; lower the degree, or "
            "lengthen the rows"
        )
    for name, part in softmax.items():
        asked = parallelism.context_parallel_strategy
        if why := strategy.refusal(asked, name, part.heads // tp, part.kv_heads // tp, cp):
            yield why


def parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each mixer with the name that layer_types gives it, and MLPs that look back."""
    for block, mixer in zip(model.layers, model.config.layer_types):
        yield block.mixer, mixer
        if any(hasattr(block.mlp, seam) for seam in SEAMS):
            yield block.mlp, f"mlp {model.config.mlp}"


def unshareable(part: nn.Module, name: str, degree: str) -> Iterator[str]:
    """Why processes cannot share the rows of a mixer, or of an MLP."""
    known = {attention, short_conv, previous_token, *(one.op for one in RECURRENCES)}
    seams = {seam: getattr(part, seam) for seam in SEAMS if hasattr(part, seam)}
    if not seams or not getattr(part, "context", seams):
        yield (
            f"{degree}: {name} does not say how it looks along the sequence (context), or not by {', '.join(SEAMS)}, the seams that "
            "rows are shared by; set it to 1, or let the mixer declare its kinds of context and call one of these"
        )
    for seam, op in seams.items():
        if op not in known:
            yield (
                f"{degree}: {name}.{seam} is {getattr(op, '__name__', op)}, of which no map is known (ops/maps.py); set it to 1, or "
                "add its map to RECURRENCES"
            )
