"""Mamba's selective scan in two Triton kernels (ops/selective_scan.py).

A program has some channels of one sequence, keeps their states in registers, and walks the tokens;
the torch form starts several kernels for each token instead. The forward keeps the state before
each chunk of TOKENS tokens. The backward walks the chunks from the last to the first: it makes the
states of a chunk anew from the one before it, and then the gradients, token by token (Gu and Dao
2023, "Mamba", section 3.3.2: recomputation instead of states in memory). Gradients of B and C are
sums over channels, of which a program has some: parts are written and added up in a fixed order,
since atomic additions would change from run to run.

Imported only where `choose` found Triton and CUDA. Tests run the kernels in Triton's interpreter.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longfire.ops.documents import Documents, continues
from longfire.ops.fast.triton_memory import BLOCK_CHANNELS, TOKENS, shapes_of_scan
from longfire.ops.selective_scan import start

WARPS = 2


def selective_scan_kernels(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    initial_state_BDN: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.selective_scan.selective_scan. Same arguments and result."""
    h_BDN = start(initial_state_BDN, x_BTD, A_DN).contiguous()
    flows_BT = continues(documents)
    starts_BT = None if flows_BT is None else ~flows_BT
    inputs = [x.contiguous() for x in (x_BTD, dt_BTD, A_DN.to(h_BDN.dtype), B_BTN, C_BTN)]
    y_BTD, last_BDN, _ = scan(*inputs, h_BDN, starts_BT)
    return y_BTD, last_BDN


@triton.jit
def inputs_of_token(
    x_ptr,
    dt_ptr,
    B_ptr,
    starts_ptr,
    A,
    channels,
    numbers,
    token,
    D,
    N,
    HAS_STARTS: tl.constexpr,
):
    """x and dt of some channels, the N numbers of B, and the decay of each state; the state before
    a start counts for nothing."""
    x = tl.load(x_ptr + token * D + channels, mask=channels < D, other=0.0).to(A.dtype)
    dt = tl.load(dt_ptr + token * D + channels, mask=channels < D, other=0.0).to(A.dtype)
    b = tl.load(B_ptr + token * N + numbers, mask=numbers < N, other=0.0).to(A.dtype)
    decay = tl.exp(dt[:, None] * A)
    if HAS_STARTS:
        decay = tl.where(tl.load(starts_ptr + token), 0.0, decay)
    return x, dt, b, decay


