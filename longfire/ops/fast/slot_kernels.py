"""fla's autograd function of gated slot attention with one state, as custom_ops.py calls its
functions: fla has the keys of the slots (B, H, K, M) and their values (B, H, M, V) apart, ours lie
side by side, (B, H, M, K + V).

Its kernels work on chunks of tokens in both passes. As two passes of linear attention, the first
would walk the tokens one by one: fla has no chunks for a decay of values alone.
"""

from types import SimpleNamespace
from typing import Any

import torch
from fla.ops.gsa.chunk import ChunkGSAFunction
from torch import Tensor

RECOMPUTED = 2  # fla's checkpoint_level: the backward makes states and sums of decays again


class SlotAttentionFunction(torch.autograd.Function):
    """ChunkGSAFunction, the states of whose slots are one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s: Tensor,
        g: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        cu_seqlens_cpu: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        saved: list[Tensor | None] = []
        inner = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
        keys, values = parts(initial_state, k.shape[-1])
        o, last_keys, last_values = ChunkGSAFunction.forward(
            inner,
            q=q,
            k=k,
            v=v,
            s=s,
            g=g,
            scale=1.0,
            hk0=keys,
            hv0=values,
            output_final_state=True,
            checkpoint_level=RECOMPUTED,
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=cu_seqlens_cpu,
        )
        scores, weights, A = saved[5:8]
        ctx.save_for_backward(q, k, v, s, g, scores, weights, A, initial_state)
        return o, torch.cat([last_keys.mT, last_values], -1)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_last_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        k = tensors[1]
        keys, values = parts(state, k.shape[-1])
        inner = SimpleNamespace(
            saved_tensors=(*tensors, keys, values, None, None, ctx.chunk_indices),
            checkpoint_level=RECOMPUTED,
            scale=1.0,
            cu_seqlens=ctx.cu_seqlens,
            chunk_size=ctx.chunk_size,
        )
        found = ChunkGSAFunction.backward(inner, d_o, *parts(d_last_state, k.shape[-1]))
        d_keys, d_values = found[6:8]
        d_state = None if state is None else torch.cat([d_keys.mT, d_values], -1)
        return *found[:5], d_state, None, None


def parts(state_BHMX: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """The keys of the slots and their values, as fla has them."""
    if state_BHMX is None:
        return None, None
    return state_BHMX[..., :keys].mT.contiguous(), state_BHMX[..., keys:].contiguous()
