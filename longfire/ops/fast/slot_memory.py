"""What fla's kernels of gated slot attention (slot_kernels.py) allocate and keep, without numbers:
for a planner's fake tensors, as in kernel_memory.py."""

from functools import partial

import torch
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.fast import kernel_calls
from longfire.ops.fast.kernel_memory import (
    CHUNK,
    Inputs,
    Kept,
    Kernel,
    fp32,
    gla_backward,
    gla_wide_products,
    last_state,
    parts,
    run_shapes,
    squares,
    states,
)

PART = 64  # keys, and slots, of a program of the backward


def slot_forward(x: Inputs) -> tuple[Tensor, Tensor, Kept]:
    q = x["q"]
    k = x["k"]
    v = x["v"]
    s = x["s"]
    g_cumsum = fp32(x["g"])
    h_of_keys = states(k, s, k.dtype)
    last_keys = last_state(k, s)
    scores = torch.empty_like(s)
    products = squares(q, CHUNK, q.dtype)
    del products
    weights = fp32(s)
    rounded = q.new_empty(s.shape)
    h_of_values = states(s, v, s.dtype)
    last_values = last_state(s, v)
    A = squares(q, CHUNK, torch.float32)
    wide_A = gla_wide_products(rounded)
    del wide_A
    o = torch.empty_like(v)
    del g_cumsum, h_of_keys, h_of_values, rounded
    return o, torch.cat([last_keys.mT, last_values], -1), (scores, weights, A)


def slot_backward(x: Inputs, kept: Kept, d_o: Tensor) -> Inputs:
    q = x["q"]
    k = x["k"]
    s = x["s"]
    scores, weights, A = kept
    g_cumsum = fp32(x["g"])
    rounded = weights.to(q.dtype)
    of_values = gla_backward({"q": rounded, "k": s, "v": x["v"]}, (g_cumsum, A), d_o)
    d_scores = torch.empty_like(scores)
    h = states(k, s, k.dtype)
    d_h = states(k, s, torch.float32)
    key_parts = parts(k.shape[-1], PART)
    tokens = (*q.shape[:3], CHUNK)
    d_products = summed(q.new_empty(parts(s.shape[-1], PART), *tokens))
    products = scores.new_empty(key_parts, *tokens)
    found = {"q": torch.empty_like(q), "k": torch.empty_like(k), "v": of_values["v"]}
    d_s = s.new_empty(key_parts, *s.shape)
    d_g = g_cumsum.new_empty(key_parts, *s.shape)
    products = summed(products)
    d_s = summed(d_s)
    d_g = summed(d_g)
    sums = fp32(d_g)
    del d_scores, h, d_h, d_products, products, d_s, sums
    found["s"] = of_values["k"]
    found["g"] = d_g.to(s.dtype)
    return found


def summed(x: Tensor) -> Tensor:
    """The sum of what programs found, where they are several."""
    if len(x) == 1:
        return x[0]
    return x.sum(0, dtype=x.dtype)


SLOT_ATTENTION = Kernel(slot_forward, slot_backward)


def run(
    kernel: str,
    inputs: dict[str, Tensor],
    scale: float | None,
    state: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """In the place of kernels.run, of the one kernel here."""
    return run_shapes(SLOT_ATTENTION, inputs, state)


slot_attention = partial(kernel_calls.slot_attention, run)
