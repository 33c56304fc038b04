"""What every chunkwise recurrence is made of: chunks, products of decays inside a chunk, the scan
of the state over chunks.

A state that decays and is written to, S_t = diag(a_t) S_{t-1} + k_t u_t^T, read by o_t = S_t^T q_t,
is cut into chunks of C tokens. Inside one chunk, with i and j counted from its start,

    o_i   = (q_i a_1..a_i)^T S_in + sum_{j<=i} P_ij u_j      P_ij = sum_K q_i k_j a_{j+1}..a_i
    S_out = diag(a_1..a_C) S_in   + sum_j (k_j a_{j+1}..a_C) u_j^T

so a chunk needs four things made of products of decays (`Decayed`), and the rest is matrix
products. `DecayTree` makes the four by merging neighbours, as a merge sort does. With C = 4 (q1
stands for the first query, a1 for its decay):

    blocks of 1:  from_start q1a1 q2a2   q3a3 q4a4     to_end k1   k2 k3   k4   whole a1 a2 a3 a4
    blocks of 2:  P21 = (q2a2).k1, P43 = (q4a4).k3
                  from_start q1a1 q2a2a1 q3a3 q4a4a3   to_end k1a2 k2 k3a4 k4   whole a1a2 a3a4
    blocks of 4:  P31 = (q3a3).(k1a2), P32 = (q3a3).k2, P41 = (q4a4a3).(k1a2), P42 = (q4a4a3).k2

Each pair i > j meets once, when its two blocks merge, and its decay is (product up to i) x (product
down to j) from the seam between them. Nothing is divided and no logarithms are subtracted: any
decay in [0, 1] is exact to rounding, and so is its gradient. (GLA's secondary chunking, Yang 2023
section 4.3, keeps exp(G_i - G_j) in range with one seam per sub-chunk; here every pair has its
own.) A document start is nothing but a step whose decay is 0.
"""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longfire.ops.linear import working_dtype
from longfire.ops.pretending import as_on_cuda

# tokens. 32 and 128 were slower by 5 to 40 % on a 2-core CPU (B 1, T 2048, H 4, K 64, V 128).
CHUNK = 64
# Numbers of all inputs together that are worked on at a time on a CPU: 8 MiB, so that what is made
# of them stays in cache. With four times as many DPLR takes 1.1 to 1.35 times as long, vector
# decays up to 1.2; scalar decays 0.96 to 1.01.
SEGMENT_NUMBERS = 2**21


def chunk_size(tokens: int) -> int:
    """CHUNK, or the power of two that holds a shorter row (1 when generating)."""
    return min(CHUNK, 1 << (tokens - 1).bit_length())


