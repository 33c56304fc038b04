"""What our own Triton kernels allocate and keep, without numbers: for a planner's fake tensors,
which stand for a CUDA device that is not here. Nothing here imports Triton; what the kernels' files
allocate by the same functions is here too.

tests/null_gpu compares it with what torch's allocator holds for the kernels.
"""

from typing import Any

import torch
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.selective_scan import start

TOKENS = 32  # of a chunk; the states kept are then half of x where N = 16
BLOCK_CHANNELS = 32  # with N = 16 a program has 512 states, 8 for each thread of two warps


# attention_kernels.py


def attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    noise_BT: Tensor,
    *,
    dropout: float,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    first_head: int = 0,
) -> Tensor:
    """As longfire.ops.fast.attention_kernels.attention_by_kernels."""
    first_key_BT, query_end_BT = visible_range(noise_BT, window, documents)
    q_BTHK, k_BTGK, v_BTGV = q_BTHK.contiguous(), k_BTGK.contiguous(), v_BTGV.contiguous()
    return _Attention.apply(q_BTHK, k_BTGK, v_BTGV, noise_BT, first_key_BT, query_end_BT)


class _Attention(torch.autograd.Function):
    """longfire::attend_with_dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        *places: Tensor,
    ) -> Tensor:
        o_BTHV, lse_BHT = shapes_of_attention(q_BTHK, v_BTGV)
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGV, *places, o_BTHV, lse_BHT)
        return o_BTHV

    @staticmethod
    def backward(ctx: Any, d_o_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, k_BTGK, v_BTGV, *_, o_BTHV, _ = ctx.saved_tensors
        d_o_BTHV = d_o_BTHV.contiguous()
        delta_BHT = rows_of_gradients(d_o_BTHV, o_BTHV)
        found = [torch.empty_like(x) for x in (q_BTHK, k_BTGK, v_BTGV)]
        del delta_BHT
        return *found, None, None, None


def visible_range(
    noise_BT: Tensor, window: int | None, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """(B, T) int32: the first key that each query sees, and the end of the queries that see each
    key. Both grow along a sequence."""
    B, T = noise_BT.shape
    place_BT = torch.arange(T, dtype=torch.int32, device=noise_BT.device).expand(B, T)
    first_key_BT = torch.zeros_like(place_BT)
    query_end_BT = torch.full_like(place_BT, T)
    if documents is not None:
        ids_BT = documents.ids_BT
        is_new_BT = ids_BT.diff(dim=1, prepend=ids_BT[:, :1]) != 0
        first_key_BT = torch.where(is_new_BT, place_BT, 0).cummax(1).values
        is_last_BT = ids_BT.diff(dim=1, append=ids_BT[:, -1:]) != 0
        ends_BT = torch.where(is_last_BT, place_BT + 1, T)
        query_end_BT = ends_BT.flip(1).cummin(1).values.flip(1)
    if window is not None:
        window = min(window, T)  # a sum of int32
        first_key_BT = torch.maximum(first_key_BT, place_BT - window + 1)
        query_end_BT = torch.minimum(query_end_BT, place_BT + window)
    return first_key_BT.int().contiguous(), query_end_BT.int().contiguous()


def shapes_of_attention(q_BTHK: Tensor, v_BTGV: Tensor) -> tuple[Tensor, Tensor]:
    """The results of `attend`, without numbers."""
    B, T, H, _ = q_BTHK.shape
    o_BTHV = q_BTHK.new_empty(B, T, H, v_BTGV.shape[-1])
    return o_BTHV, q_BTHK.new_empty(B, H, T, dtype=torch.float32)


def rows_of_gradients(d_o_BTHV: Tensor, o_BTHV: Tensor) -> Tensor:
    """(B, H, T) fp32, of each row of weights the sum of its products with their gradients, which is
    that of the outputs with theirs."""
    return (d_o_BTHV.float() * o_BTHV.float()).sum(-1).transpose(1, 2).contiguous()


# scan_kernels.py


def selective_scan(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    initial_state_BDN: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.fast.scan_kernels.selective_scan_kernels."""
    h_BDN = start(initial_state_BDN, x_BTD, A_DN).contiguous()
    flows_BT = continues(documents)
    inputs = [x.contiguous() for x in (x_BTD, dt_BTD, A_DN.to(h_BDN.dtype), B_BTN, C_BTN)]
    y_BTD, last_BDN, _ = _Scan.apply(flows_BT, *inputs, h_BDN)
    return y_BTD, last_BDN


class _Scan(torch.autograd.Function):
    """longfire::scan_by_kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        flows_BT: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y_BTD, last_BDN, before_BCDN = shapes_of_scan(inputs[0], inputs[-1], TOKENS)
        ctx.save_for_backward(flows_BT, *inputs[:-1], before_BCDN)
        return y_BTD, last_BDN, before_BCDN

    @staticmethod
    def backward(
        ctx: Any,
        d_y_BTD: Tensor,
        d_last_BDN: Tensor,
        _: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_BTD, dt_BTD, A_DN, B_BTN, C_BTN = ctx.saved_tensors[1:6]
        B, T, D = x_BTD.shape
        N = A_DN.shape[1]
        d_y_BTD = d_y_BTD.contiguous()
        d_x_BTD = torch.empty_like(x_BTD)
        d_dt_BTD = torch.empty_like(dt_BTD)
        d_A_BDN = torch.empty_like(d_last_BDN)
        blocks = -(-D // BLOCK_CHANNELS)
        d_B_parts = d_last_BDN.new_empty(blocks, B, T, N)
        d_C_parts = d_last_BDN.new_empty(blocks, B, T, N)
        d_first_BDN = torch.empty_like(d_last_BDN)
        chunk_BTDN = d_last_BDN.new_empty(B, TOKENS + 1, D, N)
        del chunk_BTDN
        d_B = d_B_parts.sum(0).to(B_BTN.dtype)
        d_C = d_C_parts.sum(0).to(C_BTN.dtype)
        return None, d_x_BTD, d_dt_BTD, d_A_BDN.sum(0), d_B, d_C, d_first_BDN


def shapes_of_scan(
    x_BTD: Tensor, h_BDN: Tensor, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `scan`, without numbers."""
    B, T, _ = x_BTD.shape
    chunks = -(-T // chunk_tokens)
    before_BCDN = h_BDN.new_empty(B, chunks, *h_BDN.shape[1:])
    return torch.empty_like(x_BTD), torch.empty_like(h_BDN), before_BCDN
