"""The families of fla (flash-linear-attention): their names <-> our names; free of torch.
families.py says how to read it."""

from dataclasses import replace
from functools import partial

from longfire.huggingface.family import REQUIRED, Family, Key, Name, Same, Settings, unchanged
from longfire.huggingface.family_layers import Listed

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
    Key("hidden_act", "mlp", "swish", choices={"swish": "swiglu"}),
    Key("use_l2warp", "use_l2warp", False),
)
FIXED = {"hidden_ratio": (4, None), "attnres_block_size": (None,)}
INERT = (
    "attn_mode",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "share_conv_kernel",
)
RATIO = {"hidden_ratio": "intermediate_size"}
BUFFERS = ("rotary.inv_freq",)
# With fuse_norm = false the same output norm has another name.
UNFUSED = {".attn.g_norm_swish_gate.weight": ".attn.g_norm.weight"}
PLAIN = {
    "norm": "rmsnorm",
    "norm_affine": True,
    "norm_bias": True,
    "block": "pre",
    "embed_norm": False,
    "pad_vocab_multiple": 1,
    "mlp_bias": False,
    "learned_positions": False,
    "final_logit_softcapping": 0.0,
}
ATTENTION_KEYS = (
    Key("num_heads", "attention.num_heads", 32),
    Key("num_kv_heads", "attention.num_kv_heads", None, null=0),
    Key("qkv_bias", "attention.qkv_bias", False),
    Key("window_size", "attention.window_size", None, null=0),
    Key("rope_theta", "attention.rope_theta", 10000.0),
)
# fla's softmax layer always has hidden_size / num_heads channels a head.
ATTENTION = {
    "attention.head_dim": 0,
    "attention.o_bias": False,
    "attention.scale_by_inverse_layer": False,
    "attention.rotary_fraction": 1.0,
    "attention.rope": "default",
}
YES_NO = {True: True, False: False}
MAPS: dict[str | None, str] = {
    name: name for name in ("relu", "swish", "sigmoid", "logsigmoid", "gelu")
}
MAPS_OF_FLA: dict[str | None, str] = {None: "none", **MAPS, "silu": "swish", "sqrelu": "relu2"}
# Where fla's class takes the function from transformers: there "gelu" is not the tanh form that it
# is in fla.
MAPS_OF_TRANSFORMERS: dict[str | None, str] = {
    None: "none",
    "relu": "relu",
    "swish": "swish",
    "silu": "swish",
    "sigmoid": "sigmoid",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
QK_ACTIVATIONS = {"silu": "swish", "relu": "relu", "elu": "elu", "identity": "none"}
LINEAR_MAPS = {
    **unchanged("elementwise_product", "hedgehog", "t2r", "dpfp", "elu", "relu"),
    "identity": "none",
}
HYBRID = Listed(
    (replace(ATTENTION_KEYS[0], default=REQUIRED, kind=int), *ATTENTION_KEYS[1:]),
    {**ATTENTION, "attention.qk_norm": False, "attention.qk_norm_eps": 0.0},
)


def half_width(settings: Settings) -> int:
    """RetNet's MLP where the config has no size: hidden_ratio 2, where all others have 4."""
    return 256 * -(-int(settings["hidden_size"] * 2 * 2 / 3) // 256)


# What the families here have, unless they say otherwise.
fla_family = partial(
    Family,
    package="fla",
    names=NAMES,
    layers=HYBRID,
    buffers=BUFFERS,
    fixed=FIXED,
    ours=PLAIN,
    inert=INERT,
    replaced=RATIO,
)
FLA: dict[str, Family] = {
    "transformer": fla_family(
        architecture="TransformerForCausalLM",
        mixer="attention",
        layers=Same(),
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            *ATTENTION_KEYS,
            Key("qk_norm", "attention.qk_norm", False),
            Key(
                "qk_norm",
                "attention.qk_norm_eps",
                False,
                choices={False: 0.0, True: 1e-5},
            ),  # whatever norm_eps is
        ),
        fixed={
            **FIXED,
            "attention_bias": (False, None),
        },  # no class of fla reads it; flame's files say false
        ours={**PLAIN, **ATTENTION},
        inert=(*INERT, "elementwise_affine"),  # no layer of it asks
    ),
    "gla": fla_family(
        architecture="GLAForCausalLM",
        mixer="gla",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "gla.num_heads", 4),
            Key("num_kv_heads", "gla.num_kv_heads", None, null=0),
            Key("expand_k", "gla.expand_k", 0.5),
            Key("expand_v", "gla.expand_v", 1.0),
            Key("feature_map", "gla.feature_map", None, null="none", choices=MAPS_OF_FLA),
            Key("use_short_conv", "gla.use_short_conv", False),
            Key("conv_size", "gla.conv_size", 4),
            Key("use_output_gate", "gla.use_output_gate", True),
            Key("elementwise_affine", "gla.elementwise_affine", True, null=False, choices=YES_NO),
            Key("clamp_min", "gla.clamp_min", None),
        ),
        aliases=UNFUSED,
        ours={
            **PLAIN,
            "gla.qk_norm": False,
            "gla.gate_logit_normalizer": 16.0,
            "gla.gate_low_rank": 16,
            "gla.gate_fn": "swish",
        },
        inert=(
            *INERT,
            "use_gk",
            "use_gv",
        ),  # no class of fla reads them: keys are always gated, values never
    ),
    "gated_deltanet": fla_family(
        architecture="GatedDeltaNetForCausalLM",
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
            Key(
                "output_gate_activation",
                "gated_delta_net.output_gate_activation",
                "swish",
                choices={"swish": "swish", "silu": "swish", "sigmoid": "sigmoid"},
            ),
        ),
    ),
    "delta_net": fla_family(
        architecture="DeltaNetForCausalLM",
        mixer="delta_net",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "delta_net.num_heads", 16),
            Key("expand_k", "delta_net.expand_k", 1.0),
            Key("expand_v", "delta_net.expand_v", 1.0),
            Key("use_beta", "delta_net.use_beta", True),
            Key("use_gate", "delta_net.use_gate", False),
            Key("use_short_conv", "delta_net.use_short_conv", True),
            Key("conv_size", "delta_net.conv_size", 4),
            Key("qk_activation", "delta_net.qk_activation", "silu", choices=QK_ACTIVATIONS),
            Key("qk_norm", "delta_net.qk_norm", "l2", choices={"l2": "l2", "sum": "sum"}),
            Key("allow_neg_eigval", "delta_net.allow_neg_eigval", False),
        ),
        inert=(*INERT, "use_output_norm"),  # their layer has the norm always
    ),
    "retnet": fla_family(
        architecture="RetNetForCausalLM",
        mixer="retention",
        keys=(
            *(
                replace(key, null=half_width, kind=int)
                if key.theirs == "intermediate_size"
                else key
                for key in KEYS
            ),
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "retention.num_heads", 8),
            Key("num_kv_heads", "retention.num_kv_heads", None, null=0),
            Key("expand_k", "retention.expand_k", 1.0),
            Key("expand_v", "retention.expand_v", 2.0),
            Key(
                "feature_map",
                "retention.feature_map",
                None,
                null="none",
                choices=MAPS_OF_TRANSFORMERS,
            ),
            Key("use_output_gate", "retention.use_output_gate", True),
            Key(
                "elementwise_affine",
                "retention.elementwise_affine",
                True,
                null=False,
                choices=YES_NO,
            ),
        ),
        aliases=UNFUSED,
        fixed={**FIXED, "hidden_ratio": (2,)},
        ours={**PLAIN, "retention.qk_norm": False, "retention.gate_fn": "swish"},
        inert=(
            *INERT,
            "use_short_conv",
            "conv_size",
        ),  # their model does not pass them to its layers
    ),
    "linear_attn": fla_family(
        architecture="LinearAttentionForCausalLM",
        mixer="linear_attention",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "linear_attention.num_heads", 4),
            Key("num_kv_heads", "linear_attention.num_kv_heads", None, null=0),
            Key("expand_k", "linear_attention.expand_k", 1.0),
            Key("expand_v", "linear_attention.expand_v", 1.0),
            Key(
                "feature_map",
                "linear_attention.feature_map",
                "elementwise_product",
                choices=LINEAR_MAPS,
            ),
            Key("tie_feature_map_qk", "linear_attention.tie_feature_map_qk", False),
            Key("norm_q", "linear_attention.norm_q", False),
            Key("norm_k", "linear_attention.norm_k", False),
            Key("norm_feature_map", "linear_attention.norm_feature_map", False),
            Key(
                "elementwise_affine",
                "linear_attention.elementwise_affine",
                True,
                null=False,
                choices=YES_NO,
            ),
        ),
        ours={**PLAIN, "linear_attention.qk_norm": False},
    ),
    "kda": fla_family(
        architecture="KDAForCausalLM",
        mixer="kda",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "kda.num_heads", 16),
            Key("num_v_heads", "kda.num_v_heads", None, null=0),
            Key("head_dim", "kda.head_dim", 128),
            Key("expand_v", "kda.expand_v", 1.0),
            Key("use_short_conv", "kda.use_short_conv", True),
            Key("conv_size", "kda.conv_size", 4),
            Key("allow_neg_eigval", "kda.allow_neg_eigval", False),
            Key("lower_bound", "kda.lower_bound", None, kind=float),
            Key("safe_gate", "kda.safe_gate", False),
        ),
    ),
    "hgrn2": fla_family(
        architecture="HGRN2ForCausalLM",
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
        replaced={"hidden_ratio": "intermediate_size", "num_heads": "expand_ratio"},
    ),
    "gsa": fla_family(
        architecture="GSAForCausalLM",
        mixer="gsa",
        keys=(
            *KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "gsa.num_heads", 4),
            Key("num_kv_heads", "gsa.num_kv_heads", None, null=0),
            Key("num_slots", "gsa.num_slots", 64, null=0),
            Key("expand_k", "gsa.expand_k", 1.0),
            Key(
                "feature_map",
                "gsa.feature_map",
                "swish",
                choices=unchanged("swish", "relu", "t2r"),
            ),
            Key("use_short_conv", "gsa.use_short_conv", False),
            Key("conv_size", "gsa.conv_size", 4),
            Key("gate_logit_normalizer", "gsa.gate_logit_normalizer", 8.0),
            Key("elementwise_affine", "gsa.elementwise_affine", True),
        ),
        fixed={
            **FIXED,
            "expand_v": (1,),  # with another one their output norm has the wrong size
            "use_rope": (False, None),  # no class of fla reads it; flame's files say false
        },
        ours={**PLAIN, "gsa.qk_norm": False},
        inert=(*INERT, "clamp_min", "clamp_max", "use_output_gate", "use_norm"),  # read by nothing
        older={"exapnd_k": "expand_k", "exapnd_v": "expand_v"},  # as their class takes them
    ),
}
