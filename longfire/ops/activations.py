"""The activations of MLPs without a gate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.forms import LazyFunction, TensorFunction
from longfire.ops.mlp import gelu_tanh

SQUARED_RELU = LazyFunction[TensorFunction]("longfire.ops.fast.mlp:squared_relu_once")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So 2021, Primer). Keeps relu(x), of which the gradient is 2 relu(x): one pass,
    where autograd's takes four."""
    if torch.is_grad_enabled():
        return SQUARED_RELU.get()(x)
    return squared_relu_reference(x)


def squared_relu_reference(x: Tensor) -> Tensor:
    """The reference: by its definition."""
    return F.relu(x).square()


# The names of MLPs (mlps/__init__.py).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
    "gelu": gelu_tanh,
    "gelu_exact": F.gelu,
}
