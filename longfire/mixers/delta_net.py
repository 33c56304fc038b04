"""DeltaNet: a matrix state that overwrites what a key held before."""

from dataclasses import dataclass

from torch import Tensor

from longfire.config.model_config import ModelConfig, key, required
from longfire.mixers.convolved_state import ConvolvedState
from longfire.mixers.matrix_state import check_expanded_heads, expanded_sizes
from longfire.mixers.mixer import Sequence, one_of, positive
from longfire.ops.delta_rule import delta_rule
from longfire.ops.feature_maps import ACTIVATIONS, sum_norm
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.norm import GatedRMSNorm, l2_norm

QK_NORMS = {"l2": l2_norm, "sum": sum_norm}


@dataclass(frozen=True)
class DeltaNetConfig:
    num_heads: int = required("heads of queries, keys and values", example=4)
    expand_k: float = key(1.0, "key size of all heads together / hidden_size")
    expand_v: float = key(1.0, "value size of all heads together / hidden_size")
    use_beta: bool = key(True, "a learned share of what a key held is replaced; false: all of it")
    use_gate: bool = key(False, "whether the output is multiplied by a gate")
    use_short_conv: bool = key(
        True, "whether queries, keys and values pass a short causal convolution first"
    )
    conv_size: int = key(4, "inputs that a short convolution sees, the current one included")
    qk_activation: str = key(
        "swish",
        "of queries and keys; one of none, relu, relu2, swish, sigmoid, logsigmoid, gelu, elu",
    )
    qk_norm: str = key(
        "l2", "l2: queries and keys have length 1; sum: their absolute values sum to 1"
    )
    allow_neg_eigval: bool = key(
        False, "beta up to 2: the state can flip along a key (Grazzi 2024)"
    )

    def check(self, hidden_size: int) -> None:
        check_expanded_heads("delta_net", self, hidden_size)
        positive("delta_net", conv_size=self.conv_size)
        one_of("delta_net", "qk_activation", self.qk_activation, ACTIVATIONS)
        one_of("delta_net", "qk_norm", self.qk_norm, QK_NORMS)


class DeltaNet(ConvolvedState):
    """S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K), b_t =
    sigmoid(W_b x_t), q and k of length 1 (Schlag 2021; Yang 2024, eq. 4). Names are those of fla's
    DeltaNet.

    Values always pass SiLU; queries and keys what qk_activation says.
    All matrices begin as N(0, initializer_range) (fla's class).
    """

    Config = DeltaNetConfig
    recurrences = (delta_rule,)
    roles = {**ConvolvedState.roles, "b_proj": "column", "g_proj": "column", "o_norm": "replicate"}
    divided = {"heads": "num_heads", "kv_heads": "num_heads"}
    products = 3  # with the recall S^T k

    def __init__(self, model: ModelConfig, config: DeltaNetConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        heads = config.num_heads
        self.make_heads((heads, heads, heads), expanded_sizes(config, self.hidden_size))
        self.b_proj = Linear(self.hidden_size, heads, bias=False) if config.use_beta else None
        if config.use_gate:
            self.g_proj = Linear(self.hidden_size, heads * self.head_v, bias=False)
        self.o_norm = GatedRMSNorm(self.head_v, model.norm_eps)
        self.normalise = QK_NORMS[config.qk_norm]

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        swish = self.config.qk_activation == "swish"
        q_BTHK, k_BTHK, v_BTHV = self.qkv(x_BTD, seq, silu="qkv" if swish else "v")
        if not swish:
            q_BTHK, k_BTHK = map(ACTIVATIONS[self.config.qk_activation], (q_BTHK, k_BTHK))
        beta_BTH = in_fp32(
            v_BTHV.new_ones(v_BTHV.shape[:3])
            if self.b_proj is None
            else self.b_proj(x_BTD).sigmoid()
        )
        o_BTHV, kept["state"] = seq.ops.recurrence(
            delta_rule,
            self.normalise(q_BTHK),
            self.normalise(k_BTHK),
            v_BTHV,
            beta_BTH * (2 if self.config.allow_neg_eigval else 1),
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        return self.gated_out(o_BTHV, x_BTD)
