"""RWKV-7: a matrix state that a vector of rates decays and a key of its own overwrites, on inputs
mixed with the token before."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key, mixer_of
from longfire.mixers.mixer import Mixer, Sequence, divides, positive, uniform
from longfire.mixers.token_lerp import Initialiser, orthogonal, share_of_previous, towards
from longfire.ops.dplr import dplr
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.norm import l2_norm, layer_norm

# In seq.shared: those of the first layer, which later ones mix into their own.
FIRST = "rwkv7.values"


@dataclass(frozen=True)
class RWKV7Config:
    head_dim: int = key(64, "channels of a head")
    decay_low_rank_dim: int = key(64, "rank of the matrix that makes decays")
    a_low_rank_dim: int = key(64, "rank of the matrix that makes in-context learning rates")
    v_low_rank_dim: int = key(
        16, "rank of the matrix that makes shares of the first layer's values"
    )
    gate_low_rank_dim: int = key(128, "rank of the matrix that makes output gates")
    key_norm_eps: float = key(1e-6, "added under the root of the removed key's length")

    def check(self, hidden_size: int) -> None:
        divides("rwkv7", "head_dim", self.head_dim, "hidden_size", hidden_size)
        ranks = (
            "decay_low_rank_dim",
            "a_low_rank_dim",
            "v_low_rank_dim",
            "gate_low_rank_dim",
            "key_norm_eps",
        )
        positive("rwkv7", **{name: getattr(self, name) for name in ranks})


class LoRA(nn.Module):
    """B f(A x) + b: a matrix of low rank with an activation in its middle. Names of fla."""

    def __init__(
        self, sizes: tuple[int, int, int], activation: nn.Module, bias: bool = True
    ) -> None:
        super().__init__()
        size, rank, out = sizes
        self.lora = nn.Sequential(
            Linear(size, rank, bias=False), activation, Linear(rank, out, bias=bias)
        )
        self.own_init = {
            "lora.0.weight": lambda weight, generator: weight.zero_(),
            "lora.2.weight": orthogonal(0.1 * max(1.0, math.sqrt(rank / out))),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


def copy_of(value: Tensor) -> Initialiser:
    """The rule of a parameter that begins as this tensor."""
    return lambda tensor, generator: tensor.copy_(value)


class HeadNorm(nn.Module):
    """Layer norm of each head by itself, with a weight and a bias for each channel: torch's
    GroupNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, o_BTHV: Tensor) -> Tensor:
        o_BTD = layer_norm(in_fp32(o_BTHV), None, None, self.eps).flatten(-2)
        return torch.addcmul(self.bias, o_BTD, self.weight).to(o_BTHV.dtype)


