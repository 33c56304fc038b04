"""The activations of MLPs, and the products of gates."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Keeps its two inputs only: silu(gate) is made again in the
    backward."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(gate, up)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_y, gate).mul_(up), F.silu(gate).mul_(d_y)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So 2021, Primer). Keeps relu(x), of which the gradient is 2 relu(x): one pass,
    where autograd's takes four."""
    if torch.is_grad_enabled():
        return _SquaredReLU.apply(x)
    return squared_relu_reference(x)


def squared_relu_reference(x: Tensor) -> Tensor:
    """The reference: by its definition."""
    return F.relu(x).square()


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        # 2 d_y positive, in one pass
        return torch.addcmul(d_y.new_zeros(()), d_y, positive, value=2)


def gelu_tanh(x: Tensor) -> Tensor:
    """x Phi(x) with Phi by tanh (Hendrycks 2016): GPT-2's and Gemma's."""
    return F.gelu(x, approximate="tanh")


# The names of shape.UNGATED_MLPS and, for the gate, of shape.GATED_MLPS.
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