@triton.jit
def scan_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    first_ptr,
    starts_ptr,
    y_ptr,
    last_ptr,
    before_ptr,
    T,
    D,
    N,
    TOKENS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for each sequence and block of channels. Shapes: x, dt, y (B, T, D); A (D, N); B,
    C (B, T, N); first, last (B, D, N); starts (B, T); before (B, chunks, D, N)."""
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    numbers = tl.arange(0, BLOCK_N)
    states = channels[:, None] * N + numbers[None, :]
    is_state = (channels[:, None] < D) & (numbers[None, :] < N)
    A = tl.load(A_ptr + states, mask=is_state, other=0.0)
    h = tl.load(first_ptr + sequence * D * N + states, mask=is_state, other=0.0)
    chunks = tl.cdiv(T, TOKENS)
    for t in range(T):
        token = sequence * T + t
        if t % TOKENS == 0:
            place = (sequence * chunks + t // TOKENS) * D * N
            tl.store(before_ptr + place + states, h, mask=is_state)
        x, dt, b, decay = inputs_of_token(
            x_ptr, dt_ptr, B_ptr, starts_ptr, A, channels, numbers, token, D, N, HAS_STARTS
        )
        c = tl.load(C_ptr + token * N + numbers, mask=numbers < N, other=0.0).to(h.dtype)
        h = decay * h + (dt * x)[:, None] * b[None, :]
        y = tl.sum(h * c[None, :], 1)
        tl.store(y_ptr + token * D + channels, y.to(y_ptr.dtype.element_ty), mask=channels < D)
    tl.store(last_ptr + sequence * D * N + states, h, mask=is_state)


@triton.jit
def write_states(
    x_ptr,
    dt_ptr,
    B_ptr,
    starts_ptr,
    own_states_ptr,
    A,
    h,
    channels,
    numbers,
    is_state,
    first_token,
    count,
    D,
    N,
    HAS_STARTS: tl.constexpr,
):
    """The states of some tokens, from the one before them, behind it in memory."""
    tl.store(own_states_ptr, h, mask=is_state)
    for i in range(count):
        token = first_token + i
        x, dt, b, decay = inputs_of_token(
            x_ptr, dt_ptr, B_ptr, starts_ptr, A, channels, numbers, token, D, N, HAS_STARTS
        )
        h = decay * h + (dt * x)[:, None] * b[None, :]
        tl.store(own_states_ptr + (i + 1) * D * N, h, mask=is_state)


@triton.jit
def scan_backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    starts_ptr,
    before_ptr,
    d_y_ptr,
    d_last_ptr,
    chunk_states_ptr,
    d_x_ptr,
    d_dt_ptr,
    d_A_ptr,
    d_B_ptr,
    d_C_ptr,
    d_first_ptr,
    T,
    D,
    N,
    TOKENS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As scan_kernel. chunk_states (B, TOKENS + 1, D, N): the states of the chunk at hand, the one
    before it first. d_A (B, D, N); d_B, d_C (blocks of channels, B, T, N): parts that are added
    up."""
    sequence = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    numbers = tl.arange(0, BLOCK_N)
    states = channels[:, None] * N + numbers[None, :]
    is_state = (channels[:, None] < D) & (numbers[None, :] < N)
    A = tl.load(A_ptr + states, mask=is_state, other=0.0)
    carried = tl.load(d_last_ptr + sequence * D * N + states, mask=is_state, other=0.0)
    d_A = tl.zeros((BLOCK_D, BLOCK_N), carried.dtype)
    chunks = tl.cdiv(T, TOKENS)
    own_states_ptr = chunk_states_ptr + sequence * (TOKENS + 1) * D * N + states
    for chunk_back in range(chunks):
        chunk = chunks - 1 - chunk_back
        begin = chunk * TOKENS
        count = tl.minimum(TOKENS, T - begin)
        place = (sequence * chunks + chunk) * D * N
        h = tl.load(before_ptr + place + states, mask=is_state, other=0.0)
        write_states(
            x_ptr,
            dt_ptr,
            B_ptr,
            starts_ptr,
            own_states_ptr,
            A,
            h,
            channels,
            numbers,
            is_state,
            sequence * T + begin,
            count,
            D,
            N,
            HAS_STARTS,
        )
        tl.debug_barrier()  # a state may be read by another thread than the one that wrote it
        for back in range(count):
            i = count - 1 - back
            token = sequence * T + begin + i
            h = tl.load(own_states_ptr + (i + 1) * D * N, mask=is_state, other=0.0)
            previous = tl.load(own_states_ptr + i * D * N, mask=is_state, other=0.0)
            x, dt, b, decay = inputs_of_token(
                x_ptr, dt_ptr, B_ptr, starts_ptr, A, channels, numbers, token, D, N, HAS_STARTS
            )
            c = tl.load(C_ptr + token * N + numbers, mask=numbers < N, other=0.0).to(h.dtype)
            d_y = tl.load(d_y_ptr + token * D + channels, mask=channels < D, other=0.0).to(h.dtype)
            d_h = c[None, :] * d_y[:, None] + carried
            carried = decay * d_h
            part = (block * tl.num_programs(0) + sequence) * T + begin + i
            d_c = tl.sum(h * d_y[:, None], 0)
            d_b = tl.sum(d_h * (dt * x)[:, None], 0)
            tl.store(d_C_ptr + part * N + numbers, d_c, mask=numbers < N)
            tl.store(d_B_ptr + part * N + numbers, d_b, mask=numbers < N)
            d_exponent = carried * previous  # the gradient of dt A
            d_A += d_exponent * dt[:, None]
            d_written = tl.sum(d_h * b[None, :], 1)  # the gradient of dt x
            d_dt = tl.sum(d_exponent * A, 1) + d_written * x
            d_x = d_written * dt
            place_ptr = token * D + channels
            tl.store(d_x_ptr + place_ptr, d_x.to(d_x_ptr.dtype.element_ty), mask=channels < D)
            tl.store(d_dt_ptr + place_ptr, d_dt.to(d_dt_ptr.dtype.element_ty), mask=channels < D)
        tl.debug_barrier()  # the next chunk's states take these places
    tl.store(d_A_ptr + sequence * D * N + states, d_A, mask=is_state)
    tl.store(d_first_ptr + sequence * D * N + states, carried, mask=is_state)


