"""fla's autograd functions that we call, and what has to be known of each. custom_ops.py makes
operators of them. The versions of fla: constraints.txt."""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from fla.modules.causal_conv1d.ops import CausalConv1dFunction
from fla.ops.common.fused_recurrent import FusedRecurrentFunction
from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction
from fla.ops.generalized_delta_rule.dplr.chunk import ChunkDPLRDeltaRuleFunction
from fla.ops.gla.chunk import ChunkGLAFunction
from fla.ops.kda.chunk import ChunkKDAFunction
from fla.ops.simple_gla.chunk import ChunkSimpleGLAFunction

from longfire.ops.fast.slot_kernels import SlotAttentionFunction

CHUNK = 64  # tokens, in all functions that do not say otherwise

# What the functions can do besides, and we do not ask for. They are arguments of the forward, and
# attributes of the context of the backward.
UNUSED: dict[str, Any] = {
    "A_log": None,
    "activation": None,
    "allow_neg_eigval": False,
    "bias": None,
    "cp_context": None,
    "disable_recompute": False,
    "dt_bias": None,
    "g": None,
    "g_gamma": None,
    "gk": None,
    "gv": None,
    "layout_fallback": False,
    "lower_bound": None,
    "residual": None,
    "reverse": False,
    "safe_gate": False,
    "state_v_first": False,
    "use_beta_sigmoid_in_kernel": False,
    "use_gate_in_kernel": False,
    "use_graph": False,
    "use_qk_l2norm_in_kernel": False,
    "_dtype": None,  # of autocast, whose state torch.amp.custom_fwd would have noted
    "_fwd_used_autocast": False,
}


@dataclass(frozen=True)
class Kept:
    """A tensor that the forward makes for the backward: like the input `like`, or with `width`
    numbers for each head and token."""

    like: str
    dtype: torch.dtype | None = None  # that of `like` if None
    of_chunk: bool = False  # (B, T, heads, tokens of a chunk)


@dataclass(frozen=True)
class Kernel:
    """What has to be known of an autograd function of fla.

    inputs: its differentiable arguments, but for the initial state, in the order of our operator.
    saved: the names of what it saves for the backward, in its order: inputs, initial_state,
    cu_seqlens, chunk_indices, those of `kept`, or "" for None. options: see UNUSED.
    """

    function: type[torch.autograd.Function]
    inputs: tuple[str, ...]
    saved: tuple[str, ...]
    kept: dict[str, Kept] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    chunk: int | None = CHUNK  # None: for GLA, as long as a short row

    @property
    def needed(self) -> tuple[str, ...]:
        """The inputs that the backward needs."""
        return tuple(name for name in self.inputs if name in self.saved)

    def chunk_size(self, tokens: int) -> int:
        """Tokens of a chunk; tokens: of a row, or of all rows where there are documents."""
        if self.chunk is not None:
            return self.chunk
        return int(min(CHUNK, max(16, triton.next_power_of_2(tokens))))


QKV = ("q", "k", "v")
GATE_SUM = Kept("g", torch.float32)


def recurrent(inputs: tuple[str, ...]) -> Kernel:
    """fla's recurrence token by token. It keeps its output as it is before it is rounded."""
    decays = tuple(name if name in inputs else "" for name in ("gk", "gv"))
    saved = (*QKV, "", "", *decays, "initial_state", "o")
    return Kernel(FusedRecurrentFunction, inputs, saved, {"o": Kept("v", torch.float32)})


def convolution(inputs: tuple[str, ...], activation: str | None) -> Kernel:
    """fla's short convolution."""
    bias = "bias" if "bias" in inputs else ""
    saved = ("x", "weight", bias, "", "initial_state")
    return Kernel(CausalConv1dFunction, inputs, saved, options={"activation": activation})


KERNELS = {
    "gla": Kernel(
        ChunkGLAFunction,
        (*QKV, "g"),
        (*QKV, "", "g_sum", "initial_state", "A", "chunk_indices"),
        {"g_sum": GATE_SUM, "A": Kept("q", torch.float32, of_chunk=True)},
        chunk=None,
    ),
    "simple_gla": Kernel(
        ChunkSimpleGLAFunction, QKV, (*QKV, "", "", "initial_state", "chunk_indices")
    ),
    "simple_gla_decay": Kernel(
        ChunkSimpleGLAFunction,
        (*QKV, "g"),
        (*QKV, "g_sum", "", "initial_state", "chunk_indices"),
        {"g_sum": GATE_SUM},
    ),
    "recurrent_gv": recurrent((*QKV, "gv")),
    "recurrent_gk_gv": recurrent((*QKV, "gk", "gv")),
    "gated_delta_rule": Kernel(
        ChunkGatedDeltaRuleFunction,
        (*QKV, "beta", "g"),
        (
            *("q", "", "k", "", "v", "g_sum", "beta", "beta", "A"),
            *("initial_state", "cu_seqlens", "chunk_indices", "", "", ""),
        ),
        {"g_sum": GATE_SUM, "A": Kept("k", of_chunk=True)},
    ),
    "kda": Kernel(
        ChunkKDAFunction,
        (*QKV, "beta", "g"),
        (
            *("q", "", "k", "", "v", "g_sum", "g", "beta", "beta", "", "", "A_qk", "A_kk"),
            *("", "", "", "", "", "", "initial_state", "cu_seqlens", "chunk_indices", ""),
        ),
        {
            "g_sum": GATE_SUM,
            "A_qk": Kept("k", of_chunk=True),
            "A_kk": Kept("k", of_chunk=True),
        },
    ),
    "dplr": Kernel(
        ChunkDPLRDeltaRuleFunction,
        (*QKV, "a", "b", "gk"),
        (*QKV, "a", "b", "gk", "initial_state"),
        chunk=16,
    ),
    "gsa": Kernel(
        SlotAttentionFunction,
        (*QKV, "s", "g"),
        (*QKV, "s", "g", "scores", "weights", "A", "initial_state"),
        {
            "scores": Kept("s"),
            "weights": Kept("s", torch.float32),
            "A": Kept("q", torch.float32, of_chunk=True),
        },
    ),
    "short_conv": convolution(("x", "weight"), None),
    "short_conv_bias": convolution(("x", "weight", "bias"), None),
    "short_conv_silu": convolution(("x", "weight"), "silu"),
    "short_conv_bias_silu": convolution(("x", "weight", "bias"), "silu"),
}
# Inputs of each row and token
ROWS = frozenset({*QKV, "s", "g", "gk", "gv", "beta", "a", "b", "x"})
