"""Kimi Delta Attention: Gated DeltaNet whose key channels each forget at a rate of their own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key, required
from longfire.errors import SettingsError
from longfire.mixers.convolved_state import ConvolvedState, check_value_heads
from longfire.mixers.mixer import Initialiser, Sequence
from longfire.mixers.step_size import init_step_size
from longfire.ops.delta_rule import delta_rule
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.norm import GatedRMSNorm, l2_norm


@dataclass(frozen=True)
class KDAConfig:
    num_heads: int = required("heads of queries and keys", example=4)
    head_dim: int = required("key size of a head", example=64)
    num_v_heads: int = key(
        0,
        "heads of values; 0: as many as num_heads; more: several value heads share a query/key "
        "head",
    )
    expand_v: float = key(1.0, "value size of a head / head_dim")
    use_short_conv: bool = key(
        True,
        "whether queries, keys and values pass a short causal convolution first",
    )
    conv_size: int = key(4, "inputs that a short convolution sees, the current one included")
    allow_neg_eigval: bool = key(
        False,
        "beta up to 2: the state can flip along a key (Grazzi 2024)",
    )
    lower_bound: float | None = key(
        None,
        "lowest log decay of a step, below 0; the gate is then a sigmoid of the same logits",
    )
    safe_gate: bool = key(
        False,
        "A begins at 1, with a lower_bound in [-5, 0): fla has faster kernels for it",
    )

    def check(self, hidden_size: int) -> None:
        check_value_heads("kda", self)
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise SettingsError(
                f"model config: kda.lower_bound = {self.lower_bound} must be below 0: it bounds a "
                "log decay"
            )
        if self.safe_gate and (self.lower_bound is None or self.lower_bound < -5):
            raise SettingsError(
                "model config: kda.safe_gate needs kda.lower_bound in [-5, 0), but it is "
                f"{self.lower_bound}; set it to -5"
            )


def init_decay_rate(A_log_H: Tensor, generator: torch.Generator) -> None:
    """A uniform in (1, 16)."""
    A_log_H.uniform_(1, 16, generator=generator).log_()


class KDA(ConvolvedState):
    """S_t = (I - b_t k_t k_t^T) diag(exp g_t) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K)
    (Kimi Linear 2025, eq. 1), g_t = -exp(A) softplus(f_t) or lower_bound sigmoid(exp(A) f_t), f_t =
    W2 W1 x_t + dt, b_t = sigmoid(W_b x_t), q and k of length 1.

    A is one number a head, dt one a key channel. The heads' outputs are normalised and gated by a
    sigmoid of low rank. Names are those of fla's KimiDeltaAttention. `A_log` and `dt_bias` have
    initialisers of their own and stay fp32. All matrices begin as N(0, initializer_range) (fla's
    class).
    """

    Config = KDAConfig
    recurrences = (delta_rule,)
    roles = {
        **ConvolvedState.roles,
        "f_proj.0": "replicate",
        "f_proj.1": "column",
        "g_proj.0": "replicate",
        "g_proj.1": "column",
        "b_proj": "column",
        "o_norm": "replicate",
        "A_log": "head",
        "dt_bias": "head",
    }
    keep_fp32 = ("A_log", "dt_bias")
    divided = {"heads": "num_v_heads", "kv_heads": "num_heads"}
    products = 3  # with the recall S^T k

    def __init__(self, model: ModelConfig, config: KDAConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        heads = config.num_heads
        v_heads = config.num_v_heads or config.num_heads
        sizes = (config.head_dim, round(config.head_dim * config.expand_v))
        self.make_heads((heads, heads, v_heads), sizes)
        self.f_proj = self.low_rank(v_heads * self.head_k, bias=False)
        self.g_proj = self.low_rank(v_heads * self.head_v, bias=True)
        self.b_proj = Linear(self.hidden_size, v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(v_heads))
        self.dt_bias = nn.Parameter(torch.empty(v_heads * self.head_k))
        self.o_norm = GatedRMSNorm(self.head_v, model.norm_eps, "sigmoid")
        if config.safe_gate:
            init_A: Initialiser = lambda A_log_H, generator: A_log_H.zero_()
        else:
            init_A = init_decay_rate
        self.own_init = {"A_log": init_A, "dt_bias": init_step_size}

    def low_rank(self, channels: int, bias: bool) -> nn.Sequential:
        """hidden_size -> V -> channels."""
        return nn.Sequential(
            Linear(self.hidden_size, self.head_v, bias=False),
            Linear(self.head_v, channels, bias=bias),
        )

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q_BTGK, k_BTGK, v_BTHV = self.qkv(x_BTD, seq, silu="qkv")
        q_BTHK = self.for_all_heads(l2_norm(q_BTGK))
        k_BTHK = self.for_all_heads(l2_norm(k_BTGK))
        beta_BTH = in_fp32(self.b_proj(x_BTD)).sigmoid() * (
            2 if self.config.allow_neg_eigval else 1
        )
        o_BTHV, kept["state"] = seq.ops.recurrence(
            delta_rule,
            q_BTHK,
            k_BTHK,
            v_BTHV,
            beta_BTH,
            self.log_decay(x_BTD),
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        return self.gated_out(o_BTHV, x_BTD)

    def log_decay(self, x_BTD: Tensor) -> Tensor:
        """(B, T, H, K)."""
        f_BTHK = (in_fp32(self.f_proj(x_BTD)) + self.dt_bias).unflatten(-1, (-1, self.head_k))
        A_H1 = self.A_log.exp()[:, None]
        if self.config.lower_bound is None:
            return -A_H1 * F.softplus(f_BTHK)
        return self.config.lower_bound * torch.sigmoid(A_H1 * f_BTHK)
