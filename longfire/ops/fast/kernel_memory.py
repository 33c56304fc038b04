"""What fla's kernels (fla-core 0.6.0) allocate and keep, without numbers: for a planner's fake
tensors, which stand for a CUDA device that is not here.

Every kernel of SHAPES allocates what the one of the same name in fla_functions.KERNELS does, in the
same order, and lets it go as early; nothing is computed. So what a step holds is counted as torch's
allocator would count it: tests/null_gpu compares both. kernel_calls.py is between these and our
signatures, as it is for the kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.fast import kernel_calls

CHUNK = 64  # tokens of a chunk
DPLR_CHUNK = 16
WIDE_KEYS = 256  # above, the products of a chunk are made in parts of WIDE_PART
WIDE_PART = 128
BLOCK = 16  # tokens of a block inside of a chunk
RECURRENT_PART = 64  # keys, and values, of a program that walks the tokens
DELTA_PART = 128  # keys of a program where the device has as much shared memory as an H100
KDA_PART = 32

Inputs = dict[str, Tensor]
Kept = tuple[Tensor, ...]


class Kernel(NamedTuple):
    """One of fla's autograd functions. forward: of the inputs, the outputs, the last state and what
    is kept beside inputs. backward: of the inputs, what was kept and the outputs' gradient, the
    gradients by the inputs' names. lets_go: inputs that are not kept."""

    forward: Callable[[Inputs], tuple[Tensor, Tensor, Kept]]
    backward: Callable[[Inputs, Kept, Tensor], Inputs]
    lets_go: tuple[str, ...] = ()


class _Shapes(torch.autograd.Function):
    """Allocates and keeps what a kernel does."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        names: tuple[str, ...],
        state: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = dict(zip(names, tensors))
        o, last_state, kept = kernel.forward(inputs)
        ctx.kernel = kernel
        ctx.names = tuple(name for name in names if name not in kernel.lets_go)
        ctx.all_names = names
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state, *[inputs[name] for name in ctx.names], *kept)
        return o.to(tensors[0].dtype), last_state

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_last_state: Tensor | None) -> tuple[Tensor | None, ...]:
        state, *saved = ctx.saved_tensors
        inputs = dict(zip(ctx.names, saved))
        kept = tuple(saved[len(inputs) :])
        d_o = d_o.contiguous()
        d_state = None if state is None else torch.empty_like(state)
        found = ctx.kernel.backward(inputs, kept, d_o)
        for name, x in inputs.items():
            found[name] = found[name].to(x.dtype)
        return None, None, d_state, *[found[name] for name in ctx.all_names]


def run(
    kernel: str,
    inputs: dict[str, Tensor],
    scale: float | None,
    state: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """In the place of kernels.run. Documents are not planned."""
    return run_shapes(SHAPES[kernel], inputs, state)


def run_shapes(kernel: Kernel, inputs: Inputs, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs and the last state, without numbers."""
    laid_out = [x.contiguous() for x in inputs.values()]
    return _Shapes.apply(kernel, tuple(inputs), state, *laid_out)


