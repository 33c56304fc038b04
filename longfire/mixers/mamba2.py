"""Mamba-2: a state space as linear attention, with a decay for each head that follows from the step
size the input chooses."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key
from longfire.mixers.convolved import convolved
from longfire.mixers.mixer import Mixer, Sequence, divides, positive, uniform
from longfire.mixers.step_size import init_step_size
from longfire.ops.grouped_norm import GroupedGatedRMSNorm
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.linear_attention import linear_attention
from longfire.ops.short_conv import ShortConv


@dataclass(frozen=True)
class Mamba2Config:
    head_dim: int = key(64, "channels of a head")
    state_size: int = key(128, "the paper's N: channels of a key and of a query")
    expand: int = key(2, "channels of all heads together / hidden_size")
    n_groups: int = key(1, "groups of heads; those of a group share B and C")
    conv_kernel: int = key(4, "inputs that a short convolution sees, the current one included")
    use_conv_bias: bool = key(True, "whether the convolution has a bias")
    use_bias: bool = key(False, "whether the projections have biases")
    dt_low: float = key(0.0, "the shortest step")
    dt_high: float = key(0.0, "the longest step; 0: no limit")
    rmsnorm: bool = key(True, "whether the output is normalised, in each group by itself")
    norm_before_gate: bool = key(False, "normalise before the gate is applied, not after it")
    D_has_hdim: bool = key(False, "a skip weight for each channel, not for each head")

    def check(self, hidden_size: int) -> None:
        divides(
            "mamba2", "head_dim", self.head_dim, "hidden_size * expand", hidden_size * self.expand
        )
        heads = hidden_size * self.expand // self.head_dim
        divides(
            "mamba2", "n_groups", self.n_groups, "heads (hidden_size * expand / head_dim)", heads
        )
        positive("mamba2", state_size=self.state_size, conv_kernel=self.conv_kernel)
        if self.dt_high:
            positive("mamba2", **{"dt_high - dt_low": self.dt_high - self.dt_low})


def init_rate(A_log_H: Tensor, generator: torch.Generator) -> None:
    """A uniform in [1, 16]."""
    A_log_H.uniform_(1, 16, generator=generator).log_()


class Mamba2(Mixer):
    """S_t = exp(-exp(A) d_t) S_{t-1} + d_t B_t x_t^T, y_t = S_t^T C_t + D x_t, with d_t =
    softplus(W_dt u_t + dt) and x, B and C convolved (Dao 2024, section 7.1): linear attention with
    C as queries, B as keys, d x as values and a scalar decay. The output is rmsnorm(y_t *
    swish(z_t)), or the other way round, and projected.

    Names are those of fla's and transformers' Mamba2, with their in_proj as z_proj, x_proj, B_proj,
    C_proj, dt_proj, and their conv1d as x_conv1d, B_conv1d, C_conv1d, since tensor parallelism
    splits z, x and dt by heads, and B and C by groups: not at all if there is one. out_proj begins
    as torch's own matrices, uniform within 1/sqrt(channels), divided by the root of the number of
    residual sums (the authors' and fla's rescale_prenorm_residual, on by default).
    """

    Config = Mamba2Config
    roles = {
        "z_proj": "column",
        "x_proj": "column",
        "B_proj": "column",
        "C_proj": "column",
        "dt_proj": "column",
        "out_proj": "row",
        "norm": "norm",
        "A_log": "head",
        "dt_bias": "head",
        "D": "head",
        "x_conv1d": "head",
        "B_conv1d": "head",
        "C_conv1d": "head",
    }
    divided = {"heads": "head_dim", "groups": "n_groups"}
    context = ("state", "halo")
    recurrences = (linear_attention,)
    own_init = {
        "A_log": init_rate,
        "dt_bias": init_step_size,
        "D": lambda D, generator: D.fill_(1.0),
    }
    keep_fp32 = ("A_log", "dt_bias", "D")
    z_proj: Linear
    dt_proj: Linear

    def __init__(self, model: ModelConfig, config: Mamba2Config, layer: int) -> None:
        super().__init__(model, config, layer)
        channels = self.hidden_size * config.expand
        shared = config.n_groups * config.state_size
        self.heads = channels // config.head_dim
        self.groups = config.n_groups
        if self.groups == 1:
            self.roles = self.roles | dict.fromkeys(
                ("B_proj", "C_proj", "B_conv1d", "C_conv1d"), "replicate"
            )
            self.divided = {"heads": "head_dim"}
        for name, size in {
            "z": channels,
            "x": channels,
            "B": shared,
            "C": shared,
            "dt": self.heads,
        }.items():
            self.add_module(f"{name}_proj", Linear(self.hidden_size, size, bias=config.use_bias))
            if name in "xBC":
                self.add_module(
                    f"{name}_conv1d", ShortConv(size, config.conv_kernel, config.use_conv_bias)
                )
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(channels if config.D_has_hdim else self.heads))
        if config.rmsnorm:
            self.norm = GroupedGatedRMSNorm(
                channels, model.norm_eps, config.n_groups, config.norm_before_gate
            )
        self.out_proj = Linear(channels, self.hidden_size, bias=config.use_bias)
        self.published_init = {"out_proj.weight": uniform((channels * model.residual_sums) ** -0.5)}

    def forward(self, u_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        x, B, C = (
            convolved(self, name, getattr(self, f"{name}_proj")(u_BTD), seq) for name in "xBC"
        )
        x_BTHV = x.unflatten(-1, (self.heads, -1))
        B_BTGK = B.unflatten(-1, (self.groups, -1))
        C_BTGK = C.unflatten(-1, (self.groups, -1))
        dt_BTH = F.softplus(in_fp32(self.dt_proj(u_BTD)) + self.dt_bias).clamp(
            self.config.dt_low, self.config.dt_high or None
        )
        y_BTHV, kept["state"] = seq.ops.recurrence(
            linear_attention,
            C_BTGK,
            B_BTGK,
            (x_BTHV * dt_BTH[..., None]).to(x.dtype),
            -self.A_log.exp() * dt_BTH,
            scale=1.0,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        y_BTD = torch.addcmul(y_BTHV, x_BTHV, self.D.view(self.heads, -1)).to(x.dtype).flatten(-2)
        z_BTD = self.z_proj(u_BTD)
        return self.out_proj(
            self.norm(y_BTD, z_BTD) if self.config.rmsnorm else y_BTD * F.silu(z_BTD)
        )

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        return (
            matrices + 4 * self.out_proj.in_features * self.config.state_size
        )  # write B x^T, read S^T C
