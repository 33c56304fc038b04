"""Functions of fla's signature (fla-core 0.6.0) behind ours: rows, documents and states in our
meaning. kernels.py calls fla's own so, kernel_memory.py their shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.linear_attention import for_heads_of

FlaFunction = Callable[..., tuple[Tensor, Tensor]]


class FlaFunctions(NamedTuple):
    """fla's functions, or what stands for them; run: `run` below, or the same not compiled."""

    chunk_gla: FlaFunction
    chunk_simple_gla: FlaFunction
    fused_recurrent_gla: FlaFunction
    chunk_gated_delta_rule: FlaFunction
    chunk_kda: FlaFunction
    chunk_dplr_delta_rule: FlaFunction
    causal_conv1d: FlaFunction
    run: FlaFunction


def linear_attention(
    fla: FlaFunctions,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.linear_attention.linear_attention. Value decay runs token by token: fla has
    no chunks for it alone."""
    q_BTHK, k_BTHK = for_heads_of(v_BTHV, q_BTHK, k_BTHK)
    inputs = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHV}
    groups = q_BTHK.shape[2] // k_BTHK.shape[2]
    assert gv is None or groups == 1, "the caller takes one set of queries at a time"
    if groups > 1:
        # the kernels have as many heads of all: repeated, and of equal states one is returned
        k = k_BTHK.repeat_interleave(groups, 2)
        v = v_BTHV.repeat_interleave(groups, 2)
        if g is not None:
            g = g.repeat_interleave(groups, 0 if g.dim() == 1 else 2)
        if initial_state_BHKV is None:
            state = None
        else:
            state = initial_state_BHKV.repeat_interleave(groups, 1)
        o_BTHV, last_state = linear_attention(
            fla, q_BTHK, k, v, g, scale=scale, initial_state_BHKV=state, documents=documents
        )
        return o_BTHV, last_state[:, ::groups]
    if gv is not None:
        decays = {"gv": gv.float()}
        if g is not None:
            decays["gk"] = (g if g.dim() == 4 else g[..., None]).float().expand_as(k_BTHK)
        return fla.run(
            fla.fused_recurrent_gla, inputs | decays, scale, initial_state_BHKV, documents
        )
    if (
        g is not None
    ):  # a constant (H,) too becomes a decay a step: the kernel's own `g_gamma` has no gradient
        inputs["g"] = (g.expand(q_BTHK.shape[:3]) if g.dim() == 1 else g).float()
    kernel = fla.chunk_gla if g is not None and g.dim() == 4 else fla.chunk_simple_gla
    return fla.run(kernel, inputs, scale, initial_state_BHKV, documents)


def delta_rule(
    fla: FlaFunctions,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    beta_BTH: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.delta_rule.delta_rule. No decay is a log decay of 0, since chunk_delta_rule
    refuses fp32."""
    g = torch.zeros_like(beta_BTH, dtype=torch.float32) if g is None else g.float()
    kernel = fla.chunk_kda if g.dim() == 4 else fla.chunk_gated_delta_rule
    inputs = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHV, "beta": beta_BTH, "g": g}
    return fla.run(kernel, inputs, scale, initial_state_BHKV, documents)


def dplr(
    fla: FlaFunctions,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    c_BTHK: Tensor,
    b_BTHK: Tensor,
    g_BTHK: Tensor,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.dplr.dplr. What we call c and b is a and b there."""
    inputs = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHV, "a": c_BTHK, "b": b_BTHK, "gk": g_BTHK.float()}
    return fla.run(fla.chunk_dplr_delta_rule, inputs, scale, initial_state_BHKV, documents)


def short_conv(
    fla: FlaFunctions,
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    silu: bool = True,
    state_BDW: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.short_conv.short_conv. fla keeps the last W inputs, of which the oldest is
    never used: ours is W - 1."""

    def kernel(
        x: Tensor, scale: None, initial_state: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        state = None if initial_state is None else F.pad(initial_state.to(x.dtype), (1, 0))
        activation = "silu" if silu else None
        return fla.causal_conv1d(
            x, weight_DW, bias_D, initial_state=state, activation=activation, **kwargs
        )

    y_BTD, last_state = fla.run(kernel, {"x": x_BTD}, None, state_BDW, documents)
    return y_BTD, last_state[..., 1:].to(x_BTD.dtype)


def run(
    kernel: FlaFunction,
    inputs: dict[str, Tensor],
    scale: float | None,
    state_BHKV: Tensor | None,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    """With documents the kernels want one long row, the documents' cumulative lengths, and a state
    for each document."""
    inputs = {name: x.contiguous() for name, x in inputs.items()}
    first = next(iter(inputs.values()))  # q, or x: what the output is like
    state = None if state_BHKV is None else state_BHKV.float()
    if documents is None:
        o, last_state = kernel(**inputs, scale=scale, initial_state=state, output_final_state=True)
        return o.to(first.dtype), last_state
    B, T = first.shape[:2]
    cu_lengths = documents.cu_lengths_int64
    lengths = {"cu_seqlens": cu_lengths, "cu_seqlens_cpu": documents.cu_lengths_cpu}
    row_starts = torch.arange(0, B * T, T, device=cu_lengths.device)
    if state is not None:
        first_documents = torch.searchsorted(cu_lengths, row_starts)
        empty = state.new_zeros(len(cu_lengths) - 1, *state.shape[1:])
        state = empty.index_copy(0, first_documents, state)
    o, last_states = kernel(
        **{name: x.flatten(0, 1)[None] for name, x in inputs.items()},
        scale=scale,
        initial_state=state,
        output_final_state=True,
        **lengths,
    )
    last_documents = torch.searchsorted(cu_lengths, row_starts + T) - 1
    return o.unflatten(1, (B, T))[0].to(first.dtype), last_states[last_documents]
