"""Causal softmax attention with rotary positions and grouped heads."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from longfire.config.model_config import ModelConfig, key, required
from longfire.errors import SettingsError
from longfire.mixers.mixer import Mixer, Sequence, divides, one_of, positive
from longfire.ops.linear import Linear
from longfire.ops.norm import RMSNorm
from longfire.ops.rope import BY_LENGTH, SCALINGS, Rotary, rotate


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int = required("heads of queries", example=8)
    num_kv_heads: int = key(
        0,
        "heads of keys and values, which divide num_heads; 0: as many as num_heads",
    )
    head_dim: int = key(0, "channels of a head; 0: hidden_size / num_heads")
    rope: str = key(
        "default",
        "how rotary positions are scaled: default, linear, dynamic, yarn, longrope, llama3; none: "
        "no rotary positions",
    )
    rope_theta: float = key(10000.0, "base of the rotary frequencies")
    rope_factor: float = key(
        1.0,
        "by how much the context is extended: linear, dynamic, yarn, longrope, llama3",
    )
    rope_original_length: int = key(
        0,
        "tokens that the model was first trained at: dynamic, yarn, longrope, llama3",
    )
    rope_low_freq_factor: float = key(
        1.0,
        "llama3: wavelengths above rope_original_length / this are scaled",
    )
    rope_high_freq_factor: float = key(
        4.0,
        "llama3: wavelengths below rope_original_length / this are kept",
    )
    rope_beta_fast: float = key(
        32.0,
        "yarn: frequencies with more rotations in rope_original_length are kept",
    )
    rope_beta_slow: float = key(
        1.0,
        "yarn: frequencies with fewer rotations in rope_original_length are scaled",
    )
    rope_attention_factor: float = key(
        0.0,
        "yarn, longrope: factor of cosines and sines; 0: derived from rope_factor",
    )
    rope_mscale: float = key(0.0, "yarn of DeepSeek: weight of the derived factor; 0: none")
    rope_mscale_all_dim: float = key(
        0.0,
        "yarn of DeepSeek: weight of the factor that it is divided by; 0: none",
    )
    rope_truncate: bool = key(True, "yarn: round the bounds of the scaled channels to whole ones")
    rope_short_factor: tuple[float, ...] = key(
        (),
        "longrope: the divisor of each turned pair's frequency in texts up to rope_original_length",
    )
    rope_long_factor: tuple[float, ...] = key((), "longrope: the same in longer texts")
    rotary_fraction: float = key(1.0, "share of a head's channels that turn, the first ones")
    window_size: int = key(0, "keys that a query sees, itself included; 0: all before it")
    qkv_bias: bool = key(False, "whether the projections to queries, keys and values have biases")
    o_bias: bool = key(False, "whether the output projection has a bias")
    qk_norm: bool = key(
        False,
        "an RMSNorm over each head's query and key, before rotary positions; without parameters "
        "where norm_affine is false",
    )
    qk_norm_eps: float = key(0.0, "eps of that norm; 0: the model's norm_eps")
    dropout: float = key(0.0, "probability of dropout on attention weights")
    scale_by_inverse_layer: bool = key(
        False,
        "scores of layer i, counted from 0, are divided by i + 1 (Mistral-GPT-2)",
    )

    def __post_init__(self) -> None:
        for name in ("rope_short_factor", "rope_long_factor"):  # lists in JSON and TOML
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def check(self, hidden_size: int) -> None:
        if self.qk_norm_eps < 0:
            raise SettingsError(
                f"model config: attention.qk_norm_eps = {self.qk_norm_eps} must be at least 0"
            )
        if not self.head_dim:
            divides("attention", "num_heads", self.num_heads, "hidden_size", hidden_size)
        divides(
            "attention",
            "num_kv_heads",
            self.num_kv_heads or self.num_heads,
            "num_heads",
            self.num_heads,
        )
        one_of("attention", "rope", self.rope, (*SCALINGS, "none"))
        positive("attention", rope_theta=self.rope_theta, rope_factor=self.rope_factor)
        if self.rope in ("dynamic", "yarn", "longrope", "llama3"):
            positive("attention", rope_original_length=self.rope_original_length)
        if self.rope == "longrope":
            self.check_longrope(self.rotary_size(hidden_size) // 2)
        if self.rope != "none":
            rotated = self.rotary_size(hidden_size)
            divides(
                "attention",
                "2 (the halves that rotary positions turn)",
                2,
                "head_dim * rotary_fraction",
                rotated,
            )
        for name in ("dropout", "rotary_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(
                    f"model config: attention.{name} = {getattr(self, name)} must lie in [0, 1]"
                )

    def check_longrope(self, pairs: int) -> None:
        if self.rope_original_length < 2:
            raise SettingsError(
                "model config: attention.rope_original_length must be at least 2 with rope = "
                "'longrope'"
            )
        for name in ("rope_short_factor", "rope_long_factor"):
            divisors = getattr(self, name)
            if len(divisors) != pairs or not all(divisor > 0 for divisor in divisors):
                raise SettingsError(
                    f"model config: attention.{name} has {len(divisors)} numbers; rope = "
                    f"'longrope' needs {pairs} above 0, one for each pair of channels that turns"
                )

    def rotary_size(self, hidden_size: int) -> int:
        return int((self.head_dim or hidden_size // self.num_heads) * self.rotary_fraction)

    def rotary(self, hidden_size: int) -> Rotary:
        scaling = {}
        for field in fields(Rotary):
            if field.name not in ("size", "scaling"):
                scaling[field.name] = getattr(self, f"rope_{field.name}")
        return Rotary(self.rotary_size(hidden_size), scaling=self.rope, **scaling)


class Attention(Mixer):
    """o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s (Vaswani 2017), q and k turned by their
    position (RoPE, Su 2021), G key/value heads serve H query heads (GQA, Ainslie 2023).

    Names and rotary layout (half-split) are those of transformers' Llama and of fla's Attention.
    All matrices begin as N(0, initializer_range), as in both classes; GPT-2's outputs by
    init_outputs (Radford 2019, section 2.3).
    """

    Config = AttentionConfig
    roles = {
        "q_proj": "column",
        "k_proj": "kv_head",
        "v_proj": "kv_head",
        "o_proj": "row",
        "q_norm": "replicate",
        "k_norm": "replicate",
    }
    divided = {"heads": "num_heads", "kv_heads": "num_kv_heads"}
    context = ("attention",)

    def __init__(self, model: ModelConfig, config: AttentionConfig, layer: int) -> None:
        super().__init__(model, config, layer)
        hidden_size = model.hidden_size
        self.head_dim = config.head_dim or hidden_size // config.num_heads
        self.heads, self.kv_heads = heads, kv_heads = (
            config.num_heads,
            config.num_kv_heads or config.num_heads,
        )
        self.q_proj = Linear(hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(heads * self.head_dim, hidden_size, bias=config.o_bias)
        if config.qk_norm:
            eps = config.qk_norm_eps or model.norm_eps
            self.q_norm = RMSNorm(self.head_dim, eps, model.norm_affine)
            self.k_norm = RMSNorm(self.head_dim, eps, model.norm_affine)
        self.rotary = None if config.rope == "none" else config.rotary(hidden_size)
        # A tensor: a number would be a constant of the compiled block, and every layer be compiled
        # for itself.
        self.inverse_layer = None
        if config.scale_by_inverse_layer:
            self.inverse_layer = torch.tensor(1 / (layer + 1), dtype=torch.float32, device="cpu")

    def turn_by(self, theta: float) -> None:
        """Let rotary positions, if there are any, have this base."""
        self.config = replace(self.config, rope_theta=theta)
        self.rotary = None if self.rotary is None else replace(self.rotary, theta=theta)

    def prepare(self, seq: Sequence) -> None:
        """cos and sin of all positions, once for all layers that turn alike."""
        if self.rotary is not None and self.rotary not in seq.shared:
            lengths_BT = None
            if self.rotary.scaling in BY_LENGTH:
                lengths_BT = seq.ops.document_lengths(seq.positions_BT, seq.documents)
            seq.shared[self.rotary] = self.rotary.turns(seq.positions_BT, lengths_BT)

    def forward(self, x_BTD: Tensor, seq: Sequence) -> Tensor:
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTGV = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.config.qk_norm:
            q_BTHK = self.q_norm(q_BTHK)
            k_BTGK = self.k_norm(k_BTGK)
        if self.rotary is not None:
            q_BTHK = rotate(q_BTHK, *seq.shared[self.rotary])
            k_BTGK = rotate(k_BTGK, *seq.shared[self.rotary])
        if self.inverse_layer is not None:
            q_BTHK = q_BTHK * self.inverse_layer
        window = self.config.window_size
        skip_B = None
        if seq.cache is not None:
            k_BTGK, v_BTGV = (
                seq.cache.append(self.layer, name, x, window)
                for name, x in (("k", k_BTGK), ("v", v_BTGV))
            )
            skip_B = seq.cache.hidden_B(k_BTGK.shape[1], x_BTD.shape[1])
        o_BTHV = seq.ops.attention(
            q_BTHK,
            k_BTGK,
            v_BTGV,
            window=window or None,
            documents=seq.documents,
            dropout=self.config.dropout,
            noise_BT=seq.noise_BT,
            skip_B=skip_B,
            first_head=self.first_head,
        )
        return self.o_proj(o_BTHV.flatten(-2))

    @property
    def cached_up_to(self) -> int | None:  # type: ignore[override]  # computed, never set
        """With angles that depend on the text's length: up to this many tokens they do not change.
        None: they never do."""
        if self.rotary is not None and self.rotary.scaling in BY_LENGTH:
            return self.rotary.original_length
        return None

    def flops_per_token(self, seq_len: int) -> float:
        projections = 2 * sum(
            p.numel() for name, p in self.named_parameters() if name.endswith("proj.weight")
        )
        window = min(self.config.window_size or seq_len, seq_len)
        keys_seen = window - window * (window - 1) / (
            2 * seq_len
        )  # mean over the row: (T + 1) / 2 without a window
        return projections + 4 * self.config.num_heads * self.head_dim * keys_seen
