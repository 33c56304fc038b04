"""Linear attention: softmax's exp(q . k) replaced by a product of feature maps, so that a matrix
state holds all of the past."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from longfire.config.model_config import ModelConfig, key, required
from longfire.mixers.matrix_state import MatrixState, check_expanded_heads, expanded_sizes
from longfire.mixers.mixer import Sequence, divides, one_of
from longfire.ops.feature_maps import FEATURE_MAPS, feature_map, feature_size
from longfire.ops.linear_attention import linear_attention
from longfire.ops.norm import GatedRMSNorm


@dataclass(frozen=True)
class LinearAttentionConfig:
    num_heads: int = required("heads of queries", example=4)
    num_kv_heads: int = key(
        0,
        "heads of keys and values, which divide num_heads; 0: as many as num_heads",
    )
    expand_k: float = key(1.0, "key size of all heads together / hidden_size")
    expand_v: float = key(1.0, "value size of all heads together / hidden_size")
    feature_map: str = key(
        "elementwise_product",
        "of queries and keys; one of none, relu, relu2, swish, sigmoid, logsigmoid, gelu, elu, "
        "hedgehog, t2r, elementwise_product, dpfp",
    )
    qk_norm: bool = key(False, "an RMSNorm over each head's query and key, before the feature map")
    tie_feature_map_qk: bool = key(False, "one feature map for both, where it learns")
    norm_q: bool = key(False, "features of a query sum to 1")
    norm_k: bool = key(False, "features of a key sum to 1")
    norm_feature_map: bool = key(False, "divide by the sum of the weights, as softmax does")
    elementwise_affine: bool = key(True, "whether the output norm has a weight")

    def check(self, hidden_size: int) -> None:
        check_expanded_heads("linear_attention", self, hidden_size)
        divides(
            "linear_attention",
            "num_kv_heads",
            self.num_kv_heads or self.num_heads,
            "num_heads",
            self.num_heads,
        )
        one_of("linear_attention", "feature_map", self.feature_map, FEATURE_MAPS)


class LinearAttention(MatrixState):
    """S_t = S_{t-1} + f(k_t) v_t^T, z_t = z_{t-1} + f(k_t), o_t = S_t^T f(q_t) / sqrt(K), with
    norm_feature_map over z_t . f(q_t) / sqrt(K) (Katharopoulos 2020, eq. 18 to 20). Names are those
    of fla's LinearAttention.

    z is one more column of S, written by a value that is 1: so documents and cache need nothing of
    their own. All matrices begin as N(0, initializer_range) (fla's class), but for the feature map
    of Hedgehog.
    """

    Config = LinearAttentionConfig
    roles = {
        **MatrixState.roles,
        "feature_map_q": "replicate",
        "feature_map_k": "replicate",
        "norm": "replicate",
    }
    recurrences = (linear_attention,)
    norm_name = "norm"

    def __init__(self, model: ModelConfig, config: LinearAttentionConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        kv_heads = config.num_kv_heads or config.num_heads
        self.make_heads(
            (config.num_heads, kv_heads, kv_heads), expanded_sizes(config, self.hidden_size)
        )
        self.make_qk_norm(model)
        self.feature_map_q = feature_map(config.feature_map, self.head_k)
        if config.tie_feature_map_qk:
            self.feature_map_k = None
        else:
            self.feature_map_k = feature_map(config.feature_map, self.head_k)
        self.norm = GatedRMSNorm(self.head_v, model.norm_eps, affine=config.elementwise_affine)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q_BTHK, k_BTGK, v_BTGV = self.qkv(x_BTD, seq)
        q_BTHF = self.feature_map_q(q_BTHK)
        k_BTGF = (self.feature_map_k or self.feature_map_q)(k_BTGK)
        if self.config.norm_q:
            q_BTHF = q_BTHF / (q_BTHF.sum(-1, keepdim=True) + 1e-4)
        if self.config.norm_k:
            k_BTGF = k_BTGF / (k_BTGF.sum(-1, keepdim=True) + 1e-4)
        if self.config.norm_feature_map:
            v_BTGV = F.pad(v_BTGV, (0, 1), value=1.0)
        o_BTHV, kept["state"] = seq.ops.recurrence(
            linear_attention,
            q_BTHF,
            k_BTGF,
            v_BTGV,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        if self.config.norm_feature_map:
            o_BTHV = o_BTHV[..., :-1] / (o_BTHV[..., -1:] + 1e-10)
        return self.gated_out(o_BTHV, x_BTD)

    def flops_per_token(self, seq_len: int) -> float:
        """A learned map's matrices serve every head."""
        maps = [
            p
            for name, p in self.named_parameters()
            if name.startswith("feature_map") and p.dim() >= 2
        ]
        again = 2 * (self.heads - 1) * sum(p.numel() for p in maps)
        features = feature_size(self.config.feature_map, self.head_k) - self.head_k
        return super().flops_per_token(seq_len) + again + 4 * self.heads * features * self.head_v
