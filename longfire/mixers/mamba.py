"""Mamba: a selective state space, N numbers for each channel that forget at rates and steps of
their own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key
from longfire.mixers.mixer import Mixer, Sequence, positive, uniform
from longfire.mixers.step_size import init_step_size
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.selective_scan import selective_scan
from longfire.ops.short_conv import ShortConv


@dataclass(frozen=True)
class MambaConfig:
    intermediate_size: int = key(0, "channels that have a state; 0: 2 * hidden_size")
    state_size: int = key(16, "the paper's N: numbers that a channel's state has")
    dt_rank: int = key(
        0,
        "rank of the matrix that makes step sizes; 0: hidden_size / 16, rounded up",
    )
    conv_kernel: int = key(4, "inputs that a short convolution sees, the current one included")
    use_conv_bias: bool = key(True, "whether the convolution has a bias")
    use_bias: bool = key(False, "whether in_proj and out_proj have biases")

    def check(self, hidden_size: int) -> None:
        positive("mamba", state_size=self.state_size, conv_kernel=self.conv_kernel)


def init_rates(A_log_DN: Tensor, generator: torch.Generator) -> None:
    """A from 1 to N in every channel (S4D-real)."""
    A_log_DN.copy_(
        torch.arange(1, A_log_DN.shape[1] + 1, device=A_log_DN.device).log().expand_as(A_log_DN)
    )


def init_step_matrix(weight_DR: Tensor, generator: torch.Generator) -> None:
    """Keeps the variance."""
    uniform(weight_DR.shape[1] ** -0.5)(weight_DR, generator)


class LinearWithWideBias(Linear):
    """A product in the type of its input, to which the bias is added in fp32; what comes out is
    fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return in_fp32(self.product(x)) + self.bias


class Mamba(Mixer):
    """h_t = exp(-exp(A) d_t) h_{t-1} + d_t B_t x_t, y_t = C_t . h_t + D x_t for each channel, d_t =
    softplus(W_dt W_d x_t + dt), with x convolved and B, C from x too; the output is y_t *
    swish(z_t), projected (Gu 2023, algorithm 2).

    Names are those of fla's and transformers' Mamba. in_proj makes x, then z: to split it by
    channels is to split each half.
    """

    Config = MambaConfig
    roles = {
        "in_proj": "halves",
        "conv1d": "head",
        "x_proj": "inner_row",
        "dt_proj": "column",
        "A_log": "head",
        "D": "head",
        "out_proj": "row",
    }
    divided = {"channels": "intermediate_size"}
    context = ("state", "halo")
    recurrences = (selective_scan,)
    keep_fp32 = ("A_log", "D")

    def __init__(self, model: ModelConfig, config: MambaConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        channels = config.intermediate_size or 2 * self.hidden_size
        rank = config.dt_rank or -(-self.hidden_size // 16)
        self.channels = channels
        self.sizes = [rank, config.state_size, config.state_size]
        self.in_proj = Linear(self.hidden_size, 2 * channels, bias=config.use_bias)
        self.conv1d = ShortConv(channels, config.conv_kernel, config.use_conv_bias)
        self.x_proj = Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = LinearWithWideBias(rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, config.state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.out_proj = Linear(channels, self.hidden_size, bias=config.use_bias)
        taps = uniform(config.conv_kernel**-0.5)
        self.published_init = {"conv1d.weight": taps}
        self.own_init = {
            "A_log": init_rates,
            "D": lambda D, generator: D.fill_(1.0),
            "dt_proj.weight": init_step_matrix,
            "dt_proj.bias": init_step_size,
            "conv1d.bias": taps,
        }

    def forward(self, u_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        x_BTD, z_BTD = self.in_proj(u_BTD).chunk(2, -1)
        x_BTD, kept["conv"] = seq.ops.convolution(
            x_BTD,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            state_BDW=kept.get("conv"),
            documents=seq.documents,
        )
        dt_BTR, B_BTN, C_BTN = self.x_proj(x_BTD).split(self.sizes, -1)
        dt_BTD = F.softplus(self.dt_proj(dt_BTR))
        y_BTD, kept["state"] = seq.ops.recurrence(
            selective_scan,
            x_BTD,
            dt_BTD,
            -self.A_log.exp(),
            B_BTN,
            C_BTN,
            initial_state_BDN=kept.get("state"),
            documents=seq.documents,
        )
        return self.out_proj(torch.addcmul(y_BTD, x_BTD, self.D.to(x_BTD.dtype)) * F.silu(z_BTD))

    def flops_per_token(self, seq_len: int) -> float:
        return (
            2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2) + 6 * self.A_log.numel()
        )  # decay, write, read
