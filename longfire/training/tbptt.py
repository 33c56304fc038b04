"""Sequences longer than memory: a sequence is cut in time, what its layers keep goes from segment
to segment, and gradients go back or not.

truncated  forward and backward of segment 1, then of 2 ...; what is carried over a seam is a
           number, no function of parameters (truncated backpropagation through time: Williams and
           Peng 1990). Memory: one segment, and the state.
exact      first forward through all segments, keeping the states at the seams; then from the last
           to the first each is computed again with its state as a leaf, and the gradient that
           arrives there is what the segment before begins its backward with (recomputation as in
           Chen 2016, along time). Memory: one segment, and a state for each seam. One forward more.

    states   0 ──► S1 ──► S2 ──► S3                  forward, nothing else is kept
             segment 1   segment 2   segment 3
             ◄── dS1 ◄────── dS2 ◄──────              backward, from the right: of the loss of
                                                      the segment and its last state

Softmax layers carry their keys and values, those of a window only where there is one; without a
window they are all that grows with the sequence. Labels, positions, documents and noise were made
for the whole sequence, so a segment is a piece of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longfire.config.settings import Training
from longfire.data.batch import Batch
from longfire.device import Clock
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence
from longfire.model import Model
from longfire.ops.documents import Documents
from longfire.training.lengths import segment_lengths

States = dict[
    int, dict[str, Tensor]
]  # by layer and name; of keys and values a tensor for each segment: "k/0", "k/1" ...


@dataclass(frozen=True)
class Segment:
    """A piece of the sequences of a batch, and its noise. goes_on_B: how many tokens before it
    belong to the document of each sequence's first token here; None where documents flow on."""

    batch: Batch
    noise_BT: Tensor | None
    continues_B: Tensor | None


def cut(batch: Batch, noise_BT: Tensor | None, segments: int) -> Iterator[Segment]:
    """The batch in so many pieces of time, of equal length but for the last, which may be
    shorter."""
    stop = 0
    for length in segment_lengths(batch.ids_BT.shape[1], segments):
        start = stop
        stop = stop + length
        of = slice(start, stop)
        noise = None if noise_BT is None else noise_BT[:, of]
        documents = continues_B = None
        if batch.documents is not None:
            ids_BT = batch.documents.ids_BT
            continues_B = (ids_BT[:, :start] == ids_BT[:, start : start + 1]).sum(1)
            documents = Documents.from_ids(ids_BT[:, of])
        piece = Batch(
            batch.ids_BT[:, of], batch.labels_BT[:, of], batch.positions_BT[:, of], documents
        )
        yield Segment(piece, noise, continues_B)


class CarriedState(Cache):
    """What the layers are given at the start of a segment, and what they leave at its end.

    They read from one place and write to another, so that a layer that is recomputed in the
    backward reads what it read before; nothing is changed in place, so that gradients can go
    through.
    """

    def __init__(self, before: States, continues_B: Tensor | None = None) -> None:
        super().__init__()
        self.before = before
        self.continues_B = continues_B
        self.here: dict[int, OneLayer] = {}

    def of(  # type: ignore[override]  # of a Cache, what a layer calls: kept, append, hidden_B
        self, layer: int
    ) -> "OneLayer":
        self.here[layer] = OneLayer(self.before.get(layer, {}), self.continues_B)
        return self.here[layer]

    @property
    def after(self) -> States:
        return {layer: here.after for layer, here in self.here.items()}


class OneLayer:
    """The same for one layer, which it need not name: compiled blocks then differ in no number, and
    are compiled once."""

    def __init__(self, before: dict[str, Tensor], continues_B: Tensor | None) -> None:
        self.before = before
        self.continues_B = continues_B
        self.after: dict[str, Tensor] = {}

    def kept(self, layer: int) -> "OneLayer":
        return self

    def get(self, name: str) -> Tensor | None:
        """What was kept, with zeros in the sequences whose document begins with the segment."""
        state = self.before.get(name)
        if state is None or self.continues_B is None:
            return state
        goes_on = (self.continues_B > 0).view(-1, *[1] * (state.dim() - 1))
        return torch.where(goes_on, state, 0.0)

    def __setitem__(self, name: str, state: Tensor) -> None:
        self.after[name] = state

    def append(self, layer: int, name: str, x_BTGK: Tensor, window: int = 0) -> Tensor:
        """All keys or values (B, S, G, K) that the segment's tokens may see, theirs last; carried
        on as they came, in parts."""
        parts = [part for key, part in self.before.items() if key.startswith(f"{name}/")]
        all_BSGK = torch.cat([*parts, x_BTGK], 1)
        T = x_BTGK.shape[1]
        seen = window - 1
        parts.append(x_BTGK[:, T - min(seen, T) :] if window else x_BTGK)
        if window:
            all_BSGK = all_BSGK[:, -(seen + T) :]
            parts = newest(parts, seen)
        self.after |= {f"{name}/{number}": part for number, part in enumerate(parts)}
        return all_BSGK

    def hidden_B(self, keys: int, tokens: int) -> Tensor | None:
        """How many of the keys are of other documents than the segment's first tokens."""
        if self.continues_B is None:
            return None
        return (keys - tokens - self.continues_B).clamp_min(0)


