"""Gated DeltaNet: a matrix state that forgets at a rate the input chooses and overwrites what a key
held before."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key, required
from longfire.mixers.convolved_state import ConvolvedState, check_value_heads
from longfire.mixers.mixer import Sequence, one_of
from longfire.mixers.step_size import init_step_size
from longfire.ops.delta_rule import delta_rule
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.norm import GATES, GatedRMSNorm, l2_norm


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    num_heads: int = required("heads of queries and keys", example=4)
    head_dim: int = required("key size of a head", example=64)
    num_v_heads: int = key(
        0,
        "heads of values; 0: as many as num_heads; more: several value heads share a query/key "
        "head",
    )
    expand_v: float = key(2.0, "value size of a head / head_dim")
    use_gate: bool = key(True, "whether the output is multiplied by a gate")
    output_gate_activation: str = key("swish", "activation of that gate; swish or sigmoid")
    use_short_conv: bool = key(
        True,
        "whether queries, keys and values pass a short causal convolution first",
    )
    conv_size: int = key(4, "inputs that a short convolution sees, the current one included")
    allow_neg_eigval: bool = key(
        False,
        "beta up to 2: the state can flip along a key (Grazzi 2024)",
    )

    def check(self, hidden_size: int) -> None:
        check_value_heads("gated_delta_net", self)
        one_of("gated_delta_net", "output_gate_activation", self.output_gate_activation, GATES)


def init_decay_rate(A_log_H: Tensor, generator: torch.Generator) -> None:
    """A uniform in (0, 16): heads from almost no forgetting to fast (Mamba-2's rule, kept by
    fla)."""
    A_log_H.uniform_(0, 16, generator=generator).clamp_min_(1e-4).log_()


class GatedDeltaNet(ConvolvedState):
    """S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K) (Yang
    2024, eq. 10), g_t = -exp(A) softplus(W_a x_t + dt), b_t = sigmoid(W_b x_t), q and k of unit
    length.

    Names are those of fla's GatedDeltaNet. `A_log` and `dt_bias` have initialisers of their own and
    stay fp32. All matrices begin as N(0, initializer_range) (fla's class).
    """

    Config = GatedDeltaNetConfig
    recurrences = (delta_rule,)
    roles = {
        **ConvolvedState.roles,
        "a_proj": "column",
        "b_proj": "column",
        "g_proj": "column",
        "o_norm": "replicate",
        "A_log": "head",
        "dt_bias": "head",
    }
    own_init = {"A_log": init_decay_rate, "dt_bias": init_step_size}
    keep_fp32 = ("A_log", "dt_bias")
    divided = {"heads": "num_v_heads", "kv_heads": "num_heads"}
    products = 3  # with the recall S^T k

    def __init__(self, model: ModelConfig, config: GatedDeltaNetConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        heads = config.num_heads
        v_heads = config.num_v_heads or config.num_heads
        sizes = (config.head_dim, round(config.head_dim * config.expand_v))
        self.make_heads((heads, heads, v_heads), sizes)
        self.a_proj = Linear(self.hidden_size, v_heads, bias=False)
        self.b_proj = Linear(self.hidden_size, v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(v_heads))
        self.dt_bias = nn.Parameter(torch.empty(v_heads))
        if config.use_gate:
            self.g_proj = Linear(self.hidden_size, v_heads * self.head_v, bias=False)
        self.o_norm = GatedRMSNorm(self.head_v, model.norm_eps, config.output_gate_activation)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q_BTGK, k_BTGK, v_BTHV = self.qkv(x_BTD, seq, silu="qkv")
        q_BTHK = self.for_all_heads(l2_norm(q_BTGK))
        k_BTHK = self.for_all_heads(l2_norm(k_BTGK))
        beta_BTH = in_fp32(self.b_proj(x_BTD)).sigmoid() * (
            2 if self.config.allow_neg_eigval else 1
        )
        g_BTH = -self.A_log.exp() * F.softplus(in_fp32(self.a_proj(x_BTD)) + self.dt_bias)
        o_BTHV, kept["state"] = seq.ops.recurrence(
            delta_rule,
            q_BTHK,
            k_BTHK,
            v_BTHV,
            beta_BTH,
            g_BTH,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        return self.gated_out(o_BTHV, x_BTD)