class RWKV7(Mixer):
    """S_t = S_{t-1} (diag(w_t) - k'_t (a_t k'_t)^T) + v_t k~_t^T, o_t = S_t r_t (Peng 2025, eq. 15
    to 18; here the state is the transpose). k' is the key times k_k at length 1, a_t in (0, 1) its
    learning rate, k~ the key times 1 + (a_t - 1) k_a, and w_t = exp(-e^{-1/2} sigmoid(...)). The
    output is normalised head by head, r_t . (k~_t r_k) v_t is added, and all is gated.

    Each of r, w, k, v, a and the gate sees its own mixture of this token and the one before it.
    Later layers move their values towards the first layer's. Names are those of fla's
    RWKV7Attention.
    """

    Config = RWKV7Config
    roles = {
        "r_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "o_proj": "row",
        "g_norm": "head",
        "k_k": "head",
        "k_a": "head",
        "r_k": "head",
        **{f"x_{name}": "replicate" for name in "rwkvag"},
        **{f"{name}_lora.lora.0": "replicate" for name in "wvag"},
        **{f"{name}_lora.lora.2": "column" for name in "wvag"},
    }
    divided = {"heads": "head_dim"}
    context = ("state", "halo")
    recurrences = (dplr,)
    carried = (FIRST,)

    def __init__(self, model: ModelConfig, config: RWKV7Config, layer: int) -> None:
        super().__init__(model, config, layer)
        size = self.hidden_size
        self.heads = self.hidden_size // config.head_dim
        for name in "rwkvag":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, size)))
        self.k_k = nn.Parameter(torch.empty(size))
        self.k_a = nn.Parameter(torch.empty(size))
        self.r_k = nn.Parameter(torch.empty(size // config.head_dim, config.head_dim))
        self.r_proj, self.k_proj, self.v_proj = (Linear(size, size, bias=False) for _ in range(3))
        self.o_proj = Linear(size, size, bias=False)
        self.w_lora = LoRA((size, config.decay_low_rank_dim, size), nn.Tanh())
        self.a_lora = LoRA((size, config.a_low_rank_dim, size), nn.Identity())
        self.g_lora = LoRA((size, config.gate_low_rank_dim, size), nn.Sigmoid(), bias=False)
        is_first = [mixer_of(name) for name in model.layer_types].index("rwkv7") == layer
        self.v_lora = None if is_first else LoRA((size, config.v_low_rank_dim, size), nn.Identity())
        self.g_norm = HeadNorm(size, config.head_dim * model.norm_eps)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        previous_BTD, kept["previous"] = seq.ops.token_shift(
            x_BTD, before_BD=kept.get("previous"), documents=seq.documents
        )
        change_BTD = previous_BTD - x_BTD
        xr, xw, xk, xv, xa, xg = (
            towards(x_BTD, change_BTD, getattr(self, f"x_{name}")) for name in "rwkvag"
        )
        r = self.r_proj(xr)
        k = self.k_proj(xk)
        v = self.v_proj(xv)
        if self.v_lora is None:
            seq.shared[FIRST] = v
        else:
            v = torch.lerp(v, seq.shared[FIRST], self.v_lora(xv).sigmoid())
        a = self.a_lora(xa).sigmoid()
        g_BTHK = self.per_head(-math.exp(-0.5) * in_fp32(self.w_lora(xw)).sigmoid())
        removed_BTHK = l2_norm(self.per_head(k * self.k_k.to(k.dtype)), self.config.key_norm_eps)
        k = torch.addcmul(k, k * (a - 1), self.k_a.to(k.dtype))
        r_BTHK, k_BTHK, v_BTHV, a_BTHK = map(self.per_head, (r, k, v, a))
        o_BTHV, kept["state"] = seq.ops.recurrence(
            dplr,
            r_BTHK,
            k_BTHK,
            v_BTHV,
            -removed_BTHK,
            removed_BTHK * a_BTHK,
            g_BTHK,
            scale=1.0,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        bonus_BTHV = (r_BTHK * k_BTHK * self.r_k.to(k.dtype)).sum(-1, keepdim=True) * v_BTHV
        return self.o_proj((self.g_norm(o_BTHV) + bonus_BTHV.flatten(-2)) * self.g_lora(xg))

    def per_head(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.config.head_dim))

    @property
    def own_init(self) -> dict[str, Initialiser]:  # type: ignore[override]  # computed, never set
        """As RWKV-LM and fla begin: no output, deeper layers nearer to the token itself, decays
        from slow to fast over channels."""
        size = self.hidden_size
        head_dim = self.config.head_dim
        left = 1 - self.layer / self.layers
        depth = self.layer / max(1, self.layers - 1)
        share = torch.arange(size, device="cpu") / max(1, size - 1)
        place = torch.arange(size, device="cpu") % head_dim * 2 + 1 - head_dim
        place = place / max(1, head_dim - 1)  # in its head, -1 to 1
        zigzag = place * place.abs()
        centred = share - 0.5
        rates = -6 + 6 * share ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag
        values = {
            "k_k": 0.71 - 0.1 * centred,
            "k_a": torch.tensor(1.02, device="cpu"),
            "r_k": torch.tensor(-0.04, device="cpu"),
            "w_lora.lora.2.bias": rates,
            "a_lora.lora.2.bias": -0.19 + 0.3 * zigzag + 0.4 * centred,
            "v_lora.lora.2.bias": 0.73 - 0.4 * centred,
            "g_norm.weight": torch.tensor(((self.layer + 1) / self.layers) ** 0.7, device="cpu"),
        }
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            values[f"x_{name}"] = share_of_previous(size, power * left)
        return {
            **{name: copy_of(value) for name, value in values.items()},
            "r_proj.weight": orthogonal(1.0),
            "k_proj.weight": orthogonal(0.1),
            "v_proj.weight": orthogonal(1.0),
            "o_proj.weight": lambda weight, generator: weight.zero_(),
        }

    @classmethod
    def published_ends(cls, model: ModelConfig) -> dict[str, Initialiser]:
        """RWKV-LM's: a tiny embedding, which a norm makes large, and an orthogonal head."""
        gain = 0.5 * math.sqrt(max(1.0, model.vocab_size / model.hidden_size))
        return {"embed.weight": uniform(1e-4), "head.weight": orthogonal(gain)}

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        return (
            matrices + 8 * self.hidden_size * self.config.head_dim
        )  # c^T S, b (c^T S), k v^T, S^T r
