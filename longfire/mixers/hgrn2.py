"""HGRN2: a matrix state whose keys are what its gates let in, with a lowest forget gate that each
layer learns."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfire.config.model_config import ModelConfig, key
from longfire.mixers.convolved import convolved
from longfire.mixers.mixer import Mixer, Sequence, divides, positive
from longfire.ops.linear import Linear, in_fp32
from longfire.ops.linear_attention import linear_attention
from longfire.ops.norm import RMSNorm
from longfire.ops.short_conv import ShortConv

BOUNDS = "hgrn2.lower_bounds"  # in seq.shared


@dataclass(frozen=True)
class HGRN2Config:
    expand_ratio: int = key(128, "channels of a head, of its keys and of its values")
    use_short_conv: bool = key(
        False,
        "whether queries, gates and values pass a short causal convolution first",
    )
    conv_size: int = key(4, "inputs that a short convolution sees, the current one included")
    use_lower_bound: bool = key(
        True,
        "a learned lowest forget gate for each layer and channel, which rises with the layers; 0 "
        "in the first layer, so that a model of one layer has none",
    )
    elementwise_affine: bool = key(True, "whether the output norm has a weight")

    def check(self, hidden_size: int) -> None:
        divides("hgrn2", "expand_ratio", self.expand_ratio, "hidden_size", hidden_size)
        positive("hgrn2", conv_size=self.conv_size)


class LowerBounds(nn.Module):
    """The lowest forget gate of every layer and channel: shares of a softmax over the layers,
    summed up to each layer, so that a higher layer forgets less; 0 in the first (Qin 2023, eq. 9).
    A layer that is no HGRN2 has its share too, as in fla.
    """

    keep_fp32 = ("lower_bounds",)
    split_dims = {"lower_bounds": 1}
    own_init = {"lower_bounds": lambda bounds_LD, generator: bounds_LD.zero_()}

    def __init__(self, model: ModelConfig, config: HGRN2Config) -> None:
        super().__init__()
        self.lower_bounds: nn.Parameter | None = None
        if config.use_lower_bound:
            learned = torch.empty(model.num_hidden_layers, model.hidden_size)
            self.lower_bounds = nn.Parameter(learned)

    def forward(self) -> dict[str, Tensor]:
        assert self.lower_bounds is not None, "a model without lower bounds has no such module"
        shares_LD = in_fp32(self.lower_bounds).softmax(0)
        return {BOUNDS: shares_LD.cumsum(0) - shares_LD[0]}


class HGRN2(Mixer):
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T, o_t = S_t^T swish(W_q x_t) / sqrt(K), a_t = b + (1
    - b) sigmoid(W_f x_t) with the layer's lower bound b (Qin 2024, eq. 5). Names are those of fla's
    HGRN2Attention; its output norm has eps 1e-5 whatever the model's is, and goes over all heads.
    All matrices begin as N(0, initializer_range), lower bounds as 0 (fla's class).
    """

    Config = HGRN2Config
    roles = {
        "q_proj": "column",
        "f_proj": "column",
        "i_proj": "column",
        "o_proj": "row",
        "g_norm": "norm",
        "q_conv1d": "head",
        "f_conv1d": "head",
        "i_conv1d": "head",
    }
    divided = {"heads": "expand_ratio"}
    context = ("state", "halo")
    recurrences = (linear_attention,)
    whole_model = LowerBounds

    def __init__(self, model: ModelConfig, config: HGRN2Config, layer: int) -> None:
        super().__init__(model, config, layer)
        size = self.hidden_size
        self.heads = self.hidden_size // config.expand_ratio
        self.q_proj, self.f_proj, self.i_proj = (Linear(size, size, bias=False) for _ in range(3))
        self.o_proj = Linear(size, size, bias=False)
        if config.use_short_conv:
            self.q_conv1d, self.f_conv1d, self.i_conv1d = (
                ShortConv(size, config.conv_size) for _ in range(3)
            )
        self.g_norm = RMSNorm(size, 1e-5, config.elementwise_affine)
        # A tensor: a number would be a constant of the compiled block, and every layer be compiled
        # for itself.
        self.row = torch.tensor(layer, device="cpu")

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        kept = self.kept(seq)
        q, f, v = (
            convolved(self, name, getattr(self, f"{name}_proj")(x_BTD), seq, silu=False)
            for name in "qfi"
        )
        k = in_fp32(-f).sigmoid()  # 1 - a, which is exact where a is near 1
        if self.config.use_lower_bound:
            bounds_LD = seq.shared[BOUNDS]
            mine_L = torch.arange(len(bounds_LD), device=bounds_LD.device) == self.row
            k = k * (1 - mine_L[None].to(bounds_LD.dtype) @ bounds_LD)
        g = torch.log1p(-k.clamp_max(1 - torch.finfo(k.dtype).eps))  # a below eps is none
        q, k, v, g = (
            y.unflatten(-1, (-1, self.config.expand_ratio))
            for y in (F.silu(q), k.to(q.dtype), v, g)
        )
        o_BTHV, kept["state"] = seq.ops.recurrence(
            linear_attention,
            q,
            k,
            v,
            g,
            initial_state_BHKV=kept.get("state"),
            documents=seq.documents,
        )
        return self.o_proj(self.g_norm(o_BTHV.flatten(-2)))

    def flops_per_token(self, seq_len: int) -> float:
        matrices = 2 * sum(p.numel() for p in self.parameters() if p.dim() >= 2)
        return matrices + 4 * self.hidden_size * self.config.expand_ratio  # write k v^T, read S^T q