@torch.library.custom_op("longfire::scan_by_kernels", mutates_args=())
def scan(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BDN: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B, T, D) in x's dtype, the last state (B, D, N), the state before each chunk (B, chunks,
    D, N)). All tensors are contiguous; A and h are of the working dtype."""
    B, T, D = x_BTD.shape
    N = A_DN.shape[1]
    y_BTD, last_BDN, before_BCDN = shapes_of_scan(x_BTD, h_BDN, TOKENS)
    scan_kernel[(B, triton.cdiv(D, BLOCK_CHANNELS))](
        x_BTD,
        dt_BTD,
        A_DN,
        B_BTN,
        C_BTN,
        h_BDN,
        starts_BT,
        y_BTD,
        last_BDN,
        before_BCDN,
        T,
        D,
        N,
        TOKENS=TOKENS,
        HAS_STARTS=starts_BT is not None,
        BLOCK_D=BLOCK_CHANNELS,
        BLOCK_N=triton.next_power_of_2(N),
        num_warps=WARPS,
    )
    return y_BTD, last_BDN, before_BCDN


@scan.register_fake
def scan_shapes(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    h_BDN: Tensor,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return shapes_of_scan(x_BTD, h_BDN, TOKENS)


@torch.library.custom_op("longfire::scan_by_kernels_backward", mutates_args=())
def scan_backward(
    inputs: list[Tensor],
    starts_BT: Tensor | None,
    before_BCDN: Tensor,
    d_y_BTD: Tensor,
    d_last_BDN: Tensor,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C and the state before the first token. inputs: x, dt, A, B,
    C."""
    x_BTD, dt_BTD, A_DN, B_BTN, C_BTN = inputs
    B, T, D = x_BTD.shape
    N = A_DN.shape[1]
    blocks = triton.cdiv(D, BLOCK_CHANNELS)
    d_x_BTD = torch.empty_like(x_BTD)
    d_dt_BTD = torch.empty_like(dt_BTD)
    d_A_BDN = torch.empty_like(d_last_BDN)
    d_B_parts = d_last_BDN.new_empty(blocks, B, T, N)
    d_C_parts = d_last_BDN.new_empty(blocks, B, T, N)
    d_first_BDN = torch.empty_like(d_last_BDN)
    scan_backward_kernel[(B, blocks)](
        x_BTD,
        dt_BTD,
        A_DN,
        B_BTN,
        C_BTN,
        starts_BT,
        before_BCDN,
        d_y_BTD.contiguous(),
        d_last_BDN.contiguous(),
        d_last_BDN.new_empty(B, TOKENS + 1, D, N),
        d_x_BTD,
        d_dt_BTD,
        d_A_BDN,
        d_B_parts,
        d_C_parts,
        d_first_BDN,
        T,
        D,
        N,
        TOKENS=TOKENS,
        HAS_STARTS=starts_BT is not None,
        BLOCK_D=BLOCK_CHANNELS,
        BLOCK_N=triton.next_power_of_2(N),
        num_warps=WARPS,
    )
    return [
        d_x_BTD,
        d_dt_BTD,
        d_A_BDN.sum(0),
        d_B_parts.sum(0).to(B_BTN.dtype),
        d_C_parts.sum(0).to(C_BTN.dtype),
        d_first_BDN,
    ]


@scan_backward.register_fake
def scan_backward_shapes(
    inputs: list[Tensor],
    starts_BT: Tensor | None,
    before_BCDN: Tensor,
    d_y_BTD: Tensor,
    d_last_BDN: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (*inputs, d_last_BDN)]


def keep(
    ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, _, ctx.starts_BT = inputs
    ctx.save_for_backward(*tensors, output[2])


def gradients(
    ctx: Any, d_y_BTD: Tensor, d_last_BDN: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    *inputs, before_BCDN = ctx.saved_tensors
    found = scan_backward(inputs, ctx.starts_BT, before_BCDN, d_y_BTD, d_last_BDN)
    return *found, None


scan.register_autograd(gradients, setup_context=keep)
