"""The families that longfire can read and write, and those of transformers: their names <-> our
names; free of torch.

A family is one entry: which key of its config.json is which setting of ours, which keys and
settings can only have one value, and which prefix of a parameter's name is which of ours. A new
family is a new entry; family_reading.py and family_writing.py read the tables and know none.
"""

from dataclasses import replace
from importlib.metadata import version
from typing import Any

from longfire.config.model_config import BY_DEPTH, MIXERS_BY_DEPTH, ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.huggingface import own_config
from longfire.huggingface.families_blocks import OWN_BLOCKS
from longfire.huggingface.families_fla import FLA
from longfire.huggingface.family import REQUIRED, Family, Key, Name, Settings, Windows
from longfire.huggingface.family_reading import (
    KEYS_OF_OURS,
    asked_of,
    idle_rope_keys,
    names_of,
    read_family_config,
)
from longfire.huggingface.family_writing import config_of, refusals, whole

LLAMA_NAMES = (
    Name("model.embed_tokens.", "embed."),
    Name("model.layers.{i}.input_layernorm.", "layers.{i}.mixer_norm."),
    Name("model.layers.{i}.self_attn.", "layers.{i}.mixer."),
    Name("model.layers.{i}.post_attention_layernorm.", "layers.{i}.mlp_norm."),
    Name("model.layers.{i}.mlp.", "layers.{i}.mlp."),
    Name("model.norm.", "norm."),
    Name("lm_head.", "head."),
)


# transformers' names of activations -> our MLPs: gated, as Llama's, and ungated, as GPT-2's. The
# first of several is written.
GATES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "gelu": "geglu_exact",
    "relu": "reglu",
}
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def length_of(settings: Settings) -> int:
    return settings["max_position_embeddings"]


def growth(settings: Settings) -> float:
    """What transformers takes for the factor of yarn and longrope when the config has null."""
    return settings["max_position_embeddings"] / settings["attention.rope_original_length"]


def numbers(values: Any, _: Settings) -> tuple[float, ...] | None:
    """A list of numbers as ours; None if it is none."""
    right = isinstance(values, list | tuple) and all(
        type(value) in (int, float) for value in values
    )
    return tuple(map(float, values)) if right else None


