"""What has to be left out, or assumed, where kernels compute nothing."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton.runtime.autotuner as autotuner
import triton.runtime.jit as jit
from fla.ops.utils import index
from torch import Tensor

from longfire.parallel.parameter_gather import RoundedGather

REAL_RUN = jit.JITFunction.run
REAL_CHUNKS = index._segmented_arange
CHUNKS = 64  # of the documents of a batch, where a kernel would have counted them


@contextmanager
def without_numbers() -> Iterator[Counter[str]]:
    """Inside, fla's kernels are counted by name and not compiled (their autotuners would compile
    dozens of each; ours are), a result is taken for finite, parameters are taken to be
    in their place, and SDPA leaves cuDNN alone, which the stand-in
    does not replace. Kernels that torch.compile makes are compiled and started, too."""
    started: Counter[str] = Counter()

    def run(self: jit.JITFunction, *arguments: object, **options: object) -> object:
        started[self.__name__] += 1
        if self.__module__.startswith("longfire."):
            return REAL_RUN(self, *arguments, **options)
        return None

    def run_inner(self: autotuner.Autotuner | autotuner.Heuristics, *_: object, **__: object):
        return self.fn.run()

    torch.backends.cuda.enable_cudnn_sdp(False)
    with (
        patch.object(jit.JITFunction, "run", run),
        patch.object(autotuner.Autotuner, "run", run_inner),
        patch.object(autotuner.Heuristics, "run", run_inner),
        patch.object(index, "_segmented_arange", numbered_chunks),
        patch.object(torch, "isfinite", finite),
        patch.object(RoundedGather, "check_order", lambda *_: None),
    ):
        yield started


def numbered_chunks(counts: Tensor) -> tuple[Tensor, Tensor]:
    """fla's tables of chunks and documents: as they are where the lengths are on the CPU. On the
    device, how long they are is a number that a kernel would have made."""
    if not counts.is_cuda:
        return REAL_CHUNKS(counts)
    return counts.new_zeros(CHUNKS), counts.new_zeros(CHUNKS)


def finite(x: Tensor) -> Tensor:
    """That it is. The host waits for the device as it would for the answer."""
    x.flatten()[0].item()
    return torch.ones(x.shape, dtype=torch.bool)
