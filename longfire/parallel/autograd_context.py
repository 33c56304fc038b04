"""The first argument of an autograd.Function's forward and backward, with its types."""

from typing import Protocol

from torch import Tensor


class SavedTensors(Protocol):
    """Tensors that a forward leaves for its backward. A function that leaves more than tensors
    names it in a class derived from this."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
