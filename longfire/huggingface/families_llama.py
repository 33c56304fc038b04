"""The families of transformers whose blocks are Llama's: their names <-> our names; free of torch.
families.py says how to read it."""

from dataclasses import replace
from functools import partial

from longfire.config.own_settings import is_finite
from longfire.huggingface.family import REQUIRED, Family, Key, Name, Settings, unchanged
from longfire.huggingface.family_layers import Windows

LLAMA_NAMES = (
    Name("model.embed_tokens.", "embed."),
    Name("model.layers.{i}.input_layernorm.", "layers.{i}.mixer_norm."),
    Name("model.layers.{i}.self_attn.", "layers.{i}.mixer."),
    Name("model.layers.{i}.post_attention_layernorm.", "layers.{i}.mlp_norm."),
    Name("model.layers.{i}.mlp.", "layers.{i}.mlp."),
    Name("model.norm.", "norm."),
    Name("lm_head.", "head."),
)


# transformers' names of activations -> our gated MLPs. The first of several is written.
GATES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu": "geglu_exact",
    "relu": "reglu",
}


def length_of(settings: Settings) -> int:
    return settings["max_position_embeddings"]


def growth(settings: Settings) -> float:
    """What transformers takes for the factor of yarn and longrope when the config has null."""
    return settings["max_position_embeddings"] / settings["attention.rope_original_length"]


def numbers(values: object, _: Settings) -> tuple[float, ...] | None:
    """A list of numbers as ours; None if it is no such list."""
    if not isinstance(values, list | tuple):
        return None
    if not all(map(is_finite, values)):
        return None
    return tuple(map(float, values))


KIND = "attention.rope"
SCALED = ("linear", "dynamic", "llama3")
UNSCALED_ROPES = unchanged("default", *SCALED)  # whose rotations change no length
ROPE_KEYS = (
    Key("rope_parameters.rope_theta", "attention.rope_theta", 10000.0),
    Key(
        "rope_parameters.rope_type",
        KIND,
        "default",
        choices=unchanged("default", *SCALED, "yarn", "longrope"),
    ),
    Key(
        "max_position_embeddings",
        "attention.rope_original_length",
        length_of,
        when=(KIND, "dynamic"),
        kind=int,
    ),
    Key(
        "rope_parameters.original_max_position_embeddings",
        "attention.rope_original_length",
        length_of,
        when=(KIND, "yarn", "longrope", "llama3"),
        kind=int,
    ),
    Key(
        "rope_parameters.factor",
        "attention.rope_factor",
        REQUIRED,
        when=(KIND, *SCALED),
        kind=float,
    ),
    Key(
        "rope_parameters.factor",
        "attention.rope_factor",
        REQUIRED,
        null=growth,
        when=(KIND, "yarn"),
        kind=float,
    ),
    Key(
        "rope_parameters.factor",
        "attention.rope_factor",
        growth,
        null=growth,
        when=(KIND, "longrope"),
        kind=float,
    ),
    Key(
        "rope_parameters.short_factor",
        "attention.rope_short_factor",
        REQUIRED,
        when=(KIND, "longrope"),
        reads=numbers,
        writes=lambda settings: list(settings["attention.rope_short_factor"]),
    ),
    Key(
        "rope_parameters.long_factor",
        "attention.rope_long_factor",
        REQUIRED,
        when=(KIND, "longrope"),
        reads=numbers,
        writes=lambda settings: list(settings["attention.rope_long_factor"]),
    ),
    Key(
        "rope_parameters.low_freq_factor",
        "attention.rope_low_freq_factor",
        REQUIRED,
        when=(KIND, "llama3"),
        kind=float,
    ),
    Key(
        "rope_parameters.high_freq_factor",
        "attention.rope_high_freq_factor",
        REQUIRED,
        when=(KIND, "llama3"),
        kind=float,
    ),
    Key(
        "rope_parameters.beta_fast",
        "attention.rope_beta_fast",
        32.0,
        null=32.0,
        when=(KIND, "yarn"),
    ),
    Key(
        "rope_parameters.beta_slow",
        "attention.rope_beta_slow",
        1.0,
        null=1.0,
        when=(KIND, "yarn"),
    ),
    Key(
        "rope_parameters.attention_factor",
        "attention.rope_attention_factor",
        None,
        null=0.0,
        when=(KIND, "yarn", "longrope"),
    ),
    Key("rope_parameters.mscale", "attention.rope_mscale", None, null=0.0, when=(KIND, "yarn")),
    Key(
        "rope_parameters.mscale_all_dim",
        "attention.rope_mscale_all_dim",
        None,
        null=0.0,
        when=(KIND, "yarn"),
    ),
    Key("rope_parameters.truncate", "attention.rope_truncate", True, when=(KIND, "yarn")),
)
COMMON_KEYS = (
    Key("vocab_size", "vocab_size", 32000),
    Key("initializer_range", "initializer_range", 0.02),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
    Key("hidden_size", "hidden_size", 4096),
    Key("num_hidden_layers", "num_hidden_layers", 32),
    Key("num_attention_heads", "attention.num_heads", 32),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("hidden_act", "mlp", "silu", choices=GATES),
    Key("attention_dropout", "attention.dropout", 0.0, null=0.0),
)
LLAMA_FIXED = {"rope_parameters.partial_rotary_factor": (1.0, None)}
QWEN_FIXED = {**LLAMA_FIXED, "use_mrope": (False, None)}  # positions of pictures
LLAMA_OLDER = {
    "rope_scaling": "rope_parameters",  # before transformers 5
    "rope_theta": "rope_parameters.rope_theta",
    "partial_rotary_factor": "rope_parameters.partial_rotary_factor",
    "rope_parameters.type": "rope_parameters.rope_type",
}
BUFFERS = ("rotary_emb.inv_freq",)  # in old files; computed from rope_theta

