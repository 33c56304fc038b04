"""Matrix products with fp32 master weights: what is multiplied in which type."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware. A CPU without such units takes 400x the time of fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight_WD: Tensor, bias_W: Tensor | None = None) -> Tensor:
    """x (..., D) -> (..., W) in x's dtype, from fp32 master weights rounded to it.

    bf16 on a CPU without bf16 units: the same rounded values are multiplied in fp32 and the result is rounded, which is what a
    bf16 product with fp32 accumulation means.
    """
    if x.dtype == torch.float32 or weight_WD.dtype == x.dtype and native_bf16(x.device):
        return F.linear(x, weight_WD.to(x.dtype), None if bias_W is None else bias_W.to(x.dtype))
    weight_WD = weight_WD.to(x.dtype)
    bias_W = None if bias_W is None else bias_W.to(x.dtype)
    if native_bf16(x.device):
        return F.linear(x, weight_WD, bias_W)
    return F.linear(x.float(), weight_WD.float(), None if bias_W is None else bias_W.float()).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input; its parameters stay fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
