"""The families of fla (flash-linear-attention): their names <-> our names; free of torch. families.py says how to read it."""

from dataclasses import replace
from typing import Any

from longfire.hub.family import REQUIRED, Family, Key, Listed, Name, Settings

NAMES = (
    Name("model.embeddings.", "embed."),
    Name("model.layers.{i}.attn_norm.", "layers.{i}.mixer_norm."),
    Name("model.layers.{i}.attn.", "layers.{i}.mixer."),
    Name("model.layers.{i}.mlp_norm.", "layers.{i}.mlp_norm."),
    Name("model.layers.{i}.mlp.", "layers.{i}.mlp."),
    Name("model.norm.", "norm."),
    Name("lm_head.", "head."),
)
KEYS = (
    Key("vocab_size", "vocab_size", 32000),
    Key("initializer_range", "initializer_range", 0.02),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
    Key("hidden_size", "hidden_size", 2048),
    Key("intermediate_size", "intermediate_size", None, null=0),
    Key("max_position_embeddings", "max_position_embeddings", 2048, null=0),
    Key("norm_eps", "norm_eps", 1e-6),
    Key("hidden_act", "mlp", "swish", words={"swish": "swiglu"}),
)
FIXED = {"hidden_ratio": (4, None), "attnres_block_size": (None,)}
INERT = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
BUFFERS = ("rotary.inv_freq",)
PLAIN = {
    "norm": "rmsnorm", "norm_affine": True, "norm_bias": True, "block": "pre", "embed_norm": False, "pad_vocab_multiple": 1,
    "mlp_bias": False, "learned_positions": False,
}  # fmt: skip
ATTENTION_KEYS = (
    Key("num_heads", "attention.num_heads", 32),
    Key("num_kv_heads", "attention.num_kv_heads", None, null=0),
    Key("qkv_bias", "attention.qkv_bias", False),
    Key("window_size", "attention.window_size", None, null=0),
    Key("rope_theta", "attention.rope_theta", 10000.0),
)
# fla's softmax layer always has hidden_size / num_heads channels a head; its q/k norms have eps 1e-5 whatever norm_eps is.
ATTENTION = {
    "attention.head_dim": 0, "attention.qk_norm": False, "attention.qk_norm_eps": 0.0, "attention.o_bias": False,
    "attention.scale_by_inverse_layer": False, "attention.rotary_fraction": 1.0, "attention.rope": "default",
}  # fmt: skip
HYBRID = Listed((replace(ATTENTION_KEYS[0], default=REQUIRED, kind=int), *ATTENTION_KEYS[1:]), ATTENTION)

MAMBA_NAMES = (
    Name("backbone.embeddings.", "embed."),
    Name("backbone.layers.{i}.norm.", "layers.{i}.mixer_norm."),
    Name("backbone.layers.{i}.mixer.", "layers.{i}.mixer."),
    Name("backbone.norm_f.", "norm."),
    Name("lm_head.", "head."),
)
MAMBA_KEYS = (
    Key("vocab_size", "vocab_size", 32000),
    Key("initializer_range", "initializer_range", 0.02),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
    Key("hidden_size", "hidden_size", 2048),
    Key("num_hidden_layers", "num_hidden_layers", 48),
    Key("norm_eps", "norm_eps", 1e-5),
    Key("max_position_embeddings", "max_position_embeddings", None, null=0),  # no key of theirs, but one that they let stand
)
# What says how weights begin that are trained from none: longfire begins matrices of all families alike.
MAMBA_INERT = ("dt_min", "dt_max", "dt_init_floor", "dt_scale", "dt_init_scheme", "rescale_prenorm_residual")
MAMBA_OLDER = {  # of transformers, whose own classes have tensors of the same names
    "layer_norm_epsilon": "norm_eps", "time_step_limit": "dt_limit", "time_step_min": "dt_min", "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor", "time_step_scale": "dt_scale", "time_step_init_scheme": "dt_init_scheme",
    "time_step_rank": "dt_rank",
}  # fmt: skip
INFINITE = {"__float__": "Infinity"}  # as transformers writes it: JSON has none


def heads_of(settings: Settings) -> int:
    return settings["hidden_size"] * settings["mamba2.expand"] // settings["mamba2.head_dim"]


def limit(limits: Any, place: int) -> float | None:
    """One of their two limits, of which infinity is our 0; None if they are none."""
    if not isinstance(limits, list) or len(limits) != 2:
        return None
    value = 0.0 if limits[place] in (INFINITE, float("inf")) else limits[place]
    return float(value) if type(value) in (int, float) else None


def dt_limits(settings: Settings) -> list[Any]:
    return [settings["mamba2.dt_low"], settings["mamba2.dt_high"] or INFINITE]


