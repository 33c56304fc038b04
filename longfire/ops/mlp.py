"""The part of a block that looks at one token only."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longfire.ops.linear import Linear


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
        return torch.addcmul(
            d_y.new_zeros(()), d_y, positive, value=2
        )  # 2 d_y positive, in one pass


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


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020); names of Llama."""

    roles = {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}

    def __init__(
        self, kind: str, hidden_size: int, intermediate_size: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.kind = kind
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.kind))


class UngatedMLP(nn.Module):
    """down(act(up(x))): GPT-2's MLP."""

    roles = {"up_proj": "column", "down_proj": "row"}

    def __init__(
        self, kind: str, hidden_size: int, intermediate_size: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[kind]
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))
