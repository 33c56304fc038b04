"""The activations of MLPs, and the products of gates."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.forms import LazyFunction, TensorFunction

SWIGLU = LazyFunction[TensorFunction]("longfire.ops.fast.mlp:swiglu_again")
SQUARED_RELU = LazyFunction[TensorFunction]("longfire.ops.fast.mlp:squared_relu_once")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Keeps its two inputs only: silu(gate) is made again in the
    backward."""
    if torch.is_grad_enabled():
        return SWIGLU.get()(gate, up)
    return F.silu(gate).mul_(up)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So 2021, Primer). Keeps relu(x), of which the gradient is 2 relu(x): one pass,
    where autograd's takes four."""
    if torch.is_grad_enabled():
        return SQUARED_RELU.get()(x)
    return squared_relu_reference(x)


def squared_relu_reference(x: Tensor) -> Tensor:
    """The reference: by its definition."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """x Phi(x) with Phi by tanh (Hendrycks 2016): GPT-2's and Gemma's."""
    return F.gelu(x, approximate="tanh")


# The names of MLPs without a gate, and of those with one for the gate (mlps/__init__.py).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
    "gelu": gelu_tanh,
    "gelu_exact": F.gelu,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": gelu_tanh,
    "geglu_exact": F.gelu,
    "reglu": F.relu,
}


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up with the activation of a gated MLP (Shazeer 2020)."""
    if kind == "swiglu":
        return swiglu(gate, up)
    return gated_reference(gate, up, kind)


def gated_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """The reference: by its definition, keeping all that autograd keeps."""
    return GATES[kind](gate) * up