FLA: dict[str, Family] = {
    "transformer": Family(
        architecture="TransformerForCausalLM",
        package="fla",
        mixer="attention",
        keys=(*KEYS, Key("num_hidden_layers", "num_hidden_layers", 24), *ATTENTION_KEYS),
        names=NAMES,
        buffers=BUFFERS,
        fixed={**FIXED, "elementwise_affine": (True,), "qk_norm": (False,)},
        ours={**PLAIN, **ATTENTION},
        inert=INERT,
        replaced={"hidden_ratio": "intermediate_size"},
    ),
    "gla": Family(
        architecture="GLAForCausalLM",
        package="fla",
        mixer="gla",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "gla.num_heads", 4),
            Key("num_kv_heads", "gla.num_kv_heads", None, null=0),
            Key("expand_k", "gla.expand_k", 0.5),
            Key("expand_v", "gla.expand_v", 1.0),
            Key("feature_map", "gla.feature_map", None, null="none"),
            Key("use_short_conv", "gla.use_short_conv", False),
            Key("conv_size", "gla.conv_size", 4),
            Key("use_output_gate", "gla.use_output_gate", True),
            Key("clamp_min", "gla.clamp_min", None),
        ),
        names=NAMES,
        buffers=BUFFERS,
        layers=HYBRID,
        # fuse_norm = false is the same mathematics, but the output norm's weight then has another name.
        fixed={**FIXED, "elementwise_affine": (True,), "fuse_norm": (True,)},
        ours={**PLAIN, "gla.gate_logit_normalizer": 16.0, "gla.gate_low_rank": 16},
        inert=(*(key for key in INERT if key != "fuse_norm"), "use_gk", "use_gv"),
        replaced={"hidden_ratio": "intermediate_size"},
    ),
    "gated_deltanet": Family(
        architecture="GatedDeltaNetForCausalLM",
        package="fla",
        mixer="gated_delta_net",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 21),
            Key("num_heads", "gated_delta_net.num_heads", 6),
            Key("num_v_heads", "gated_delta_net.num_v_heads", None, null=0),
            Key("head_dim", "gated_delta_net.head_dim", 256),
            Key("expand_v", "gated_delta_net.expand_v", 2.0),
            Key("use_gate", "gated_delta_net.use_gate", True),
            Key("use_short_conv", "gated_delta_net.use_short_conv", True),
            Key("conv_size", "gated_delta_net.conv_size", 4),
            Key("allow_neg_eigval", "gated_delta_net.allow_neg_eigval", False),
        ),
        names=NAMES,
        buffers=BUFFERS,
        layers=HYBRID,
        fixed={**FIXED, "output_gate_activation": ("swish", "silu")},
        ours=PLAIN,
        inert=INERT,
        replaced={"hidden_ratio": "intermediate_size"},
    ),
    "hgrn2": Family(
        architecture="HGRN2ForCausalLM",
        package="fla",
        mixer="hgrn2",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("expand_ratio", "hgrn2.expand_ratio", 128),
            Key("use_short_conv", "hgrn2.use_short_conv", False),
            Key("conv_size", "hgrn2.conv_size", 4),
            Key("use_lower_bound", "hgrn2.use_lower_bound", True),
            Key("elementwise_affine", "hgrn2.elementwise_affine", True),
        ),
        names=(*NAMES, Name("model.", "shared.hgrn2.")),  # lower_bounds
        buffers=BUFFERS,
        layers=HYBRID,
        fixed=FIXED,
        ours=PLAIN,
        inert=INERT,
        replaced={"hidden_ratio": "intermediate_size", "num_heads": "expand_ratio"},
    ),
    "mamba2": Family(
        architecture="Mamba2ForCausalLM",
        package="fla",
        mixer="mamba2",
        keys=(
            *MAMBA_KEYS,
            Key("expand", "mamba2.expand", 2),
            Key("head_dim", "mamba2.head_dim", 64),
            Key("num_heads", "mamba2.head_dim", lambda settings: settings["mamba2.head_dim"],
                reads=lambda heads, settings: settings["mamba2.head_dim"] if heads == heads_of(settings) else None,
                writes=heads_of),
            Key("state_size", "mamba2.state_size", 128),
            Key("n_groups", "mamba2.n_groups", 1),
            Key("conv_kernel", "mamba2.conv_kernel", 4),
            Key("use_bias", "mamba2.use_bias", False),
            Key("use_conv_bias", "mamba2.use_conv_bias", True),
            Key("rmsnorm", "mamba2.rmsnorm", True),
            Key("norm_before_gate", "mamba2.norm_before_gate", False),
            Key("D_has_hdim", "mamba2.D_has_hdim", False),
            Key("dt_limit", "mamba2.dt_low", [0.0, INFINITE], reads=lambda limits, _: limit(limits, 0), writes=dt_limits),
            Key("dt_limit", "mamba2.dt_high", [0.0, INFINITE], reads=lambda limits, _: limit(limits, 1), writes=dt_limits),
            Key("residual_in_fp32", "residual_in_fp32", True),
        ),
        names=(
            Name("backbone.layers.{i}.mixer.in_proj.",
                 tuple(f"layers.{{i}}.mixer.{name}_proj." for name in ("z", "x", "B", "C", "dt"))),
            Name("backbone.layers.{i}.mixer.conv1d.", tuple(f"layers.{{i}}.mixer.{name}_conv1d." for name in "xBC")),
            *MAMBA_NAMES,
        ),
        base="backbone.",
        fixed={"hidden_act": ("silu", "swish")},
        ours={**PLAIN, "mlp": "none"},
        inert=(*INERT, *MAMBA_INERT, "chunk_size", "A_init_range", "conv_init", "dt_rank"),
        older=MAMBA_OLDER,
        both_spellings=True,
    ),
}
