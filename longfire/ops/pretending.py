"""A planner's fake tensors on a CUDA device that is not here."""

from collections.abc import Iterator
from contextlib import contextmanager

_as_on_cuda = _only_shapes = _with_kernels = False


def as_on_cuda() -> bool:
    """Whether what a CPU would do for itself alone is left out, so that what a step holds is what
    it would hold on CUDA."""
    return _as_on_cuda


def only_shapes() -> bool:
    """Whether tensors have no numbers: of a loop whose rounds hold alike, some say what all
    hold."""
    return _only_shapes


def with_kernels() -> bool:
    """Whether ops hold what the kernels of fla and Triton hold, instead of our forms in torch."""
    return _with_kernels


@contextmanager
def pretending_cuda(pretend: bool = True, kernels: bool = False) -> Iterator[None]:
    """Inside, fake tensors of the planner take the paths of a CUDA device that is not here (or, not
    pretending, those of the CPU). kernels: of one on which the kernels of fla and Triton run."""
    global _as_on_cuda, _only_shapes, _with_kernels
    before = _as_on_cuda, _only_shapes, _with_kernels
    _as_on_cuda = pretend
    _only_shapes = True
    _with_kernels = pretend and kernels
    try:
        yield
    finally:
        _as_on_cuda, _only_shapes, _with_kernels = before
