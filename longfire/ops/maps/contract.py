"""The map of a segment, and what is known of a recurrence over segments."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.fast.chunkwise import scan, segments_of
from longfire.ops.forms import chosen

STATE = "initial_state_BHKV"
OF_KERNELS = ("fla", "memory")  # forms: kernels, and what a planner takes them to hold


class Affine(NamedTuple):
    """state -> transition state + write: what some tokens do to the state. transition: a matrix (B,
    H, K, K), or numbers that fit the state's shape."""

    transition: Tensor
    write: Tensor
    is_matrix: bool

    def __call__(self, state: Tensor) -> Tensor:
        moved = self.transition @ state if self.is_matrix else self.transition * state
        return moved + self.write


class Recurrence(NamedTuple):
    """An op, its map, the name under which it takes the state before the row; and what makes map
    and outputs at once: `around` where our own form runs, which works on the chunks once, and
    `by_kernels` where kernels do."""

    op: Callable[..., tuple[Tensor, Tensor]]
    map: Callable[..., Affine]
    state: str
    around: Callable[..., Tensor] | None = None
    by_kernels: Callable[..., Tensor] | None = None

    def on_segments(
        self, state_before: Callable[[Affine], Tensor], *inputs: Tensor | None, **options: Any
    ) -> Tensor:
        """The outputs of segments as rows (B * each, length, ...), given what makes the state
        before each of the map of each."""
        form = chosen(self.op.__name__)
        if self.by_kernels and form in OF_KERNELS:
            return self.by_kernels(self.op, state_before, *inputs, **options)
        if self.around and form == "torch" and shares_chunks(inputs, options):
            return self.around(
                *inputs,
                **{k: x for k, x in options.items() if k != "gv"},
                state_before=state_before,
            )
        before = state_before(self.map(*inputs, **options))
        return self.op(*inputs, **{self.state: before}, **options)[0]


def shares_chunks(inputs: tuple[Tensor | None, ...], options: dict[str, Any]) -> bool:
    """Whether the state's chunks lie as its channels do: not where values decay too, nor where
    heads of v share keys."""
    _, keys, values, *_ = inputs
    assert keys is not None and values is not None
    return options.get("gv") is None and keys.shape[2] == values.shape[2]


def folded(chunks: Iterable[tuple[Tensor, Tensor]]) -> Affine:
    """The map of all chunks, given (transition, write) of each, (B, N, H, K, ...) of some chunks at
    a time, in order.

    Matrices are folded up from the left: the state that began as zero is carried beside the one
    that began as the identity.
    """
    whole: Tensor | None = None
    state: Tensor | None = None
    for transition, write in chunks:
        is_matrix = transition.shape[-1] != 1
        B, _, H, K, V = write.shape
        if state is None:
            state = write.new_zeros(B, H, K, V)
            if is_matrix:
                state = torch.cat(
                    [
                        state,
                        torch.eye(K, dtype=write.dtype, device=write.device).expand(B, H, K, K),
                    ],
                    -1,
                )
        state = scan(transition, F.pad(write, (0, K)) if is_matrix else write, state)[1]
        if not is_matrix:
            some = transition.prod(1)
            whole = some if whole is None else whole * some
    assert state is not None, "a row has a chunk"
    if not is_matrix:
        assert whole is not None
        return Affine(whole.expand(B, H, -1, -1), state, is_matrix)
    write, transition = state.split((V, K), -1)
    return Affine(transition, write, is_matrix)


def around(
    work: Callable[..., Any],
    read: Callable[[Any, Tensor], Tensor],
    inputs: tuple[Tensor | None, ...],
    state_before: Callable[[Affine], Tensor],
) -> Tensor:
    """Outputs of tokens whose state before them follows from their own map (and those of others):
    the chunks are worked on once, for the map and for the outputs. work(*inputs) gives what has a
    `transition` and a `write`; read(that, states) the outputs."""
    worked = [work(*segment) for segment in segments_of(inputs)]
    maps = [(one.transition, one.write) for one in worked]
    state = state_before(folded(maps))
    outputs = []
    for one, (transition, write) in zip(worked, maps):
        states, state = scan(transition, write, state)
        outputs.append(read(one, states))
    return torch.cat(outputs, 1)
