"""Decays of the channels of values inside a chunk, merged as `decay_tree` merges those of keys
(chunkwise.py)."""

from typing import Any

import torch
from torch import Tensor

from longfire.ops.fast.chunkwise import (
    below_diagonal,
    block_sizes,
    early_of,
    few_times,
    late_of,
    merge,
    rows_of,
    seam,
)


@torch.library.custom_op("longfire::value_tree", mutates_args=())
def value_tree(products: Tensor, value: Tensor, decay: Tensor) -> list[Tensor]:
    """What decays over channels of the values, merged as in `decay_tree`: [out, to_end,
    from_start], all (..., C, V).

    products (..., C, C) of queries and keys, value and decay (..., C, V). out_i = sum_{j<=i}
    products_ij v_j a_{j+1}..a_i, to_end_j = v_j a_{j+1}..a_C, from_start_i = a_1..a_i. From the
    seam, where two blocks of 2 merge (a3 from it, a2 to it): out_3 += a3 (P31 (v1 a2) + P32 v2).
    """
    out = products.diagonal(dim1=-2, dim2=-1)[..., None] * value
    to_end = value.clone()
    from_start = decay.clone()
    whole = decay
    for size in block_sizes(value):
        early = early_of(one(to_end), size)
        late = late_of(one(from_start), size)
        out_late = late_of(one(out), size)
        rows_of(out_late).addcmul_(
            rows_of(late), few_times(below_diagonal(products, size), rows_of(early))
        )
        whole = merge(whole, early, late)
    return [out, to_end, from_start]


def one(x: Tensor) -> Tensor:
    """(..., C, V) as the one key or query of each token, (..., C, 1, V)."""
    return x[..., None, :]


@value_tree.register_fake
def value_tree_shapes(products: Tensor, value: Tensor, decay: Tensor) -> list[Tensor]:
    return [torch.empty_like(value), torch.empty_like(value), torch.empty_like(decay)]


@torch.library.custom_op("longfire::value_tree_backward", mutates_args=())
def value_tree_backward(
    products: Tensor, value: Tensor, decay: Tensor, d_outputs: list[Tensor]
) -> list[Tensor]:
    """The gradients of products, value and decay."""
    d_out = d_outputs[0]
    d_to_end = d_outputs[1].clone()
    d_from_start = d_outputs[2].clone()
    levels = []
    to_end = value.clone()
    from_start = decay.clone()
    whole = decay
    for size in block_sizes(value):
        early = early_of(one(to_end), size)
        late = late_of(one(from_start), size)
        levels.append((size, whole, rows_of(early).clone(), rows_of(late).clone()))
        whole = merge(whole, early, late)
    d_products = torch.zeros_like(products)
    d_whole = torch.zeros_like(whole)
    for size, whole, early, late in reversed(levels):
        block_early = early_of(one(d_to_end), size)
        block_late = late_of(one(d_from_start), size)
        d_early, d_late, d_out_late = map(
            rows_of, (block_early, block_late, late_of(one(d_out), size))
        )
        whole_early, whole_late = seam(whole)
        d_whole_late = d_whole * whole_early + (d_early * early).sum(-2)
        d_whole_early = d_whole * whole_late + (d_late * late).sum(-2)
        merge(whole, block_early, block_late)
        below = below_diagonal(products, size)
        d_seen = d_out_late * late
        d_late.addcmul_(d_out_late, few_times(below, early))
        d_early += few_times(below.mT, d_seen)
        below_diagonal(d_products, size).copy_(d_seen @ early.mT)
        d_whole = torch.stack([d_whole_early, d_whole_late], -2).flatten(-3, -2)
    d_products.diagonal(dim1=-2, dim2=-1).copy_((d_out * value).sum(-1))
    d_value = d_to_end.addcmul_(d_out, products.diagonal(dim1=-2, dim2=-1)[..., None])
    return [d.contiguous() for d in (d_products, d_value, d_whole + d_from_start)]


@value_tree_backward.register_fake
def value_tree_backward_shapes(
    products: Tensor, value: Tensor, decay: Tensor, d_outputs: list[Tensor]
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (products, value, decay)]


def keep_value_tree(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def value_tree_gradients(ctx: Any, d_outputs: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value_tree_backward(*ctx.saved_tensors, [d.contiguous() for d in d_outputs]))


value_tree.register_autograd(value_tree_gradients, setup_context=keep_value_tree)