KIND, SCALED = "attention.rope", ("linear", "dynamic", "llama3")
UNSCALED_ROPES = {kind: kind for kind in ("default", *SCALED)}  # whose turns change no length
ROPE_KEYS = (
    Key("rope_parameters.rope_theta", "attention.rope_theta", 10000.0),
    Key(
        "rope_parameters.rope_type",
        KIND,
        "default",
        words={k: k for k in ("default", *SCALED, "yarn", "longrope")},
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
        "rope_parameters.beta_slow", "attention.rope_beta_slow", 1.0, null=1.0, when=(KIND, "yarn")
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
    Key("hidden_act", "mlp", "silu", words=GATES),
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
# Looked through in this order when a shape asks for a family: what transformers alone can load
# comes first.
TRANSFORMERS: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        package="transformers",
        mixer="attention",
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
        names=LLAMA_NAMES,
        buffers=BUFFERS,
        fixed={**LLAMA_FIXED, "rope_interleaved": (False, None)},
        inert=(
            "max_sequence_length",
            "is_llama_config",
            "pretraining_tp",
        ),  # the last: in how many products it was multiplied
        ours={**LLAMA, **NO_NORM, "attention.window_size": 0},
        older=LLAMA_OLDER,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            *COMMON_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 131072, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 14336),
            Key("num_key_value_heads", "attention.num_kv_heads", 8, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
            Key("sliding_window", "attention.window_size", 4096, null=0),
        ),
        names=LLAMA_NAMES,
        buffers=BUFFERS,
        fixed=LLAMA_FIXED,
        ours={**LLAMA, **NO_BIASES, **NO_NORM},
        older=LLAMA_OLDER,
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            *COMMON_KEYS,
            Key("max_position_embeddings", "max_position_embeddings", 131072, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 14336),
            Key("num_key_value_heads", "attention.num_kv_heads", 8, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
        ),
        names=LLAMA_NAMES,
        buffers=BUFFERS,
        layers=Windows(switch="", first=""),
        fixed=LLAMA_FIXED,
        ours={**LLAMA, **NO_BIASES, **NO_NORM},
        older=LLAMA_OLDER,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            *(
                replace(key, default=151936) if key.theirs == "vocab_size" else key
                for key in COMMON_KEYS
            ),
            Key("max_position_embeddings", "max_position_embeddings", 32768, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 22016),
            Key("num_key_value_heads", "attention.num_kv_heads", 32, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
        ),
        names=LLAMA_NAMES,
        buffers=BUFFERS,
        layers=Windows(),
        fixed=QWEN_FIXED,
        ours={
            **LLAMA,
            **NO_NORM,
            "mlp_bias": False,
            "attention.qkv_bias": True,
            "attention.o_bias": False,
        },
        older=LLAMA_OLDER,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            *(
                replace(key, default=151936) if key.theirs == "vocab_size" else key
                for key in COMMON_KEYS
            ),
            Key("max_position_embeddings", "max_position_embeddings", 32768, null=0),
            *ROPE_KEYS,
            Key("intermediate_size", "intermediate_size", 22016),
            Key("num_key_value_heads", "attention.num_kv_heads", 32, null=0),
            Key("head_dim", "attention.head_dim", 128),
            Key("attention_bias", "attention.qkv_bias", False),
            Key("attention_bias", "attention.o_bias", False),
            Key("rms_norm_eps", "attention.qk_norm_eps", 1e-6),
        ),
        names=LLAMA_NAMES,
        buffers=BUFFERS,
        layers=Windows(),
        fixed=QWEN_FIXED,
        ours={**LLAMA, "mlp_bias": False, "attention.qk_norm": True},
        older=LLAMA_OLDER,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        package="transformers",
        mixer="attention",
        keys=(
            Key("vocab_size", "vocab_size", 50257),
            Key("initializer_range", "initializer_range", 0.02),
            Key("tie_word_embeddings", "tie_word_embeddings", True),
            Key("n_embd", "hidden_size", 768),
            Key("n_layer", "num_hidden_layers", 12),
            Key("n_head", "attention.num_heads", 12),
            Key("n_positions", "max_position_embeddings", 1024),
            Key(
                "n_inner", "intermediate_size", None, null=lambda s: 4 * s["hidden_size"], kind=int
            ),
            Key("activation_function", "mlp", "gelu_new", words=ACTIVATIONS),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Key("resid_pdrop", "dropout", 0.1),
            Key("embd_pdrop", "embed_dropout", 0.1),
            Key("attn_pdrop", "attention.dropout", 0.1),
            Key("scale_attn_by_inverse_layer_idx", "attention.scale_by_inverse_layer", False),
        ),
        names=(
            Name("transformer.wte.", "embed."),
            Name("transformer.wpe.", "positions."),
            Name("transformer.h.{i}.ln_1.", "layers.{i}.mixer_norm."),
            Name(
                "transformer.h.{i}.attn.c_attn.",
                tuple(f"layers.{{i}}.mixer.{x}_proj." for x in "qkv"),
                turned=True,
            ),
            Name("transformer.h.{i}.attn.c_proj.", "layers.{i}.mixer.o_proj.", turned=True),
            Name("transformer.h.{i}.ln_2.", "layers.{i}.mlp_norm."),
            Name("transformer.h.{i}.mlp.c_fc.", "layers.{i}.mlp.up_proj.", turned=True),
            Name("transformer.h.{i}.mlp.c_proj.", "layers.{i}.mlp.down_proj.", turned=True),
            Name("transformer.ln_f.", "norm."),
            Name("lm_head.", "head."),
        ),
        base="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),  # the causal mask
        fixed={"scale_attn_weights": (True,), "add_cross_attention": (False,)},
        ours={
            **PLAIN,
            **NO_NORM,
            "norm": "layernorm",
            "learned_positions": True,
            "mlp_bias": True,
            "attention.rope": "none",
            "attention.qkv_bias": True,
            "attention.o_bias": True,
            "attention.num_kv_heads": 0,
            "attention.head_dim": 0,
            "attention.window_size": 0,
        },
        begins={
            "init_outputs": BY_DEPTH
        },  # GPT-2 (Radford 2019, section 2.3), as their class does it
        inert=(
            "reorder_and_upcast_attn",
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ),  # attention in fp32 is how it is computed here
        older={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
    # Its QK-norm comes after rotary positions, ours before: without parameters that is the same,
    # since to turn a head changes none of its length. With yarn and longrope it is not (their turns
    # are scaled): they are left out.
    "nanochat": Family(
        architecture="NanoChatForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            Key("vocab_size", "vocab_size", 50304),
            Key("initializer_range", "initializer_range", 0.02),
            Key("tie_word_embeddings", "tie_word_embeddings", False),
            Key("hidden_size", "hidden_size", 768),
            Key("num_hidden_layers", "num_hidden_layers", 12),
            Key("num_attention_heads", "attention.num_heads", 6),
            Key("num_key_value_heads", "attention.num_kv_heads", None, null=0),
            Key("intermediate_size", "intermediate_size", 8192),
            Key("max_position_embeddings", "max_position_embeddings", 2048, null=0),
            *(
                replace(key, words=UNSCALED_ROPES) if key.words else key
                for key in ROPE_KEYS
                if not key.when or not {*key.when[1:]} <= {"yarn", "longrope"}
            ),
            Key("hidden_act", "mlp", "relu2", words=ACTIVATIONS),
            Key("rms_norm_eps", "norm_eps", 1e-6),
            Key("rms_norm_eps", "attention.qk_norm_eps", 1e-6),
            Key("final_logit_softcapping", "final_logit_softcapping", 15.0, null=0.0),
            Key("attention_bias", "attention.qkv_bias", False),
            Key("attention_bias", "attention.o_bias", False),
            Key("attention_dropout", "attention.dropout", 0.0, null=0.0),
        ),
        names=(
            Name("model.embed_tokens.", "embed."),
            Name(
                "model.layers.{i}.self_attn.q_proj.",
                "layers.{i}.mixer.q_proj.",
                halves_swapped=True,
            ),
            Name(
                "model.layers.{i}.self_attn.k_proj.",
                "layers.{i}.mixer.k_proj.",
                halves_swapped=True,
            ),
            Name("model.layers.{i}.self_attn.", "layers.{i}.mixer."),
            Name("model.layers.{i}.mlp.fc1.", "layers.{i}.mlp.up_proj."),
            Name("model.layers.{i}.mlp.fc2.", "layers.{i}.mlp.down_proj."),
            Name("lm_head.", "head."),
        ),
        buffers=BUFFERS,
        fixed=LLAMA_FIXED,
        ours={
            **{name: value for name, value in LLAMA.items() if name != "final_logit_softcapping"},
            "norm_affine": False,
            "embed_norm": True,
            "mlp_bias": False,
            "attention.qk_norm": True,
            "attention.head_dim": 0,
            "attention.window_size": 0,
        },
        begins={
            "init_outputs": MIXERS_BY_DEPTH
        },  # as their class does it; nanochat's own code: docs/mixers.md
        older=LLAMA_OLDER,
    ),
}

