"""Weights that are rounded once: of a model that no longer learns, and for one training step.

`Linear` rounds its fp32 weight to the compute type in each forward and again in each backward: 6
bytes a number are read and written each time, 12 in a micro-batch, 18 where its forward is
recomputed. With a copy that a step makes once these are 6 bytes a step. The copy takes 2 bytes a
number, from the first forward of the step to its last backward.

A copy that is out of date cannot be read: it is there only while no weight may change. The
optimizer, an average of the weights, a checkpoint and an evaluation come before or after it.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from longfire.ops.linear import Linear

Choice = Literal["auto", "on", "off"]


def keep_rounded(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a model that will only generate once, and not again for every token: the
    same results."""
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.dtype != dtype:
            round_weight(module, dtype)


def round_weight(matrix: Linear, dtype: torch.dtype) -> None:
    """Let a matrix multiply by a copy of its weight as it is now.

    The copy is of a buffer's type, so that it is not taken for an activation (parallel/remat.py),
    and no buffer of the module, which checkpoints and moves to other devices would concern.
    """
    copy_WD = nn.Buffer(matrix.weight.detach().to(dtype), persistent=False)
    object.__setattr__(matrix, "rounded_WD", copy_WD)


def pays(choice: Choice, on_cuda: bool, microbatches: int) -> bool:
    """Whether a step keeps copies (training.keep_rounded_weights). auto: on CUDA with several
    micro-batches, of which each would round every weight twice."""
    if choice == "auto":
        return on_cuda and microbatches > 1
    return choice == "on"


def matrices_rounded(
    module: nn.Module,
    dtype: torch.dtype,
    without: Collection[nn.Module | None] = (),
) -> list[Linear]:
    """The matrices of a module that a step rounds more than once. without: the head of a language
    model, whose weight the loss rounds once a micro-batch. 8-bit products round from fp32."""
    found: list[Linear] = []
    for matrix in module.modules():
        if not isinstance(matrix, Linear) or matrix in without:
            continue
        if matrix.float8 is None and matrix.weight.dtype != dtype:
            found.append(matrix)
    return found


@contextmanager
def rounded_once(matrices: Sequence[Linear], dtype: torch.dtype) -> Iterator[None]:
    """Inside, these matrices multiply by copies of their weights in `dtype`, made here, with the
    same results to the bit. No weight may change inside.

    Compiled code of a CPU without bf16 units multiplies weights that were not rounded, where it has
    no copies: inductor takes rounding to bf16 and back to fp32 for nothing."""
    versions = [matrix.weight._version for matrix in matrices]
    for matrix in matrices:
        round_weight(matrix, dtype)
    try:
        yield
    finally:
        for matrix in matrices:
            matrix.rounded_WD = None
    for matrix, version in zip(matrices, versions):
        assert matrix.weight._version == version, "a weight was changed within a step"
