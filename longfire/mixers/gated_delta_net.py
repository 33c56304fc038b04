"""Gated DeltaNet: a matrix state that forgets at a rate the input chooses and overwrites what a key held before."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.mixers.mixer import Mixer, Sequence, divides, positive
from longfire.ops.delta_rule import delta_rule
from longfire.ops.linear import Linear
from longfire.ops.norm import GatedRMSNorm, RMSNorm, l2_norm
from longfire.ops.short_conv import ShortConv, short_conv
from longfire.shape import ModelShape


@dataclass(frozen=True)
class GatedDeltaNetShape:
    num_heads: int
    head_dim: int  # key size of a head
    num_v_heads: int = 0  # 0: as many as num_heads; more: several value heads share a query/key head
    expand_v: float = 2.0  # value size of a head / head_dim
    use_gate: bool = True
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False  # beta up to 2: the state can flip along a key (Grazzi 2024)

    def check(self, hidden_size: int) -> None:
        divides("gated_delta_net", "num_heads", self.num_heads, "num_v_heads", self.num_v_heads or self.num_heads)
        divides("gated_delta_net", "1", 1, "head_dim * expand_v", self.head_dim * self.expand_v)
        positive("gated_delta_net", conv_size=self.conv_size)


def init_decay_rate(A_log_H: Tensor, generator: torch.Generator) -> None:
    """A uniform in (0, 16): heads from almost no forgetting to fast (Mamba-2's rule, kept by fla)."""
    A_log_H.uniform_(0, 16, generator=generator).clamp_min_(1e-4).log_()


def init_step_size(dt_bias_H: Tensor, generator: torch.Generator) -> None:
    """softplus(dt_bias) log-uniform in [0.001, 0.1] (Mamba's rule); the inverse of softplus is x + log(1 - exp(-x))."""
    dt = dt_bias_H.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp_().clamp_min_(1e-4)
    dt_bias_H.copy_(dt + torch.log(-torch.expm1(-dt)))


class GatedDeltaNet(Mixer):
    """S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K) (Yang 2024, eq. 10),
    g_t = -exp(A) softplus(W_a x_t + dt), b_t = sigmoid(W_b x_t), q and k of unit length.

    Names are those of fla's GatedDeltaNet. `A_log` and `dt_bias` have initialisers of their own and stay fp32.
    """

    Shape = GatedDeltaNetShape
    roles = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "a_proj": "column", "b_proj": "column",
             "g_proj": "column", "o_proj": "row", "o_norm": "replicate", "A_log": "head", "dt_bias": "head",
             "q_conv1d": "head", "k_conv1d": "head", "v_conv1d": "head"}  # fmt: skip
    context = ("state", "halo")
    own_init = {"A_log": init_decay_rate, "dt_bias": init_step_size}
    keep_fp32 = ("A_log", "dt_bias")

    def __init__(self, model: ModelShape, shape: GatedDeltaNetShape, layer: int) -> None:
        super().__init__(model, shape, layer)
        hidden_size, norm_eps = model.hidden_size, model.norm_eps
        heads, v_heads = shape.num_heads, shape.num_v_heads or shape.num_heads
        self.groups, self.head_k, self.head_v = v_heads // heads, shape.head_dim, round(shape.head_dim * shape.expand_v)
        key_size, value_size = heads * self.head_k, v_heads * self.head_v
        self.q_proj = Linear(hidden_size, key_size, bias=False)
        self.k_proj = Linear(hidden_size, key_size, bias=False)
        self.v_proj = Linear(hidden_size, value_size, bias=False)
        self.a_proj = Linear(hidden_size, v_heads, bias=False)
        self.b_proj = Linear(hidden_size, v_heads, bias=False)
        self.o_proj = Linear(value_size, hidden_size, bias=False)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(v_heads)), nn.Parameter(torch.empty(v_heads))
        if shape.use_short_conv:
            self.q_conv1d = ShortConv(key_size, shape.conv_size)
            self.k_conv1d = ShortConv(key_size, shape.conv_size)
            self.v_conv1d = ShortConv(value_size, shape.conv_size)
        if shape.use_gate:
            self.g_proj = Linear(hidden_size, value_size, bias=False)
            self.o_norm = GatedRMSNorm(self.head_v, norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v, norm_eps)
        self.recur, self.convolve = delta_rule, short_conv

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q, k, v = (self.convolved(name, getattr(self, f"{name}_proj")(x_BTD), seq) for name in "qkv")
        if not self.shape.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q_BTHK, k_BTHK = (l2_norm(y.unflatten(-1, (-1, self.head_k)), 1e-6) for y in (q, k))
        if self.groups > 1:
            q_BTHK, k_BTHK = q_BTHK.repeat_interleave(self.groups, 2), k_BTHK.repeat_interleave(self.groups, 2)
        beta_BTH = self.b_proj(x_BTD).float().sigmoid() * (2 if self.shape.allow_neg_eigval else 1)
        g_BTH = -self.A_log.float().exp() * F.softplus(self.a_proj(x_BTD).float() + self.dt_bias.float())
        o_BTHV, kept["state"] = self.recur(
            q_BTHK, k_BTHK, v.unflatten(-1, (-1, self.head_v)), beta_BTH, g_BTH,
            initial_state_BHKV=kept.get("state"), documents=seq.documents,
        )  # fmt: skip
        if self.shape.use_gate:
            o_BTHV = self.o_norm(o_BTHV, self.g_proj(x_BTD).unflatten(-1, (-1, self.head_v)))
        else:
            o_BTHV = self.o_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(-2))

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        heads = self.shape.num_v_heads or self.shape.num_heads
        return matrices + 6 * heads * self.head_k * self.head_v  # recall S^T k, write k u^T, read S^T q
