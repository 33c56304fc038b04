"""Outputs of segments, and the map of each, from one call of an op: where its kernels run.

The ops whose map has a matrix, S_t = M_t S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, treat each column
of the state alone. So K more columns may be carried beside the V of the state: with values (v, 0)
and the first state (0, I), the last state is (B, M), the map of all tokens, and the outputs are
(o_B, o_M). They are linear in the state before the segment, which need not be known yet:

    o_t = o_B + S_before^T o_M

So the map is made by the kernels of the op, forward and backward, and by one call, whose number of
kernels does not depend on the length; contract.folded starts a product for each chunk. The state
is made by the same products as that of a sequence that is not cut. In bf16, o_B, o_M and their sum
are rounded, where an uncut sequence rounds its outputs once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.linear import working_dtype
from longfire.ops.maps.contract import STATE, Affine
from longfire.ops.recurrence import RecurrenceOp


def with_wide_values(
    op: RecurrenceOp,
    state_before: Callable[[Affine], Tensor],
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *inputs: Tensor | None,
    **options: Any,
) -> Tensor:
    """(B, T, H, V): the outputs of op(q, k, v, *inputs, **options) from the state that
    `state_before` makes of the map of its tokens."""
    keys = k_BTHK.shape[-1]
    values = v_BTHV.shape[-1]
    options[STATE] = first_state(k_BTHK, v_BTHV)
    o_BTHX, last_BHKX = op(q_BTHK, k_BTHK, F.pad(v_BTHV, (0, keys)), *inputs, **options)
    o_of_zero, o_of_state = o_BTHX.split((values, keys), -1)
    write, transition = last_BHKX.split((values, keys), -1)
    before_BHKV = state_before(Affine(transition, write, is_matrix=True))
    read_BHTV = o_of_state.transpose(1, 2) @ before_BHKV.to(o_of_state.dtype)
    return o_of_zero + read_BHTV.transpose(1, 2)


def first_state(k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    """(B, H, K, V + K): zeros, and the identity of each head."""
    B, _, H, K = k_BTHK.shape
    identity = torch.eye(K, dtype=working_dtype(k_BTHK), device=k_BTHK.device)
    return F.pad(identity, (v_BTHV.shape[-1], 0)).repeat(B, H, 1, 1)