FAMILIES: dict[str, Family] = {**TRANSFORMERS, **FLA, **OWN_BLOCKS}
READ_SOMEWHERE = frozenset().union(*map(names_of, FAMILIES.values()))
WEIGHTS_OF_OTHER_KINDS = ("quantization_config", "compression_config")


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family that a config.json names, or our own class. Raises SettingsError with the known
    ones."""
    model_type = config.get("model_type")
    if own_config.is_own_export(config):
        return own_config.LONGFIRE
    if model_type not in FAMILIES:
        raise SettingsError(
            f"{where}: model_type = {model_type!r} is none that longfire can read ({', '.join(FAMILIES)}, and longfire's own); "
            "model.backend = 'transformers' trains any other class of transformers as it is"
        )
    return FAMILIES[model_type]


def config_from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The shape that a Hugging Face config.json describes. Raises SettingsError naming a key that
    we cannot express."""
    if own_config.is_own_export(config):
        return own_config.read_model_config(config, where)
    return read_family_config(
        family_of(config, where), config, where, frozenset(ignored_keys(config, where))
    )


def ignored_keys(config: dict[str, Any], where: str) -> list[str]:
    """Flat names of keys that are passed over: the class of transformers does not declare them, and
    here nothing else reads them, or their value asks for nothing; or their kind of rotary positions
    does not use them. Raises SettingsError for a model type that we do not have."""
    family = family_of(config, where)
    if family.package != "transformers":
        return []
    asked, known = asked_of(family, config, where), names_of(family)
    idle = idle_rope_keys(family, asked)
    unread = {
        name: value
        for name, value in asked.items()
        if name not in known and not is_read(name, value)
    }
    if not unread:
        return idle
    from longfire.huggingface.undeclared import undeclared

    return undeclared(config["model_type"], unread, known) + idle


