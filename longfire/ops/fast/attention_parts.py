"""Softmax attention in parts, by kernels that give the logsumexp (ops/attention_parts.py)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import flex_attention as flex

from longfire.ops.linear import in_fp32, working_dtype


def attention_parts_fused(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """On a CPU the kernel behind torch's SDPA, on CUDA flex attention."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.device.type == "cuda":
        return parts_by_flex(q_BTHK, k_BSGK, v_BSGV, causal, scale)
    K = q_BTHK.shape[-1]
    V = v_BSGV.shape[-1]
    dtype = working_dtype(q_BTHK)
    q = F.pad(q_BTHK.to(dtype), (0, max(K, V) - q_BTHK.shape[-1])).transpose(1, 2)
    k = F.pad(k_BSGK.to(dtype), (0, max(K, V) - k_BSGK.shape[-1])).transpose(1, 2)
    v = F.pad(v_BSGV.to(dtype), (0, max(K, V) - v_BSGV.shape[-1])).transpose(1, 2)
    o, lse_BHT = _Parts.apply(q, k, v, causal, scale)
    return o.transpose(1, 2)[..., :V], lse_BHT


class _Parts(torch.autograd.Function):
    """The kernel behind torch's SDPA on a CPU, which is private but gives the logsumexp that the
    public face drops.

    Its backward knows no gradient of lse. With P = exp(scores - lse), d scores = P * (dO v^T -
    delta + d lse), where the kernel makes delta = rowsum(dO * O) itself: one more channel with dO =
    1, O = -d lse and v = 0 gives it delta - d lse.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal = causal
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        size = q.shape[-1]
        d_o = torch.zeros_like(o) if d_o is None else d_o
        if d_lse is not None:
            q = F.pad(q, (0, 1))
            k = F.pad(k, (0, 1))
            v = F.pad(v, (0, 1))
            o = torch.cat([o, -d_lse[..., None].to(o.dtype)], -1)
            d_o = F.pad(d_o, (0, 1), value=1.0)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_o, q, k, v, o, lse, 0.0, ctx.causal, scale=ctx.scale
        )
        return *(gradient[..., :size] for gradient in gradients), None, None


WithLogsumexp = Callable[..., tuple[Tensor, flex.AuxOutput]]


def parts_by_flex(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """On CUDA: flex attention, which gives the logsumexp and its gradient; compiled, since
    uncompiled it makes all scores."""
    T = q.shape[1]
    S = k.shape[1]
    mask = flex.create_block_mask(earlier, None, None, T, S, device=q.device) if causal else None
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    # To a type checker torch.compile leaves the first overload only: outputs without logsumexp.
    attend: WithLogsumexp = torch.compile(flex.flex_attention)  # type: ignore[assignment]
    wanted = flex.AuxRequest(lse=True)
    o, aux = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=wanted)
    assert aux.lse is not None
    return in_fp32(o.transpose(1, 2)), aux.lse


def earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query
