"""Gated linear attention: a matrix state that forgets each key channel at a rate the input chooses."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from longfire.mixers.mixer import Mixer, Sequence, divides, one_of, positive
from longfire.ops.linear import Linear
from longfire.ops.linear_attention import linear_attention
from longfire.ops.norm import GatedRMSNorm, RMSNorm
from longfire.ops.short_conv import ShortConv, short_conv
from longfire.shape import ModelShape

FEATURE_MAPS = {"none": lambda x: x, "relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class GLAShape:
    num_heads: int
    num_kv_heads: int = 0  # 0: as many as num_heads
    expand_k: float = 0.5  # key size of all heads / hidden_size
    expand_v: float = 1.0
    feature_map: str = "none"  # of q and k: none, relu, swish
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    gate_logit_normalizer: float = 16.0  # the paper's tau: keeps the decay near 1 at the start
    gate_low_rank: int = 16
    clamp_min: float | None = None  # lowest log decay of a step

    def check(self, hidden_size: int) -> None:
        divides("gla", "num_heads", self.num_heads, "hidden_size * expand_k", hidden_size * self.expand_k)
        divides("gla", "num_heads", self.num_heads, "hidden_size * expand_v", hidden_size * self.expand_v)
        divides("gla", "num_kv_heads", self.num_kv_heads or self.num_heads, "num_heads", self.num_heads)
        positive("gla", conv_size=self.conv_size, gate_logit_normalizer=self.gate_logit_normalizer)
        positive("gla", gate_low_rank=self.gate_low_rank)
        one_of("gla", "feature_map", self.feature_map, FEATURE_MAPS)


class GLA(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), a_t = sigmoid(W2 W1 x_t)^(1/16) (Yang 2023, eq. 3 and 4.4).

    The heads' outputs are normalised, gated by swish(W_g x_t) and projected. Names are those of fla's GatedLinearAttention.
    """

    Shape = GLAShape
    roles = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "g_proj": "column", "gk_proj.0": "replicate",
             "gk_proj.1": "column", "o_proj": "row", "g_norm": "replicate", "g_norm_swish_gate": "replicate",
             "q_conv1d": "head", "k_conv1d": "head", "v_conv1d": "head"}  # fmt: skip
    context = ("state", "halo")

    def __init__(self, model: ModelShape, shape: GLAShape, layer: int) -> None:
        super().__init__(model, shape, layer)
        hidden_size, norm_eps = model.hidden_size, model.norm_eps
        self.groups = shape.num_heads // (shape.num_kv_heads or shape.num_heads)
        key_size, value_size = round(hidden_size * shape.expand_k), round(hidden_size * shape.expand_v)
        self.head_k, self.head_v = key_size // shape.num_heads, value_size // shape.num_heads
        self.q_proj = Linear(hidden_size, key_size, bias=False)
        self.k_proj = Linear(hidden_size, key_size // self.groups, bias=False)
        self.v_proj = Linear(hidden_size, value_size // self.groups, bias=False)
        self.gk_proj = nn.Sequential(Linear(hidden_size, shape.gate_low_rank, bias=False),
                                     Linear(shape.gate_low_rank, key_size // self.groups, bias=True))  # fmt: skip
        self.o_proj = Linear(value_size, hidden_size, bias=False)
        if shape.use_short_conv:
            self.q_conv1d = ShortConv(key_size, shape.conv_size)
            self.k_conv1d = ShortConv(key_size // self.groups, shape.conv_size)
            self.v_conv1d = ShortConv(value_size // self.groups, shape.conv_size)
        if shape.use_output_gate:
            self.g_proj = Linear(hidden_size, value_size, bias=False)
            self.g_norm_swish_gate = GatedRMSNorm(self.head_v, norm_eps)
        else:
            self.g_norm = RMSNorm(self.head_v, norm_eps)
        self.recur, self.convolve = linear_attention, short_conv

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q, k, v = (self.convolved(name, getattr(self, f"{name}_proj")(x_BTD), seq) for name in "qkv")
        q_BTHK = q.unflatten(-1, (-1, self.head_k))
        k_BTHK, v_BTHV = self.per_head(k, self.head_k), self.per_head(v, self.head_v)
        g_BTHK = (
            F.logsigmoid(self.per_head(self.gk_proj(x_BTD), self.head_k).float()) / self.shape.gate_logit_normalizer
        )
        if self.shape.clamp_min is not None:
            g_BTHK = g_BTHK.clamp_min(self.shape.clamp_min)
        feature_map = FEATURE_MAPS[self.shape.feature_map]
        o_BTHV, kept["state"] = self.recur(
            feature_map(q_BTHK), feature_map(k_BTHK), v_BTHV, g_BTHK,
            initial_state_BHKV=kept.get("state"), documents=seq.documents,
        )  # fmt: skip
        if self.shape.use_output_gate:
            o_BTHV = self.g_norm_swish_gate(o_BTHV, self.g_proj(x_BTD).unflatten(-1, (-1, self.head_v)))
        else:
            o_BTHV = self.g_norm(o_BTHV)
        return self.o_proj(o_BTHV.flatten(-2))

    def per_head(self, x_BTD: Tensor, size: int) -> Tensor:
        """(B, T, G * size) -> (B, T, H, size): each key/value head serves `groups` query heads."""
        x_BTGK = x_BTD.unflatten(-1, (-1, size))
        return x_BTGK if self.groups == 1 else x_BTGK.repeat_interleave(self.groups, 2)

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        return matrices + 4 * self.shape.num_heads * self.head_k * self.head_v  # write k v^T, read S^T q
