"""A planner's fake tensors on a CUDA device that is not here."""

from collections.abc import Iterator
from contextlib import contextmanager

from longfire.ops.forms import OPS, Choice, decided

WITHOUT_KERNELS = ("attention", "previous_token")  # no kernels of fla and none of our own

_as_on_cuda = _only_shapes = False


def as_on_cuda() -> bool:
    """Whether what a CPU would do for itself alone is left out, so that what a step holds is what
    it would hold on CUDA."""
    return _as_on_cuda


def only_shapes() -> bool:
    """Whether tensors have no numbers: of a loop whose rounds hold alike, some say what all
    hold."""
    return _only_shapes


@contextmanager
def pretending_cuda(pretend: bool = True, kernels: bool = False) -> Iterator[None]:
    """Inside, fake tensors of the planner take the paths of a CUDA device that is not here (or, not
    pretending, those of the CPU). kernels: ops hold what the kernels of fla and Triton hold, and
    not what our forms in torch do."""
    global _as_on_cuda, _only_shapes
    before = _as_on_cuda, _only_shapes
    decided_before = dict(decided)
    _as_on_cuda = pretend
    _only_shapes = True
    if pretend and kernels:
        memory = Choice("memory", "what kernels hold is planned")
        decided.update({op: memory for op in OPS if op not in WITHOUT_KERNELS})
    try:
        yield
    finally:
        _as_on_cuda, _only_shapes = before
        decided.clear()
        decided.update(decided_before)