def newest(parts: list[Tensor], tokens: int) -> list[Tensor]:
    """As few of the last parts as hold so many tokens."""
    kept: list[Tensor] = []
    for part in reversed(parts):
        if sum(k.shape[1] for k in kept) < tokens:
            kept.insert(0, part)
    return kept


def by_segments(
    model: Model,
    batch: Batch,
    noise_BT: Tensor | None,
    training: Training,
    learn: Callable[..., Tensor],
    sync: Callable[[bool], None],
    clock: Clock,
) -> Tensor:
    """Forward and backward of a batch, cut as training.tbptt_segments and tbptt_exact say; the sum
    of the losses, without a graph.

    learn(model, batch, noise_BT=..., cache=...): the loss of a piece; their sum must be that of the
    whole. sync(last): called before each backward, as before those of microbatches.
    """
    pieces = list(cut(batch, noise_BT, training.tbptt_segments))
    walk = exact if training.tbptt_exact else truncated
    return torch.stack(list(walk(model, pieces, learn, sync, clock))).sum()


def truncated(
    model: Model,
    pieces: list[Segment],
    learn: Callable[..., Tensor],
    sync: Callable[[bool], None],
    clock: Clock,
) -> Iterator[Tensor]:
    """The losses of the pieces in order; no gradient passes a seam."""
    states: States = {}
    for number, piece in enumerate(pieces, 1):
        passed = CarriedState(states, piece.continues_B)
        with clock("forward"):
            loss = learn(model, piece.batch, noise_BT=piece.noise_BT, cache=passed)
        states = alone(passed.after)
        sync(number == len(pieces))
        with clock("backward"):
            loss.backward()
        yield loss.detach()


def exact(
    model: Model,
    pieces: list[Segment],
    learn: Callable[..., Tensor],
    sync: Callable[[bool], None],
    clock: Clock,
) -> Iterator[Tensor]:
    """The losses of the pieces, the last one's first; the gradients are those of the whole
    sequences."""
    with clock("forward"):
        seams = states_on_seams(model, pieces)
    arriving: States = {}  # gradients of what the segment leaves to the one after it
    for piece in reversed(pieces):
        before = seams.pop()
        for state in each(before):
            state.requires_grad_()
        passed = CarriedState(before, piece.continues_B)
        with clock("forward"):
            loss = learn(model, piece.batch, noise_BT=piece.noise_BT, cache=passed)
        sync(not seams)
        with clock("backward"):
            backward(loss, passed.after, arriving)
        arriving = alone(gradients_of(before))
        yield loss.detach()


def gradients_of(before: States) -> States:
    """The gradients of states, of those that have one."""
    gradients: States = {}
    for layer, states in before.items():
        gradients[layer] = {}
        for name, state in states.items():
            if state.grad is not None:
                gradients[layer][name] = state.grad
    return gradients


def backward(loss: Tensor, left: States, arriving: States) -> None:
    """The backward of the loss of a segment and of what it left, for which gradients have
    arrived."""
    pairs = [
        (left[layer][name], gradient)
        for layer, some in arriving.items()
        for name, gradient in some.items()
    ]
    pairs = [
        (state, gradient) for state, gradient in pairs if state.requires_grad
    ]  # else nothing that learns lies behind it
    torch.autograd.backward(
        [loss, *(s for s, _ in pairs)], [torch.ones_like(loss), *(g for _, g in pairs)]
    )


@torch.no_grad()
@torch.compiler.set_stance(
    "force_eager"
)  # without gradients: a compiled model would be compiled again
def states_on_seams(model: Model, pieces: list[Segment]) -> list[States]:
    """What each piece is given by those before it."""
    seams: list[States] = [{}]
    for piece in pieces[:-1]:
        batch = piece.batch
        passed = CarriedState(seams[-1], piece.continues_B)
        model(batch.ids_BT, Sequence(batch.positions_BT, batch.documents, passed, piece.noise_BT))
        seams.append(alone(passed.after))
    return seams


def each(states: States) -> Iterator[Tensor]:
    return (state for some in states.values() for state in some.values())


def alone(states: States) -> States:
    """The same numbers without a graph, and without the larger tensors that some are a piece of."""

    def of_its_own(state: Tensor) -> Tensor:
        state = state.detach()
        if state.untyped_storage().nbytes() > state.nbytes:
            return state.clone()
        return state

    found = {}
    for layer, some in states.items():
        found[layer] = {name: of_its_own(state) for name, state in some.items()}
    return found
