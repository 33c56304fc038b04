"""What the recurrences of a matrix state share."""

from collections.abc import Callable

from torch import Tensor

from longfire.ops.linear import working_dtype

RecurrenceOp = Callable[..., tuple[Tensor, Tensor]]  # (outputs, state after the last token)


def start(state_BHKV: Tensor | None, q_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    """The state before the first token, zeros if None, in the working dtype."""
    (B, _, H, V), dtype = v_BTHV.shape, working_dtype(q_BTHK)
    if state_BHKV is None:
        return q_BTHK.new_zeros(B, H, q_BTHK.shape[-1], V, dtype=dtype)
    return state_BHKV.to(dtype)
