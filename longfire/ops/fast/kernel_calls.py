"""Calls of fla's functions behind our signatures: which of them, and with what. kernels.py runs the
functions, kernel_memory.py what they allocate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.linear_attention import for_heads_of

# (a key of fla_functions.KERNELS, inputs by fla's names, scale, initial state of each row,
# documents) -> the output, and the last state of each row
Run = Callable[
    [str, dict[str, Tensor], float | None, Tensor | None, Documents | None], tuple[Tensor, Tensor]
]


def linear_attention(
    run: Run,
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
            run, q_BTHK, k, v, g, scale=scale, initial_state_BHKV=state, documents=documents
        )
        return o_BTHV, last_state[:, ::groups]
    if gv is not None:
        decays = {"gv": gv.float()}
        if g is not None:
            decays["gk"] = (g if g.dim() == 4 else g[..., None]).float().expand_as(k_BTHK)
        kernel = "recurrent_gk_gv" if "gk" in decays else "recurrent_gv"
        return run(kernel, inputs | decays, scale, initial_state_BHKV, documents)
    if (
        g is not None
    ):  # a constant (H,) too becomes a decay a step: the kernel's own `g_gamma` has no gradient
        inputs["g"] = (g.expand(q_BTHK.shape[:3]) if g.dim() == 1 else g).float()
    if g is None:
        kernel = "simple_gla"
    else:
        kernel = "gla" if g.dim() == 4 else "simple_gla_decay"
    return run(kernel, inputs, scale, initial_state_BHKV, documents)


def delta_rule(
    run: Run,
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
    kernel = "kda" if g.dim() == 4 else "gated_delta_rule"
    inputs = {"q": q_BTHK, "k": k_BTHK, "v": v_BTHV, "beta": beta_BTH, "g": g}
    return run(kernel, inputs, scale, initial_state_BHKV, documents)


def dplr(
    run: Run,
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
    return run("dplr", inputs, scale, initial_state_BHKV, documents)


def slot_attention(
    run: Run,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    s_BTGM: Tensor,
    g_BTGM: Tensor,
    *,
    initial_state_BGMX: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """As longfire.ops.slot_attention.slot_attention. The kernels have as many heads of all:
    repeated, and of equal states one is returned."""
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    inputs = {"k": k_BTGK, "v": v_BTGV, "s": s_BTGM, "g": g_BTGM.float()}
    state = initial_state_BGMX
    if groups > 1:
        inputs = {name: x.repeat_interleave(groups, 2) for name, x in inputs.items()}
        state = None if state is None else state.repeat_interleave(groups, 1)
    o_BTHV, last_state = run("gsa", {"q": q_BTHK, **inputs}, 1.0, state, documents)
    return o_BTHV, last_state[:, ::groups]


def short_conv(
    run: Run,
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
    kernel = "short_conv" if bias_D is None else "short_conv_bias"
    if silu:
        kernel += "_silu"
    inputs = {"x": x_BTD, "weight": weight_DW}
    if bias_D is not None:
        inputs["bias"] = bias_D
    state = None if state_BDW is None else F.pad(state_BDW.to(x_BTD.dtype), (1, 0))
    y_BTD, last_state = run(kernel, inputs, None, state, documents)
    return y_BTD, last_state[..., 1:].to(x_BTD.dtype)