# What no class of transformers here has in another way; a family's `ours` says what else it has
# with one value only.
PLAIN = {
    "norm_affine": True,
    "norm_bias": True,
    "block": "pre",
    "embed_norm": False,
    "pad_vocab_multiple": 1,
    "attention.rotary_fraction": 1.0,
    "final_logit_softcapping": 0.0,
}
LLAMA = {
    **PLAIN,
    "norm": "rmsnorm",
    "learned_positions": False,
    "attention.scale_by_inverse_layer": False,
}
NO_BIASES = {"mlp_bias": False, "attention.qkv_bias": False, "attention.o_bias": False}
NO_NORM = {"attention.qk_norm": False, "attention.qk_norm_eps": 0.0}


# With Qwen's vocabulary.
QWEN_KEYS = tuple(
    replace(key, default=151936) if key.theirs == "vocab_size" else key for key in COMMON_KEYS
)
# What the families here have, unless they say otherwise.
llama_family = partial(
    Family,
    package="transformers",
    mixer="attention",
    names=LLAMA_NAMES,
    buffers=BUFFERS,
    fixed=LLAMA_FIXED,
    older=LLAMA_OLDER,
)
LLAMA_FAMILIES: dict[str, Family] = {
    "llama": llama_family(
        architecture="LlamaForCausalLM",
        keys=(
            *COMMON_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 2048, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 11008),
            Key("num_key_value_heads", "attention.num_kv_heads", None, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
            Key("attention_bias", "attention.qkv_bias", False),
            Key("attention_bias", "attention.o_bias", False),
            Key("mlp_bias", "mlp_bias", False),
        ),
        fixed={**LLAMA_FIXED, "rope_interleaved": (False, None)},
        inert=(
            "max_sequence_length",
            "is_llama_config",
            "pretraining_tp",
        ),  # the last: in how many products it was multiplied
        ours={**LLAMA, **NO_NORM, "attention.window_size": 0},
    ),
    "mistral": llama_family(
        architecture="MistralForCausalLM",
        keys=(
            *COMMON_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 131072, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 14336),
            Key("num_key_value_heads", "attention.num_kv_heads", 8, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
            Key("sliding_window", "attention.window_size", 4096, null=0),
        ),
        ours={**LLAMA, **NO_BIASES, **NO_NORM},
    ),
    "ministral": llama_family(
        architecture="MinistralForCausalLM",
        keys=(
            *COMMON_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 131072, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 14336),
            Key("num_key_value_heads", "attention.num_kv_heads", 8, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
        ),
        layers=Windows(switch="", first=""),
        ours={**LLAMA, **NO_BIASES, **NO_NORM},
    ),
    "qwen2": llama_family(
        architecture="Qwen2ForCausalLM",
        keys=(
            *QWEN_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 32768, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 22016),
            Key("num_key_value_heads", "attention.num_kv_heads", 32, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
        ),
        layers=Windows(),
        fixed=QWEN_FIXED,
        ours={
            **LLAMA,
            **NO_NORM,
            "mlp_bias": False,
            "attention.qkv_bias": True,
            "attention.o_bias": False,
        },
    ),
    "qwen3": llama_family(
        architecture="Qwen3ForCausalLM",
        keys=(
            *QWEN_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 32768, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 22016),
            Key("num_key_value_heads", "attention.num_kv_heads", 32, null=0),
            Key("head_dim", "attention.head_dim", 128),
            Key("attention_bias", "attention.qkv_bias", False),
            Key("attention_bias", "attention.o_bias", False),
            Key("rms_norm_eps", "attention.qk_norm_eps", 1e-6),
        ),
        layers=Windows(),
        fixed=QWEN_FIXED,
        ours={**LLAMA, "mlp_bias": False, "attention.qk_norm": True},
    ),
}
