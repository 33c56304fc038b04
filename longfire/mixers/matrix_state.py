"""What mixers share whose memory is a matrix for each head: queries, keys and values on the way in,
norm and gate on the way out."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig
from longfire.mixers.mixer import Mixer, Sequence, divides
from longfire.ops.linear import Linear
from longfire.ops.norm import GatedRMSNorm, RMSNorm


class MatrixState(Mixer):
    """A mixer whose heads keep a state S (K, V) that keys and values write and queries read.

    A subclass declares its `recurrences`, calls `make_heads`, makes its norm, and goes
    q, k, v = self.qkv(...) -> seq.ops.recurrence(...) -> self.gated_out(...).
    """

    roles = {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "o_proj": "row",
        "q_norm": "replicate",
        "k_norm": "replicate",
    }
    divided = {"heads": "num_heads", "kv_heads": "num_kv_heads"}
    context: ClassVar[tuple[str, ...]] = ("state",)
    norm_name = "o_norm"
    products = 2  # of a head's state and a vector, for each token: write k v^T, read S^T q

    def make_heads(self, heads: tuple[int, int, int], sizes: tuple[int, int]) -> None:
        """Projections to so many heads of q, k and v, of sizes (K, V)."""
        self.head_k, self.head_v = sizes
        self.heads = max(heads)
        self.kv_heads = min(heads)
        self.make_projection("q", heads[0] * self.head_k)
        self.make_projection("k", heads[1] * self.head_k)
        self.make_projection("v", heads[2] * self.head_v)
        self.o_proj = Linear(self.heads * self.head_v, self.hidden_size, bias=False)
        self.g_proj: nn.Module | None = None
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None

    def make_projection(self, name: str, channels: int) -> None:
        """What makes q, k or v."""
        self.add_module(f"{name}_proj", Linear(self.hidden_size, channels, bias=False))

    def make_qk_norm(self, model: ModelConfig) -> None:
        """RMS norms of each head of q and k, for mixers whose shape has `qk_norm`."""
        if self.config.qk_norm:
            self.q_norm = RMSNorm(self.head_k, model.norm_eps, model.norm_affine)
            self.k_norm = RMSNorm(self.head_k, model.norm_eps, model.norm_affine)

    def qkv(self, x_BTD: Tensor, seq: Sequence, silu: str = "") -> list[Tensor]:
        """q, k and v, each (B, T, its heads, size): projected, those that `silu` names through
        SiLU, and q and k normed where the mixer has qk_norm."""
        out = []
        for name, size in zip("qkv", (self.head_k, self.head_k, self.head_v)):
            y_BTD = self.project(name, x_BTD, seq, name in silu)
            out.append(y_BTD.unflatten(-1, (-1, size)))
        if self.q_norm is not None and self.k_norm is not None:
            out[:2] = self.q_norm(out[0]), self.k_norm(out[1])
        return out

    def project(self, name: str, x_BTD: Tensor, seq: Sequence, silu: bool) -> Tensor:
        """q, k or v, all heads side by side."""
        y_BTD = getattr(self, f"{name}_proj")(x_BTD)
        if silu:
            return F.silu(y_BTD)
        return y_BTD

    def for_all_heads(self, x_BTGX: Tensor) -> Tensor:
        """Each of G heads, for all heads that it serves."""
        groups = self.heads // x_BTGX.shape[2]
        if groups == 1:
            return x_BTGX
        return x_BTGX.repeat_interleave(groups, 2)

    def make_gated_norm(self, eps: float) -> None:
        """The output norm of mixers with gate_fn, under the two names that fla gives it, and its
        gate's projection."""
        norm = GatedRMSNorm(self.head_v, eps, self.config.gate_fn, self.config.elementwise_affine)
        self.norm_name = "g_norm"
        if self.config.use_output_gate:
            self.g_proj = Linear(self.hidden_size, self.heads * self.head_v, bias=False)
            self.norm_name = "g_norm_swish_gate"
        self.add_module(self.norm_name, norm)

    def gated_out(self, o_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """(B, T, H, V) -> (B, T, D): each head normalised and gated by what x says, and all
        projected."""
        norm = getattr(self, self.norm_name)
        gate_BTD = None if self.g_proj is None else self.g_proj(x_BTD)
        return self.o_proj(norm(o_BTHV, gate_BTD).flatten(-2))

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        return matrices + 2 * self.products * self.heads * self.head_k * self.head_v


def check_expanded_heads(mixer: str, config: Any, hidden_size: int) -> None:
    """Raises SettingsError unless num_heads heads of keys and of values share hidden_size *
    expand_k and * expand_v channels."""
    for expand in ("expand_k", "expand_v"):
        channels = hidden_size * getattr(config, expand)
        divides(mixer, "num_heads", config.num_heads, f"hidden_size * {expand}", channels)


def expanded_sizes(config: Any, hidden_size: int) -> tuple[int, int]:
    """(K, V) of a head."""
    return tuple(
        round(hidden_size * expand) // config.num_heads
        for expand in (config.expand_k, config.expand_v)
    )
