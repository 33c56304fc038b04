"""Chunks that read the state before they write to it: what the delta rule and DPLR share.

Within a chunk what is written depends on the state, linearly: u = found + read S_in, and

    S_out = diag(whole) S_in + keys^T u + added

So a chunk is the map S_out = (diag(whole) + keys^T read) S_in + (keys^T found + added). Its K x K
matrix is made only where maps of chunks are composed (context parallelism); along a sequence the
two products with the state are fewer operations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longfire.ops.fast.chunkwise import below_diagonal, on_diagonal, plus_product


class LowRank(NamedTuple):
    """What each chunk does to the state: the file's equations. All (B, N, H, ...), N chunks."""

    whole: Tensor  # (K or 1, 1)
    keys: Tensor  # (C, K)
    found: Tensor  # (C, V)
    read: Tensor  # (C, K)
    added: Tensor | None = None  # (K, V)

    @property
    def transition(self) -> Tensor:
        """(B, N, H, K, K)."""
        whole = self.whole.squeeze(-1).expand(*self.keys.shape[:-2], self.keys.shape[-1])
        return torch.diag_embed(whole) + self.keys.mT @ self.read

    @property
    def write(self) -> Tensor:
        """(B, N, H, K, V)."""
        write = self.keys.mT @ self.found
        if self.added is None:
            return write
        return write + self.added


class Worked(NamedTuple):
    """What chunks come to before a state is known; `outputs` takes the state before each chunk, and
    u."""

    change: LowRank
    outputs: Callable[[Tensor, Tensor], Tensor]

    @property
    def transition(self) -> Tensor:
        return self.change.transition

    @property
    def write(self) -> Tensor:
        return self.change.write


def read(worked: Worked, states: Tensor) -> Tensor:
    """Outputs, given the state before each chunk."""
    found = worked.change.found
    read = worked.change.read
    return worked.outputs(states, found + read @ states)


def through_chunks(
    work: Callable[..., Worked], state: Tensor, *inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs and state after some tokens, given the state before them."""
    worked = work(*inputs)
    states, written, state = scan_low_rank(*worked.change, state)
    return worked.outputs(states, written), state


@torch.library.custom_op("longfire::scan_low_rank", mutates_args=())
def scan_low_rank(
    whole: Tensor,
    keys: Tensor,
    found: Tensor,
    read: Tensor,
    added: Tensor | None,
    state: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """u_n = found_n + read_n S and S <- whole_n S + keys_n^T u_n + added_n over the chunks n, from
    the last to the first if
    `reverse`: (the state before each, u, the last state). Shapes as in LowRank, state (B, H, K,
    V)."""
    chunks = range(keys.shape[1])
    states = list(keys.unbind(1))  # each is replaced
    written = list(keys.unbind(1))
    for n in reversed(chunks) if reverse else chunks:
        states[n], written[n] = state, plus_product(found[:, n], read[:, n], state)
        if added is None:
            state = whole[:, n] * state
        else:
            state = torch.addcmul(added[:, n], whole[:, n], state)
        state = plus_product(state, keys[:, n].mT, written[n])
    return (
        torch.stack(states, 1).contiguous(),
        torch.stack(written, 1).contiguous(),
        state.contiguous(),
    )


@scan_low_rank.register_fake
def scan_low_rank_shapes(
    whole: Tensor,
    keys: Tensor,
    found: Tensor,
    read: Tensor,
    added: Tensor | None,
    state: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, K, V = state.shape
    return (
        state.new_empty(B, keys.shape[1], H, K, V),
        found.new_empty(found.shape),
        state.new_empty(state.shape),
    )


def keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    whole, keys, _, read, added, _, ctx.reverse = inputs
    ctx.adds = added is not None
    ctx.save_for_backward(whole, keys, read, *output[:2])


def scan_gradients(
    ctx: Any, d_states: Tensor, d_written: Tensor, d_last: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient of the state is scanned the other way, with keys and read in each other's
    place."""
    whole, keys, read, states, written = ctx.saved_tensors
    d_after, d_found, d_state = scan_low_rank(
        whole, read, d_written, keys, d_states, d_last, not ctx.reverse
    )
    if ctx.needs_input_grad[0]:
        d_whole = (d_after * states).sum(-1, keepdim=True).sum_to_size(whole.shape)
    else:
        d_whole = None
    d_keys = written @ d_after.mT
    d_read = d_found @ states.mT
    return d_whole, d_keys, d_found, d_read, d_after if ctx.adds else None, d_state, None


scan_low_rank.register_autograd(scan_gradients, setup_context=keep_scan)


class UnitLowerSolve(torch.autograd.Function):
    """(I + the part of x below its diagonal)^-1 times a, and times b. The backward makes use of
    what was solved: with Y the solutions, d_a = solve^T d_Y and d_x = -d_a Y^T, where that of an
    inverse would be two products more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        inverse = unit_lower_inverse(x)
        of_a = inverse @ a
        of_b = inverse @ b
        ctx.save_for_backward(inverse, of_a, of_b)
        return of_a, of_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_of_a: Tensor, d_of_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse, of_a, of_b = ctx.saved_tensors
        d_a = inverse.mT @ d_of_a
        d_b = inverse.mT @ d_of_b
        d_x = (d_a @ of_a.mT).add_(d_b @ of_b.mT).tril_(-1).neg_()
        return d_x, d_a, d_b


# Rows of the blocks that are solved; larger ones are merged from them: at 64 rows in half the time
# on a CPU.
SOLVED = 16


def unit_lower_inverse(x: Tensor) -> Tensor:
    """The blocks on the diagonal are solved, and neighbours merged as (I + [[A, 0], [B, C]])^-1 =
    [[A', 0], [-C' B A', C']], with A' and C' their inverses. x (..., C, C), C a power of two."""
    size = min(x.shape[-1], SOLVED)
    inverse = torch.zeros_like(x)
    blocks = on_diagonal(x, size)
    eye = torch.eye(size, dtype=x.dtype, device=x.device).expand_as(blocks)
    solved = torch.linalg.solve_triangular(blocks, eye, upper=False, unitriangular=True)
    on_diagonal(inverse, size).copy_(solved)
    while size < x.shape[-1]:
        early, late = on_diagonal(inverse, size).unflatten(-3, (-1, 2)).unbind(-3)
        below_diagonal(inverse, size).copy_(late @ below_diagonal(x, size) @ early).neg_()
        size *= 2
    return inverse