def in_chunks(x_BTHX: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """(B, T, H, X) -> (B, N, H, C, X), a view, unless a last chunk that is not full has to be
    filled up."""
    missing = -x_BTHX.shape[1] % size
    if missing:
        x_BTHX = torch.nn.functional.pad(x_BTHX, (0, 0, 0, 0, 0, missing), value=fill)
    return x_BTHX.unflatten(1, (-1, size)).transpose(2, 3)


def chunked(x_BTHX: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """The same, contiguous: what matrix products take without a copy."""
    return in_chunks(x_BTHX, size, fill).contiguous()


def scaled(q_BTHK: Tensor, scale: float) -> Tensor:
    """q * scale in the working dtype; q itself, and no pass over memory, if scale is 1."""
    q_BTHK = q_BTHK.to(working_dtype(q_BTHK))
    if scale == 1:
        return q_BTHK
    return q_BTHK * scale


def unchunked(x_BNHCX: Tensor, tokens: int) -> Tensor:
    """(B, N, H, C, X) -> (B, T, H, X)."""
    return x_BNHCX.transpose(2, 3).flatten(1, 2)[:, :tokens]


def step_decays(g: Tensor | None, continues_BT: Tensor | None, like_BTHK: Tensor) -> Tensor:
    """exp(g) as (1 or B, T, 1 or H, 1 or K), 0 where a document starts. g: None, (H,), (B, T, H) or
    (B, T, H, K)."""
    T = like_BTHK.shape[1]
    dtype = working_dtype(like_BTHK)
    if g is None:
        decay = like_BTHK.new_ones(1, T, 1, 1, dtype=dtype)
    else:
        g = g.to(dtype)  # first: what expands is summed in the backward
        g = g.expand(1, T, -1) if g.dim() == 1 else g
        decay = (g if g.dim() == 4 else g[..., None]).exp()
    if continues_BT is None:
        return decay
    return torch.where(continues_BT[:, :, None, None], decay, 0.0)


class Decayed(NamedTuple):
    """What a chunk needs; lists have one entry per set of queries, or of keys."""

    # For each set of queries, of each set of keys (..., C, C) lower triangular: P_ij.
    products: list[list[Tensor]]
    from_start: list[Tensor]  # (..., C, K): q_i a_1..a_i
    to_end: list[Tensor]  # (..., C, K): k_j a_{j+1}..a_C
    whole: Tensor  # (..., K or 1, 1): a_1..a_C, ready to multiply a state


def decayed(queries: list[Tensor], keys: list[Tensor], decay: Tensor) -> Decayed:
    """queries and keys (..., C, K), decay (..., C, K) or one for all channels (..., C, 1); C a
    power of two. Queries and keys may be views `in_chunks`: the tree copies them anyway."""
    if decay.shape[-1] == keys[0].shape[-1] != 1:
        whole, to_end, from_start, products = decay_tree(decay, keys, queries)
        products = list(products.unbind(-3))
        by_query = []
        for i in range(0, len(products), len(keys)):
            by_query.append(products[i : i + len(keys)])
        return Decayed(by_query, list(from_start.unbind(-2)), list(to_end.unbind(-2)), whole.mT)
    queries = [query.contiguous() for query in queries]
    keys = [key.contiguous() for key in keys]
    whole, to_end, from_start, pairs = decays_alone(decay)
    products = []
    for query in queries:
        products.append([(query @ key.mT) * pairs for key in keys])
    return Decayed(
        products,
        [query * from_start for query in queries],
        [key * to_end for key in keys],
        whole.mT,
    )


def decays_alone(decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one decay for all channels (..., C, 1): whole, to_end, from_start and those of pairs (...,
    C, C), the tree of ones."""
    ones = torch.ones_like(decay)
    whole, to_end, from_start, products = decay_tree(decay, [ones], [ones])
    return whole, to_end.squeeze(-2), from_start.squeeze(-2), products.squeeze(-3)


# The tree and the scan are operators of their own, with backwards written out. For autograd: it
# would keep every level of
# the tree, 14 tensors the size of a query at C = 64, where this keeps its inputs and climbs again
# (and is a fifth faster).
# For torch.compile: it takes them as they are; unrolled they compiled for a minute and ran no
# faster. It believes the strides
# that the shape functions state, so outputs are contiguous, or lie as the input does that they were
# cloned from.
#
# Inside the tree all keys of a token lie side by side, (..., C, J, K), and all its queries, (...,
# C, I, K). A block of `size`
# tokens is then size * J rows, and one product makes the scores of all queries with all keys where
# two blocks meet.


@torch.library.custom_op("longfire::decay_tree", mutates_args=())
def decay_tree(decay: Tensor, keys: list[Tensor], queries: list[Tensor]) -> list[Tensor]:
    """All (..., C, K), J keys and I queries -> [whole (..., 1, K), to_end (..., C, J, K),
    from_start (..., C, I, K), products (..., I * J, C, C)]: the file's trace. Of the products those
    with the first query come first."""
    whole = decay.clone()
    to_end = torch.stack(keys, -2)
    queries_CIK = torch.stack(queries, -2)
    from_start = queries_CIK * decay[..., None, :]
    products = torch.diag_embed((queries_CIK @ to_end.mT).flatten(-2).mT)
    scores = score_blocks(products, len(queries))
    for size in block_sizes(decay):
        early = early_of(to_end, size)
        late = late_of(from_start, size)
        below_diagonal(scores, size).copy_(scored(rows_of(late) @ rows_of(early).mT, size))
        whole = merge(whole, early, late)
    return [whole, to_end, from_start, products]


@decay_tree.register_fake
def decay_tree_shapes(decay: Tensor, keys: list[Tensor], queries: list[Tensor]) -> list[Tensor]:
    *left, C, K = decay.shape
    shapes = (1, K), (C, len(keys), K), (C, len(queries), K), (len(queries) * len(keys), C, C)
    return [decay.new_empty(*left, *shape) for shape in shapes]


@torch.library.custom_op("longfire::decay_tree_backward", mutates_args=())
def decay_tree_backward(
    decay: Tensor, keys: list[Tensor], queries: list[Tensor], d_outputs: list[Tensor]
) -> list[Tensor]:
    """The gradients of decay, of the keys (..., C, J, K) and of the queries (..., C, I, K)."""
    d_whole, d_to_end, d_from_start, d_products = d_outputs
    keys_CJK = torch.stack(keys, -2)
    queries_CIK = torch.stack(queries, -2)
    decay_C1K = decay[..., None, :]
    levels = []
    whole = decay
    to_end = keys_CJK.clone()
    from_start = queries_CIK * decay_C1K
    for size in block_sizes(decay):
        early = early_of(to_end, size)
        late = late_of(from_start, size)
        levels.append((size, whole, early.clone(), late.clone()))
        whole = merge(whole, early, late)
    d_keys = d_to_end.clone()
    d_from_start = d_from_start.clone()
    d_scores = score_blocks(d_products, len(queries))
    for size, whole, early, late in reversed(levels):
        d_early = early_of(d_keys, size)
        d_late = late_of(d_from_start, size)
        whole_early, whole_late = seam(whole)
        d_whole_early = d_whole * whole_late + (d_late * late).sum((-3, -2))
        d_whole_late = d_whole * whole_early + (d_early * early).sum((-3, -2))
        merge(whole, d_early, d_late)
        d_below = unscored(below_diagonal(d_scores, size))
        d_late += few_times(d_below, rows_of(early)).view_as(late)
        d_early += few_times(d_below.mT, rows_of(late)).view_as(early)
        d_whole = torch.stack([d_whole_early, d_whole_late], -2).flatten(-3, -2)
    d_decay = d_whole + (d_from_start * queries_CIK).sum(-2)
    d_same = d_products.diagonal(dim1=-2, dim2=-1).mT.unflatten(-1, (len(queries), len(keys)))
    d_queries = d_from_start.mul_(decay_C1K).add_(few_times(d_same, keys_CJK))
    d_keys += few_times(d_same.mT, queries_CIK)
    return [d.contiguous() for d in (d_decay, d_keys, d_queries)]


@decay_tree_backward.register_fake
def decay_tree_backward_shapes(
    decay: Tensor, keys: list[Tensor], queries: list[Tensor], d_outputs: list[Tensor]
) -> list[Tensor]:
    *left, C, K = decay.shape
    found: list[Tensor] = []
    for shape in ((C, K), (C, len(keys), K), (C, len(queries), K)):
        found.append(decay.new_empty(*left, *shape))
    return found


def keep_tree(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    decay, keys, queries = inputs
    ctx.keys = len(keys)
    ctx.save_for_backward(decay, *keys, *queries)


def decay_tree_gradients(
    ctx: Any, d_outputs: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    decay, *rest = ctx.saved_tensors
    keys = rest[: ctx.keys]
    queries = rest[ctx.keys :]
    d_decay, d_keys, d_queries = decay_tree_backward(
        decay, keys, queries, [d.contiguous() for d in d_outputs]
    )
    return d_decay, list(d_keys.unbind(-2)), list(d_queries.unbind(-2))


decay_tree.register_autograd(decay_tree_gradients, setup_context=keep_tree)


def block_sizes(key: Tensor) -> Iterator[int]:
    """1, 2, 4 ... C/2: the sizes of the blocks that merge."""
    return (1 << level for level in range(key.shape[-2].bit_length() - 1))


def early_of(x: Tensor, size: int) -> Tensor:
    """The early one of each two neighbouring blocks: a view (..., C / 2 size, size, J, K) of (...,
    C, J, K)."""
    return x.unflatten(-3, (-1, 2, size)).select(-4, 0)


def late_of(x: Tensor, size: int) -> Tensor:
    """The late one, in the same way."""
    return x.unflatten(-3, (-1, 2, size)).select(-4, 1)


def rows_of(block: Tensor) -> Tensor:
    """A block's keys or queries as the rows of a matrix (..., size * J, K), a view."""
    return block.flatten(-3, -2)


def seam(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The decay over each early and each late block, (..., C / 2 size, K), of whole (..., C / size,
    K)."""
    early, late = whole.unflatten(-2, (-1, 2)).unbind(-2)
    return early, late


def merge(whole: Tensor, early: Tensor, late: Tensor) -> Tensor:
    """Carry the early keys over the late block and the late queries back over the early one, in
    place; the new `whole`."""
    whole_early, whole_late = seam(whole)
    early *= whole_late[..., None, None, :]
    late *= whole_early[..., None, None, :]
    return whole_early * whole_late


def few_times(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. One or two columns of a are multiplied out: a CPU's product of such matrices takes ten
    times as long."""
    if a.shape[-1] > 2:
        return a @ b
    product = a[..., :1] * b[..., :1, :]
    if a.shape[-1] == 1:
        return product
    return product.addcmul_(a[..., 1:], b[..., 1:, :])


def score_blocks(products: Tensor, queries: int) -> Tensor:
    """(..., I * J, C, C) as (..., I, J, C, C), a view."""
    return products.unflatten(-3, (queries, -1))


def scored(scores: Tensor, size: int) -> Tensor:
    """Rows of queries and columns of keys, (..., C / 2 size, size * I, size * J), as
    `below_diagonal` lies: a view (..., I, J, C / 2 size, size, size)."""
    # (..., C / 2 size, size, I, size, J)
    blocks = scores.unflatten(-1, (size, -1)).unflatten(-3, (size, -1))
    return blocks.movedim((-3, -1), (-5, -4))


def unscored(blocks: Tensor) -> Tensor:
    """The way back, a copy."""
    queries, keys, n, size, _ = blocks.shape[-5:]
    rows = blocks.movedim((-5, -4), (-3, -1))
    return rows.reshape(*blocks.shape[:-5], n, size * queries, size * keys)


def on_diagonal(matrix: Tensor, size: int) -> Tensor:
    """The blocks (..., C / size, size, size) on the diagonal of (..., C, C), a view."""
    blocks = matrix.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def below_diagonal(matrix: Tensor, size: int) -> Tensor:
    """Where late queries meet early keys: the blocks (..., C / 2 size, size, size) of (..., C, C),
    a view."""
    pairs = (-1, 2, size)
    blocks = matrix.unflatten(-1, pairs).unflatten(-4, pairs).select(-5, 1).select(-2, 0)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@torch.library.custom_op("longfire::scan", mutates_args=())
def scan(
    transition: Tensor, write: Tensor, state: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """S <- M_n S + write_n over the chunks n, from the last to the first if `reverse`: (the state
    before each, the last).

    state (B, H, K, V), write (B, N, H, K, V), transition a matrix M (B, N, H, K, K) or its diagonal
    (1 or B, N, 1 or H, 1 or K, 1).
    """
    steps = list(zip(transition.unbind(1), write.unbind(1)))
    states = []
    for step, added in reversed(steps) if reverse else steps:
        states.append(state)
        state = carried(step, state, added)
    return torch.stack(states[::-1] if reverse else states, 1).contiguous(), state.contiguous()


@scan.register_fake
def scan_shapes(
    transition: Tensor, write: Tensor, state: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    return write.new_empty(write.shape), state.new_empty(state.shape)


def keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.reverse = inputs[3]
    ctx.save_for_backward(inputs[0], output[0])


def scan_gradients(ctx: Any, d_states: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the state is scanned the other way, by the transposed transitions."""
    transition, states = ctx.saved_tensors
    back = transition.mT if is_matrix(transition) else transition
    d_write, d_state = scan(back, d_states, d_last, not ctx.reverse)
    d_transition = None
    if ctx.needs_input_grad[0]:
        if is_matrix(transition):
            d_transition = d_write @ states.mT
        else:
            d_transition = (d_write * states).sum(-1, keepdim=True)
        d_transition = d_transition.sum_to_size(transition.shape)
    return d_transition, d_write, d_state, None


scan.register_autograd(scan_gradients, setup_context=keep_scan)


def is_matrix(transition: Tensor) -> bool:
    return transition.shape[-1] != 1


def carried(transition: Tensor, state: Tensor, added: Tensor) -> Tensor:
    """transition state + added, for one chunk."""
    if is_matrix(transition):
        return plus_product(added, transition, state)
    return torch.addcmul(added, transition, state)


def plus_product(added: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """added + a b, of matrices (B, H, ...)."""
    return torch.baddbmm(added.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).view(added.shape)


def through_chunks(
    work: Callable[..., Any],
    read: Callable[[Any, Tensor], Tensor],
    state: Tensor,
    *inputs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and state after some tokens, given the state before them: work(*inputs) is what
    chunks come to before a state is known, their `transition` and `write` among it, read(that,
    states) their outputs."""
    worked = work(*inputs)
    states, state = scan(worked.transition, worked.write, state)
    return read(worked, states), state


def by_segments(
    run: Callable[..., tuple[Tensor, Tensor]], state: Tensor, inputs: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """run(state, *inputs) -> (o, state), on a CPU a segment of the row at a time; inputs (B, T,
    ...), (H,) or None.

    Without it T = 16k cost 13 times T = 2k (page faults of fresh 32 MiB tensors), with it less than
    9.
    """
    outputs = []
    for segment in segments_of(inputs):
        o, state = run(state, *segment)
        outputs.append(o)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state


def segments_of(inputs: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor | None, ...]]:
    """The inputs of each segment that is worked on at a time."""
    first = inputs[0]
    assert first is not None
    tokens = T = first.shape[1]
    if first.device.type == "cpu" and not as_on_cuda():
        numbers = sum(x.numel() // T for x in inputs if x is not None and x.dim() == 4)
        chunks = -(-T // CHUNK)
        segments = -(-chunks // max(1, SEGMENT_NUMBERS // (numbers * CHUNK)))
        tokens = -(-chunks // segments) * CHUNK  # all of one length, as far as whole chunks go
    if tokens >= T:
        yield inputs
        return
    # split, not slices: the gradient of a slice is a tensor as long as the row
    yield from zip(
        *(repeat(x) if x is None or x.dim() == 1 else x.split(tokens, 1) for x in inputs)
    )
