"""fla's Triton kernels (fla-core 0.6.0) behind our signatures: rows, documents and states in our
meaning.

Imported only where `choose` found fla and CUDA. No machine of the everyday tests has a GPU:
`longfire doctor` is the test of this file.
"""

from functools import partial

from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.fast import custom_ops, kernel_calls
from longfire.ops.fast.fla_functions import KERNELS


def run(
    kernel: str,
    inputs: dict[str, Tensor],
    scale: float | None,
    state_BHKV: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """One call of KERNELS[kernel], an operator of the graph. The state is fp32, or that of a
    convolution."""
    spec = KERNELS[kernel]
    tensors = [inputs[name].contiguous() for name in spec.inputs]
    first = tensors[0]  # q, or x: what the output is like
    if scale is None:
        scale = first.shape[-1] ** -0.5
    state = None if state_BHKV is None else state_BHKV.contiguous()
    if state is not None and "x" not in inputs:
        state = state.float()
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    if documents is not None:
        lengths = (documents.cu_lengths_int64, documents.cu_lengths_cpu)
    o, last_state, *_ = custom_ops.fla(kernel, tensors, state, *lengths, scale)
    return o, last_state


linear_attention = partial(kernel_calls.linear_attention, run)
delta_rule = partial(kernel_calls.delta_rule, run)
dplr = partial(kernel_calls.dplr, run)
slot_attention = partial(kernel_calls.slot_attention, run)
short_conv = partial(kernel_calls.short_conv, run)