def parts(size: int, part: int) -> int:
    """How many programs share `size` numbers; each has `part` of them at most."""
    return -(-size // part)


def states(k: Tensor, v: Tensor, dtype: torch.dtype, chunk: int = CHUNK) -> Tensor:
    """(B, chunks, H, K, V), the states before each chunk."""
    B, T, H, V = v.shape
    return k.new_empty(B, parts(T, chunk), H, k.shape[-1], V, dtype=dtype)


def last_state(k: Tensor, v: Tensor) -> Tensor:
    """(B, H, K, V)."""
    B, _, H, V = v.shape
    return k.new_empty(B, H, k.shape[-1], V, dtype=torch.float32)


def squares(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, size), of each token its products with those of its chunk."""
    return x.new_empty(*x.shape[:3], size, dtype=dtype)


def fp32(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


# chunk_gla


def gla_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    q = x["q"]
    k = x["k"]
    v = x["v"]
    g_cumsum = fp32(x["g"])
    h = states(k, v, k.dtype)
    last = last_state(k, v)
    A = squares(q, CHUNK, torch.float32)
    wide_A = gla_wide_products(q)
    del wide_A
    o = torch.empty_like(v)
    del h
    return o, last, (g_cumsum, A)


def gla_wide_products(q: Tensor) -> Tensor | None:
    """What of the products of a block wide keys take in parts."""
    K = q.shape[-1]
    if K <= WIDE_KEYS:
        return None
    count = parts(K, WIDE_PART)
    return q.new_empty(count, *q.shape[:3], BLOCK, dtype=torch.float32)


def gla_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    q = x["q"]
    k = x["k"]
    v = x["v"]
    g_cumsum, _ = kept
    h = states(k, v, torch.float32)
    d_h = torch.empty_like(h)
    d_v = torch.empty_like(d_o)
    d_A = squares(q, CHUNK, torch.float32)
    inside = fp32(q), fp32(k)
    d_g = torch.empty_like(g_cumsum)
    d_q = fp32(q)
    d_k = fp32(k)
    del h, d_h, d_A, inside
    return {"q": d_q, "k": d_k, "v": d_v, "g": d_g}


# chunk_simple_gla


def simple_gla_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    k = x["k"]
    v = x["v"]
    kept = (fp32(x["g"]),) if "g" in x else ()
    h = states(k, v, k.dtype)
    last = last_state(k, v)
    o = torch.empty_like(v)
    del h
    return o, last, kept


def simple_gla_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    q = x["q"]
    k = x["k"]
    v = x["v"]
    h = states(k, v, torch.float32)
    d_h = torch.empty_like(h)
    found = {"q": torch.empty_like(q), "k": torch.empty_like(k)}
    for g in kept:
        found["g"] = torch.empty_like(summed_parts(g, parts(q.shape[-1], DELTA_PART)))
    found["v"] = torch.empty_like(d_o)
    del h, d_h
    return found


def summed_parts(x: Tensor, count: int) -> Tensor:
    """What `count` programs found, in fp32, and their sum where they are several."""
    if count == 1:
        return fp32(x)
    return x.new_empty(count, *x.shape, dtype=torch.float32).sum(0)


# fused_recurrent_gla


def recurrent_gla_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    k = x["k"]
    v = x["v"]
    last = last_state(k, v)
    o = summed_parts(v, parts(k.shape[-1], RECURRENT_PART))
    return o, last, (o,)


def recurrent_gla_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    of_keys = parts(x["k"].shape[-1], RECURRENT_PART)
    of_values = parts(x["v"].shape[-1], RECURRENT_PART)
    count = {"q": of_values, "k": of_values, "gk": of_values, "v": of_keys, "gv": of_keys}
    in_parts: Inputs = {}
    for name, tensor in x.items():
        in_parts[name] = tensor.new_empty(count[name], *tensor.shape, dtype=torch.float32)
    found: Inputs = {}
    for name in x:
        part = in_parts.pop(name)
        found[name] = part[0] if count[name] == 1 else part.sum(0)
    return found


# chunk_gated_delta_rule


def gated_delta_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    k = x["k"]
    v = x["v"]
    g_cumsum = fp32(x["g"])
    A = squares(v, CHUNK, k.dtype)
    w = torch.empty_like(k)
    u = torch.empty_like(v)
    h = states(k, v, k.dtype)
    last = last_state(k, v)
    new_v = torch.empty_like(u)
    o = torch.empty_like(v)
    del w, u, h, new_v
    return o, last, (g_cumsum, A)


def gated_delta_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    q = x["q"]
    k = x["k"]
    v = x["v"]
    beta = x["beta"]
    g_cumsum, _ = kept
    w = torch.empty_like(k)
    u = torch.empty_like(v)
    h = states(k, v, k.dtype)
    new_v = torch.empty_like(u)
    d_v = torch.empty_like(d_o)
    d_h = torch.empty_like(h)
    d_v = torch.empty_like(d_v)
    d_q = torch.empty_like(q)
    d_k = torch.empty_like(k)
    d_w = torch.empty_like(w)
    d_g = summed_parts(g_cumsum, parts(q.shape[-1], DELTA_PART))
    d_k2 = torch.empty_like(k)
    d_v = torch.empty_like(v)
    d_g2 = torch.empty_like(g_cumsum)
    d_beta = torch.empty_like(beta)
    d_g = torch.empty_like(d_g)
    del w, u, h, new_v, d_h, d_w, d_k2, d_g2
    return {"q": d_q, "k": d_k, "v": d_v, "beta": d_beta, "g": d_g}


# chunk_kda


def kda_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    k = x["k"]
    v = x["v"]
    g_cumsum = fp32(x["g"])
    A_qk = squares(v, CHUNK, k.dtype)
    A_kk = squares(v, CHUNK, k.dtype)
    diagonal = squares(v, BLOCK, torch.float32)
    w = torch.empty_like(k)
    u = torch.empty_like(v)
    decayed_k = torch.empty_like(k)
    del diagonal
    h = states(k, v, k.dtype)
    new_v = torch.empty_like(u)
    last = last_state(k, v)
    o = torch.empty_like(v)
    del w, u, decayed_k, h, new_v
    return o, last, (g_cumsum, A_qk, A_kk)


def kda_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    q = x["q"]
    k = x["k"]
    v = x["v"]
    beta = x["beta"]
    g_cumsum, _, A_kk = kept
    w = torch.empty_like(k)
    u = torch.empty_like(v)
    decayed_q = torch.empty_like(q)
    decayed_k = torch.empty_like(k)
    h = states(k, v, k.dtype)
    new_v = torch.empty_like(u)
    d_A_qk = squares(v, CHUNK, torch.float32)
    d_v = torch.empty_like(d_o)
    d_h = torch.empty_like(h)
    d_v = torch.empty_like(d_v)
    d_q = fp32(q)
    d_k = fp32(k)
    d_v = torch.empty_like(v)
    d_g = fp32(g_cumsum)
    d_beta = fp32(beta)
    d_A_kk = fp32(A_kk)
    d_q2 = torch.empty_like(d_q)
    d_k2 = torch.empty_like(d_k)
    count = parts(k.shape[-1], KDA_PART)
    d_beta_parts = beta.new_empty(count, *beta.shape, dtype=torch.float32)
    d_g2 = torch.empty_like(d_g)
    d_beta = d_beta_parts.sum(0)
    del d_q, d_k, d_g, d_beta_parts
    d_g = torch.empty_like(d_g2)
    del w, u, decayed_q, decayed_k, h, new_v, d_A_qk, d_A_kk, d_h, d_g2
    return {"q": d_q2, "k": d_k2, "v": d_v, "beta": d_beta, "g": d_g}


# chunk_dplr_delta_rule


class DplrChunks(NamedTuple):
    """What the forward makes, and the backward makes again."""

    decays: tuple[Tensor, Tensor]
    A_ab: Tensor
    products: tuple[Tensor, Tensor, Tensor]
    decayed: tuple[Tensor, Tensor, Tensor, Tensor]
    w: Tensor
    u: Tensor
    inverse: Tensor
    h: Tensor
    new_v: Tensor


def dplr_chunks(x: Inputs) -> DplrChunks:
    q = x["q"]
    v = x["v"]
    decays = fp32(x["gk"]), fp32(x["gk"])
    A_qk = squares(q, DPLR_CHUNK, q.dtype)
    A_qb = squares(q, DPLR_CHUNK, q.dtype)
    A_ab = squares(q, DPLR_CHUNK, torch.float32)
    A_ak = squares(q, DPLR_CHUNK, torch.float32)
    decayed = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    inverse = torch.empty_like(A_ab)
    w = torch.empty_like(q)
    u = torch.empty_like(v)
    h = states(q, v, q.dtype, DPLR_CHUNK)
    new_v = torch.empty_like(u)
    return DplrChunks(decays, A_ab, (A_qk, A_qb, A_ak), decayed, w, u, inverse, h, new_v)


def dplr_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    made = dplr_chunks(x)
    last = last_state(x["k"], x["v"])
    o = torch.empty_like(x["v"])
    del made
    return o, last, ()


def dplr_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    q = x["q"]
    v = x["v"]
    made = dplr_chunks(x)._replace(A_ab=q, u=q)  # both are let go
    d_A_qk = squares(q, DPLR_CHUNK, torch.float32)
    d_A_qb = squares(q, DPLR_CHUNK, torch.float32)
    d_u = torch.empty_like(v)
    d_h = torch.empty_like(made.h)
    d_new_v = torch.empty_like(d_u)
    d_v = torch.empty_like(d_o)
    B, T, H, K = q.shape
    d_decayed = [torch.empty_like(q) for _ in range(4)]
    d_last_g = q.new_empty(B, parts(T, DPLR_CHUNK), H, K, dtype=torch.float32)
    made = made._replace(new_v=q)  # let go too
    d_A_ab = torch.empty_like(d_A_qk)
    d_A_ak = torch.empty_like(d_A_qk)
    d_v = torch.empty_like(v)
    d_decayed.append(torch.empty_like(q))
    found = {"v": d_v}
    for name in ("q", "k", "a", "b"):
        found[name] = torch.empty_like(x[name])
    d_g = fp32(x["gk"]), fp32(x["gk"])
    found["gk"] = fp32(x["gk"])
    del made, d_A_qk, d_A_qb, d_u, d_h, d_new_v, d_decayed, d_last_g, d_A_ab, d_A_ak, d_g
    return found


# causal_conv1d


def convolution_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    rows = x["x"]
    last = rows.new_empty(len(rows), *x["weight"].shape)
    return torch.empty_like(rows), last, ()


def convolution_backward(x: Inputs, kept: Kept, d_y: Tensor, has_silu: bool) -> Inputs:
    B, T, _ = x["x"].shape
    y = torch.empty_like(d_y) if has_silu else None
    found = {"x": torch.empty_like(x["x"])}
    in_parts: Inputs = {}
    for name in x:
        if name != "x":
            size = (B * parts(T, CHUNK), *x[name].shape)
            in_parts[name] = x[name].new_empty(size, dtype=torch.float32)
    for name, part in in_parts.items():
        found[name] = part.sum(0)
    del y
    return found


CONVOLUTION = Kernel(convolution_forward, partial(convolution_backward, has_silu=False))
CONVOLUTION_WITH_SILU = Kernel(convolution_forward, partial(convolution_backward, has_silu=True))
RECURRENT = Kernel(recurrent_gla_forward, recurrent_gla_backward)
SIMPLE_GLA = Kernel(simple_gla_forward, simple_gla_backward, lets_go=("g",))
SHAPES = {
    "gla": Kernel(gla_forward, gla_backward, lets_go=("g",)),
    "simple_gla": SIMPLE_GLA,
    "simple_gla_decay": SIMPLE_GLA,
    "recurrent_gv": RECURRENT,
    "recurrent_gk_gv": RECURRENT,
    "gated_delta_rule": Kernel(gated_delta_forward, gated_delta_backward, lets_go=("g",)),
    "kda": Kernel(kda_forward, kda_backward),
    "dplr": Kernel(dplr_forward, dplr_backward),
    "short_conv": CONVOLUTION,
    "short_conv_bias": CONVOLUTION,
    "short_conv_silu": CONVOLUTION_WITH_SILU,
    "short_conv_bias_silu": CONVOLUTION_WITH_SILU,
}
linear_attention = partial(kernel_calls.linear_attention, run)
delta_rule = partial(kernel_calls.delta_rule, run)
dplr = partial(kernel_calls.dplr, run)
short_conv = partial(kernel_calls.short_conv, run)
