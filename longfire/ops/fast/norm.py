"""RMS norm of fp32 numbers on a CPU, uncompiled (ops/norm.py)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm_on_cpu(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """F.rms_norm over the last dim, in a tenth of its time."""
    if weight is not None:
        weight = weight.to(x.dtype)  # it may come narrow (param_gather_dtype)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """y = r x weight with r = 1 / rms(x). The backward is layer norm's kernel, given that the means
    are 0: it gives the right d_weight, and d_x less r mean(d_y weight), which is what a mean that
    depends on x takes off.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        # Unlike a sum of squares, no temporary of x's size.
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y = x * r
        if weight is None:
            return y
        return y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        wanted = [True, weight is not None and ctx.needs_input_grad[1], False]
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            d_y.contiguous(),
            x.contiguous(),
            x.shape[-1:],
            torch.zeros_like(r),
            r,
            weight,
            None,
            wanted,
        )
        means = d_y.mean(-1) if weight is None else d_y @ (weight / len(weight))
        return d_x.add_(means[..., None].mul_(r)), d_weight, None
