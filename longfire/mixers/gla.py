"""Gated linear attention: a matrix state that forgets each key channel at a rate the input
chooses."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key, required
from longfire.mixers.convolved_state import ConvolvedState
from longfire.mixers.matrix_state import check_expanded_heads, expanded_sizes
from longfire.mixers.mixer import Sequence, divides, one_of, positive
from longfire.ops.feature_maps import ACTIVATIONS
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.linear_attention import linear_attention
from longfire.ops.norm import GATES


@dataclass(frozen=True)
class GLAConfig:
    num_heads: int = required("heads of queries", example=4)
    num_kv_heads: int = key(
        0, "heads of keys and values, which divide num_heads; 0: as many as num_heads"
    )
    expand_k: float = key(0.5, "key size of all heads together / hidden_size")
    expand_v: float = key(1.0, "value size of all heads together / hidden_size")
    feature_map: str = key(
        "none",
        "of queries and keys; one of none, relu, relu2, swish, sigmoid, logsigmoid, gelu, elu",
    )
    qk_norm: bool = key(False, "an RMSNorm over each head's query and key, before the feature map")
    use_short_conv: bool = key(
        False, "whether queries, keys and values pass a short causal convolution first"
    )
    conv_size: int = key(4, "inputs that a short convolution sees, the current one included")
    use_output_gate: bool = key(True, "whether the output is multiplied by a gate")
    gate_fn: str = key("swish", "activation of the output gate; swish or sigmoid")
    elementwise_affine: bool = key(True, "whether the output norm has a weight")
    gate_logit_normalizer: float = key(16.0, "the paper's tau: keeps the decay near 1 at the start")
    gate_low_rank: int = key(16, "rank of the matrix that makes decays")
    clamp_min: float | None = key(None, "lowest log decay of a step; without it there is none")

    def check(self, hidden_size: int) -> None:
        check_expanded_heads("gla", self, hidden_size)
        divides(
            "gla", "num_kv_heads", self.num_kv_heads or self.num_heads, "num_heads", self.num_heads
        )
        positive("gla", conv_size=self.conv_size, gate_logit_normalizer=self.gate_logit_normalizer)
        positive("gla", gate_low_rank=self.gate_low_rank)
        one_of("gla", "feature_map", self.feature_map, ACTIVATIONS)
        one_of("gla", "gate_fn", self.gate_fn, GATES)


class GLA(ConvolvedState):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), a_t = sigmoid(W2 W1
    x_t)^(1/16) (Yang 2023, eq. 3 and 4.4).

    The heads' outputs are normalised, gated by swish(W_g x_t) and projected. Names are those of
    fla's GatedLinearAttention. All matrices begin as N(0, initializer_range) (fla's class).
    """

    Config = GLAConfig
    recurrences = (linear_attention,)
    roles = {
        **ConvolvedState.roles,
        "g_proj": "column",
        "gk_proj.0": "replicate",
        "gk_proj.1": "column",
        "g_norm": "replicate",
        "g_norm_swish_gate": "replicate",
    }

    def __init__(self, model: ModelConfig, config: GLAConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        kv_heads = config.num_kv_heads or config.num_heads
        heads = (config.num_heads, kv_heads, kv_heads)
        self.make_heads(heads, expanded_sizes(config, self.hidden_size))
        self.make_qk_norm(model)
        self.gk_proj = nn.Sequential(
            Linear(self.hidden_size, config.gate_low_rank, bias=False),
            Linear(config.gate_low_rank, kv_heads * self.head_k, bias=True),
        )
        self.make_gated_norm(model.norm_eps)
        self.feature_map = ACTIVATIONS[config.feature_map]

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        silu = "qkv" if self.config.use_short_conv else ""
        q_BTHK, k_BTGK, v_BTGV = self.qkv(x_BTD, seq, silu)
        g_BTGK = F.logsigmoid(in_fp32(self.gk_proj(x_BTD))).unflatten(-1, (-1, self.head_k))
        g_BTGK = g_BTGK / self.config.gate_logit_normalizer
        if self.config.clamp_min is not None:
            g_BTGK = g_BTGK.clamp_min(self.config.clamp_min)
        o_BTHV, kept["state"] = seq.ops.recurrence(
            linear_attention,
            self.feature_map(q_BTHK),
            self.feature_map(k_BTGK),
            v_BTGV,
            g_BTGK,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        return self.gated_out(o_BTHV, x_BTD)
