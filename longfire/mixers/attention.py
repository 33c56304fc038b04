"""Causal softmax attention with rotary positions and grouped heads."""

from dataclasses import dataclass

from torch import Tensor

from longfire.mixers.mixer import Mixer, Sequence, divides, positive
from longfire.ops.attention import attention
from longfire.ops.linear import Linear
from longfire.ops.norm import RMSNorm
from longfire.ops.rope import rope


@dataclass(frozen=True)
class AttentionShape:
    num_heads: int
    num_kv_heads: int = 0  # 0: as many as num_heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    rope_theta: float = 10000.0
    window_size: int = 0  # keys a query sees, itself included; 0: all before it
    qkv_bias: bool = False
    qk_norm: bool = False

    def check(self, hidden_size: int) -> None:
        if not self.head_dim:
            divides("attention", "num_heads", self.num_heads, "hidden_size", hidden_size)
        divides("attention", "num_kv_heads", self.num_kv_heads or self.num_heads, "num_heads", self.num_heads)
        head_dim = self.head_dim or hidden_size // self.num_heads
        divides("attention", "2 (the halves that rotary positions turn)", 2, "head_dim", head_dim)
        positive("attention", rope_theta=self.rope_theta)


class Attention(Mixer):
    """o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s (Vaswani 2017), q and k turned by their position (RoPE, Su 2021),
    G key/value heads serve H query heads (GQA, Ainslie 2023).

    Names and rotary layout (half-split) are those of transformers' Llama and of fla's Attention.
    """

    Shape = AttentionShape
    roles = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row",
             "q_norm": "replicate", "k_norm": "replicate"}  # fmt: skip
    context = ("attention",)

    def __init__(self, hidden_size: int, shape: AttentionShape, layer: int, norm_eps: float) -> None:
        super().__init__(hidden_size, shape, layer)
        self.head_dim = shape.head_dim or hidden_size // shape.num_heads
        heads, kv_heads = shape.num_heads, shape.num_kv_heads or shape.num_heads
        self.q_proj = Linear(hidden_size, heads * self.head_dim, bias=shape.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_heads * self.head_dim, bias=shape.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_heads * self.head_dim, bias=shape.qkv_bias)
        self.o_proj = Linear(heads * self.head_dim, hidden_size, bias=False)
        if shape.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, norm_eps), RMSNorm(self.head_dim, norm_eps)
        self.attend = attention

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        q_BTHK, k_BTGK, v_BTGV = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.shape.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BTHK = rope(q_BTHK, seq.positions_BT, self.shape.rope_theta)
        k_BTGK = rope(k_BTGK, seq.positions_BT, self.shape.rope_theta)
        window, skip_B = self.shape.window_size, None
        if seq.cache is not None:
            k_BTGK, v_BTGV = (
                seq.cache.append(self.layer, name, x, window) for name, x in (("k", k_BTGK), ("v", v_BTGV))
            )
            skip_B = seq.cache.hidden_B(k_BTGK.shape[1], x_BTD.shape[1])
        o_BTHV = self.attend(q_BTHK, k_BTGK, v_BTGV, window=window or None, documents=seq.documents, skip_B=skip_B)
        return self.o_proj(o_BTHV.flatten(-2))

    def flops_per_token(self, seq_len: int) -> float:
        projections = 2 * sum(p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight"))
        window = min(self.shape.window_size or seq_len, seq_len)
        keys_seen = window - window * (window - 1) / (2 * seq_len)  # mean over the row: (T + 1) / 2 without a window
        return projections + 4 * self.shape.num_heads * self.head_dim * keys_seen
