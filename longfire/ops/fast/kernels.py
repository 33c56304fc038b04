"""fla's Triton kernels (fla-core 0.6.0) behind our signatures (kernel_calls.py).

Imported only where `choose` found fla and CUDA. No machine of the everyday tests has a GPU:
`longfire doctor` is the test of this file.
"""

from functools import partial

import torch
from fla.modules.causal_conv1d import causal_conv1d
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from fla.ops.kda import chunk_kda
from fla.ops.simple_gla import chunk_simple_gla
from torch import Tensor

from longfire.ops.fast import kernel_calls
from longfire.ops.fast.kernel_calls import FlaFunctions


def recurrent_gla(
    cu_seqlens_cpu: Tensor | None = None,
    **inputs: Tensor | float | bool | None,
) -> tuple[Tensor, Tensor]:
    """fla's function that walks the tokens: the only one that has no tables of chunks, and so takes
    no lengths on the CPU."""
    return fused_recurrent_gla(**inputs)


not_compiled = torch.compiler.disable(
    kernel_calls.run,
    reason=(
        "fla's functions break graphs at many places inside, and are compiled for each shape until "
        "torch gives up: one break around each is left"
    ),
)
FLA = FlaFunctions(
    chunk_gla=chunk_gla,
    chunk_simple_gla=chunk_simple_gla,
    fused_recurrent_gla=recurrent_gla,
    chunk_gated_delta_rule=chunk_gated_delta_rule,
    chunk_kda=chunk_kda,
    chunk_dplr_delta_rule=chunk_dplr_delta_rule,
    causal_conv1d=causal_conv1d,
    run=not_compiled,
)
linear_attention = partial(kernel_calls.linear_attention, FLA)
delta_rule = partial(kernel_calls.delta_rule, FLA)
dplr = partial(kernel_calls.dplr, FLA)
short_conv = partial(kernel_calls.short_conv, FLA)