def ignored_line(config: dict[str, Any], where: str) -> list[str]:
    """A line that names the keys of a config.json that are passed over, if there are."""
    names = ignored_keys(config, where) if config.get("model_type") in FAMILIES else []
    return (
        [f"{where}: transformers' class does not use {', '.join(names)}: left out"] if names else []
    )


def is_read(name: str, value: Any) -> bool:
    """Whether a key changes what a model of another family or of ours is, or what its weights
    are."""
    if value in (None, False, 0) or (name == "layer_types" and set(value) <= {"full_attention"}):
        return False
    return name in READ_SOMEWHERE or name in KEYS_OF_OURS or name in WEIGHTS_OF_OTHER_KINDS


def choose_family(model_config: ModelConfig) -> str:
    """The model_type of the first family that can express a shape, else that of our own class."""
    fits = [
        model_type
        for model_type, reasons in refusals_of_families(model_config).items()
        if not reasons
    ]
    return fits[0] if fits else own_config.MODEL_TYPE


def refusals_of_families(model_config: ModelConfig) -> dict[str, list[str]]:
    """Why a shape cannot be one of each family that has one of its mixers; no reason where it
    can."""
    used = {mixer_of(name) for name in model_config.layer_types}
    model_config = whole(model_config)
    return {
        name: list(refusals(family, model_config))
        for name, family in FAMILIES.items()
        if family.mixer in used
    }


def family_named(model_type: str) -> Family:
    """The family that `choose_family` chose."""
    return own_config.LONGFIRE if model_type == own_config.MODEL_TYPE else FAMILIES[model_type]


def class_of_export(model_config: ModelConfig) -> str:
    """The class that an export of a shape is loaded with, and where it is ours, what no other one
    has."""
    family = family_named(choose_family(model_config))
    name = f"{family.architecture} of {family.package}"
    if family is not own_config.LONGFIRE:
        return name
    reasons = refusals_of_families(model_config)
    fewest = min(map(len, reasons.values()), default=0)
    nearest = [f"{name} ({'; '.join(why)})" for name, why in reasons.items() if len(why) == fewest]
    of_what = (
        nearest[0] if nearest else f"none, of {', '.join(dict.fromkeys(model_config.layer_types))}"
    )
    return f"{name}, since no class of transformers or fla has a model of this shape; nearest: {of_what}"


def config_to_hf(
    model_config: ModelConfig,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    length: int = 2048,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The config.json of a shape in the family that can express it, else of our own class: the
    inverse of `config_from_hf`.

    length: written as max_position_embeddings where the shape sets no limit, since their classes
    want a number (the length that the model was trained at).
    """
    assert model_config.vocab_size > 0, (
        "the tokenizer decides an open vocabulary: shape.with_vocabulary(words)"
    )
    model_type = choose_family(model_config)
    # No padding word: their embeddings never train the row of one, and ours would have to be EOS.
    words = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": None}
    written_by = {
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": version("transformers"),
    }
    if model_type == own_config.MODEL_TYPE:
        return {**own_config.config_of(model_config, length), **written_by, **words}
    return {
        **config_of(FAMILIES[model_type], model_type, whole(model_config), length),
        **written_by,
        **words,
    }
