"""torch's flash attention of documents that lie end to end, as an operator of our own.

torch's own `varlen_attn` takes the length of the longest document as a number, for which a compiled
graph would be made anew with every batch. Here the operator finds it inside, from the lengths on
the CPU, so one graph serves all documents. What runs is the same as in torch.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("longfire::varlen_attention", mutates_args=())
def varlen_attention(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    cu_lengths: Tensor,
    cu_lengths_cpu: Tensor,
    window_before: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(output (N, H, K), log-sum-exp (H, N)). cu_lengths: int32, of the documents, on the device;
    window_before: keys that a query sees before itself, all if -1."""
    longest = longest_of(cu_lengths_cpu)
    found = torch.ops.aten._flash_attention_forward(
        q_NHK,
        k_NGK,
        v_NGK,
        cu_lengths,
        cu_lengths,
        longest,
        longest,
        0.0,  # dropout
        window_before == -1,  # with a window, its right end of 0 makes it causal
        return_debug_mask=False,
        scale=scale,
        window_size_left=window_before,
        window_size_right=0,
    )
    return found[0], found[1]


def longest_of(cu_lengths_cpu: Tensor) -> int:
    """Tokens of the longest document. The lengths are on the CPU: nothing waits for the device."""
    return int(cu_lengths_cpu.diff().max())


@varlen_attention.register_fake
def shapes(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    cu_lengths: Tensor,
    cu_lengths_cpu: Tensor,
    window_before: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    N, H, _ = q_NHK.shape
    return torch.empty_like(q_NHK), q_NHK.new_empty(H, N, dtype=torch.float32)


@torch.library.custom_op("longfire::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    d_o_NHK: Tensor,
    inputs: list[Tensor],
    lse_HN: Tensor,
    cu_lengths: Tensor,
    cu_lengths_cpu: Tensor,
    window_before: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. inputs: q, k, v, and the output."""
    q_NHK, k_NGK, v_NGK, o_NHK = inputs
    longest = longest_of(cu_lengths_cpu)
    dropout_state = torch.zeros(2, dtype=torch.uint64, device=q_NHK.device)  # of no dropout
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        d_o_NHK,
        q_NHK,
        k_NGK,
        v_NGK,
        o_NHK,
        lse_HN,
        cu_lengths,
        cu_lengths,
        longest,
        longest,
        0.0,
        window_before == -1,
        dropout_state,
        d_o_NHK.new_empty(0),
        scale=scale,
        window_size_left=window_before,
        window_size_right=0,
    )
    return d_q, d_k, d_v


@varlen_attention_backward.register_fake
def shapes_of_gradients(
    d_o_NHK: Tensor,
    inputs: list[Tensor],
    lse_HN: Tensor,
    cu_lengths: Tensor,
    cu_lengths_cpu: Tensor,
    window_before: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q_NHK, k_NGK, v_NGK, _ = inputs
    return torch.empty_like(q_NHK), torch.empty_like(k_NGK), torch.empty_like(v_NGK)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window_before, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, d_o_NHK: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_lengths, cu_lengths_cpu, o, lse_HN = ctx.saved_tensors
    found = varlen_attention_backward(
        d_o_NHK, [q, k, v, o], lse_HN, cu_lengths, cu_lengths_cpu, ctx.window_before, ctx.scale
    )
    return *found, None, None, None, None


varlen_attention.register_autograd(gradients, setup_context=keep)
