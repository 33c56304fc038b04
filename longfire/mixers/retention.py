"""Retention: linear attention with rotary positions, whose heads forget at fixed rates of their
own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longfire.config.model_config import ModelConfig, key, required
from longfire.mixers.matrix_state import MatrixState, check_expanded_heads, expanded_sizes
from longfire.mixers.mixer import Sequence, divides, one_of
from longfire.ops.feature_maps import ACTIVATIONS
from longfire.ops.linear_attention import linear_attention
from longfire.ops.norm import GATES
from longfire.ops.rope import Rotary, rotate


@dataclass(frozen=True)
class RetentionConfig:
    num_heads: int = required("heads of queries", example=4)
    num_kv_heads: int = key(
        0, "heads of keys and values, which divide num_heads; 0: as many as num_heads"
    )
    expand_k: float = key(1.0, "key size of all heads together / hidden_size")
    expand_v: float = key(2.0, "value size of all heads together / hidden_size")
    feature_map: str = key(
        "none",
        "of queries and keys; one of none, relu, relu2, swish, sigmoid, logsigmoid, gelu, elu",
    )
    qk_norm: bool = key(False, "an RMSNorm over each head's query and key, before the feature map")
    use_output_gate: bool = key(True, "whether the output is multiplied by a gate")
    gate_fn: str = key("swish", "activation of the output gate; swish or sigmoid")
    elementwise_affine: bool = key(True, "whether the output norm has a weight")

    def check(self, hidden_size: int) -> None:
        check_expanded_heads("retention", self, hidden_size)
        kv_heads = self.num_kv_heads or self.num_heads
        divides("retention", "num_kv_heads", kv_heads, "num_heads", self.num_heads)
        head_k, _ = expanded_sizes(self, hidden_size)
        halves = "2 (the halves that rotary positions turn)"
        divides("retention", halves, 2, "hidden_size * expand_k / num_heads", head_k)
        one_of("retention", "feature_map", self.feature_map, ACTIVATIONS)
        one_of("retention", "gate_fn", self.gate_fn, GATES)


class Retention(MatrixState):
    """S_t = a_h S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), a_h = 1 - 2^(-5-h) for head h from
    0 (RetNet, Sun 2023, eq. 6 and 8), q and k turned by their position. Names are those of fla's
    MultiScaleRetention.

    The heads' outputs are normalised, gated by swish(W_g x_t) and projected.
    All matrices begin as N(0, initializer_range) (fla's class).
    """

    Config = RetentionConfig
    roles = {
        **MatrixState.roles,
        "g_proj": "column",
        "g_norm": "replicate",
        "g_norm_swish_gate": "replicate",
    }
    recurrences = (linear_attention,)

    def __init__(self, model: ModelConfig, config: RetentionConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        kv_heads = config.num_kv_heads or config.num_heads
        self.make_heads(
            (config.num_heads, kv_heads, kv_heads), expanded_sizes(config, self.hidden_size)
        )
        self.make_qk_norm(model)
        self.make_gated_norm(model.norm_eps)
        self.rotary = Rotary(self.head_k)
        self.feature_map = ACTIVATIONS[config.feature_map]

    def prepare(self, seq: Sequence) -> None:
        """cos and sin of all positions, once for all layers that turn alike."""
        if self.rotary not in seq.shared:
            seq.shared[self.rotary] = self.rotary.turns(seq.positions_BT)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q_BTHK, k_BTGK, v_BTGV = self.qkv(x_BTD, seq)
        q_BTHK = rotate(self.feature_map(q_BTHK), *seq.shared[self.rotary])
        k_BTGK = rotate(self.feature_map(k_BTGK), *seq.shared[self.rotary])
        g_H = torch.log1p(
            -(2.0 ** (-5.0 - torch.arange(self.heads, device=x_BTD.device) - self.first_head))
        )
        o_BTHV, kept["state"] = seq.ops.recurrence(
            linear_attention,
            q_BTHK,
            self.for_all_heads(k_BTGK),
            self.for_all_heads(v_BTGV),
            g_H,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        return self.gated_out(o_BTHV, x_BTD)
