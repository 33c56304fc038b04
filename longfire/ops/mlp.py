"""The products of gated MLPs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.forms import LazyFunction, TensorFunction

SWIGLU = LazyFunction[TensorFunction]("longfire.ops.fast.mlp:swiglu_again")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Keeps its two inputs only: silu(gate) is made again in the
    backward."""
    if torch.is_grad_enabled():
        return SWIGLU.get()(gate, up)
    return F.silu(gate).mul_(up)


def gelu_tanh(x: Tensor) -> Tensor:
    """x Phi(x) with Phi by tanh (Hendrycks 2016): GPT-2's and Gemma's."""
    return F.gelu(x, approximate="tanh")


# The names of MLPs with a gate (mlps/__init__.py).
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
