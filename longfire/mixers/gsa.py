"""Gated slot attention: a memory of a few slots per head, read by softmax over the slots."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.config.model_config import ModelConfig, key, required
from longfire.mixers.convolved_state import ConvolvedState
from longfire.mixers.mixer import Sequence, divides, one_of, positive
from longfire.ops.feature_maps import feature_map
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.norm import RMSNorm
from longfire.ops.slot_attention import slot_attention


@dataclass(frozen=True)
class GSAConfig:
    num_heads: int = required("heads of queries", example=4)
    num_kv_heads: int = key(0, "heads of keys and values, which divide num_heads; 0: num_heads")
    num_slots: int = key(64, "slots of a head; 0: as many as a key has channels")
    expand_k: float = key(1.0, "key size of all heads together / hidden_size")
    feature_map: str = key("swish", "of queries and keys: swish, relu or t2r")
    qk_norm: bool = key(False, "an RMSNorm over each head's query and key, before the feature map")
    use_short_conv: bool = key(False, "whether q, k and v pass a short causal convolution first")
    conv_size: int = key(4, "inputs that a short convolution sees, the current one included")
    gate_logit_normalizer: float = key(8.0, "keeps the decay near 1 at the start")
    elementwise_affine: bool = key(True, "whether the output norm has a weight")

    def check(self, hidden_size: int) -> None:
        heads = self.num_heads
        divides("gsa", "num_heads", heads, "hidden_size", hidden_size)
        divides("gsa", "num_heads", heads, "hidden_size * expand_k", hidden_size * self.expand_k)
        divides("gsa", "num_kv_heads", self.num_kv_heads or heads, "num_heads", heads)
        positive("gsa", conv_size=self.conv_size, gate_logit_normalizer=self.gate_logit_normalizer)
        one_of("gsa", "feature_map", self.feature_map, ("swish", "relu", "t2r"))


class GSA(ConvolvedState):
    """K_t = K_{t-1} diag(a_t) + k_t (1 - a_t)^T, V_t = diag(a_t) V_{t-1} + (1 - a_t) v_t^T, o_t =
    V_t^T softmax(K_t^T q_t), with a_t = sigmoid(W_f x_t)^(1/8) for each slot (Zhang 2024, eq. 6).

    Names are those of fla's GatedSlotAttention; the output norm goes over all heads, with eps 1e-5.
    With convolutions the values pass swish twice. Matrices begin as N(0, initializer_range) (fla).
    """

    Config = GSAConfig
    recurrences = (slot_attention,)
    roles = {
        **ConvolvedState.roles,
        "f_proj": "column",
        "feature_map": "replicate",
        "g_norm": "norm",
    }

    def __init__(self, model: ModelConfig, config: GSAConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        kv_heads = config.num_kv_heads or config.num_heads
        key_size = round(self.hidden_size * config.expand_k) // config.num_heads
        value_size = self.hidden_size // config.num_heads
        self.make_heads((config.num_heads, kv_heads, kv_heads), (key_size, value_size))
        self.make_qk_norm(model)
        self.slots = config.num_slots or self.head_k
        self.f_proj = Linear(self.hidden_size, kv_heads * self.slots, bias=False)
        self.feature_map = feature_map(config.feature_map, self.head_k)
        self.g_norm = RMSNorm(self.hidden_size, 1e-5, config.elementwise_affine)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        silu = "qkv" if self.config.use_short_conv else ""
        q_BTHK, k_BTGK, v_BTGV = self.qkv(x_BTD, seq, silu)
        g_BTGM = F.logsigmoid(in_fp32(self.f_proj(x_BTD))) / self.config.gate_logit_normalizer
        g_BTGM = g_BTGM.unflatten(-1, (-1, self.slots))
        written_BTGM = (-torch.expm1(g_BTGM)).to(v_BTGV.dtype)
        o_BTHV, kept["state"] = seq.ops.recurrence(
            slot_attention,
            self.feature_map(q_BTHK),
            self.feature_map(k_BTGK),
            F.silu(v_BTGV),
            written_BTGM,
            g_BTGM,
            initial_state_BGMX=kept.get("state"),
            documents=seq.documents,
        )
        return self.o_proj(self.g_norm(F.silu(o_BTHV.flatten(-2))))

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        return matrices + 4 * self.heads * self.slots * (self.head_k + self.head_v)
