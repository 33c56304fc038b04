"""GPT-2 and nanochat in transformers: their names <-> our names; free of torch. families.py says
how to read it."""

from dataclasses import replace

from longfire.config.init_rules import BY_DEPTH, MIXERS_BY_DEPTH
from longfire.huggingface.families_llama import (
    BUFFERS,
    LLAMA,
    LLAMA_FIXED,
    LLAMA_OLDER,
    NO_NORM,
    PLAIN,
    ROPE_KEYS,
    UNSCALED_ROPES,
)
from longfire.huggingface.family import Family, Key, Name, without

# transformers' names of activations -> our MLPs without a gate. The first of several is written.
ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}


def unscaled_rope_keys() -> tuple[Key, ...]:
    """The keys of rotary positions without yarn and longrope."""
    keys = []
    for key in ROPE_KEYS:
        if key.when and set(key.when[1:]) <= {"yarn", "longrope"}:
            continue
        keys.append(replace(key, choices=UNSCALED_ROPES) if key.choices else key)
    return tuple(keys)


UNSCALED_ROPE_KEYS = unscaled_rope_keys()
WITHOUT_SOFTCAPPING = without(LLAMA, ["final_logit_softcapping"])
GPT_FAMILIES: dict[str, Family] = {
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
                "n_inner",
                "intermediate_size",
                None,
                null=lambda s: 4 * s["hidden_size"],
                kind=int,
            ),
            Key("activation_function", "mlp", "gelu_new", choices=ACTIVATIONS),
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
                (
                    "layers.{i}.mixer.q_proj.",
                    "layers.{i}.mixer.k_proj.",
                    "layers.{i}.mixer.v_proj.",
                ),
                transposed=True,
            ),
            Name("transformer.h.{i}.attn.c_proj.", "layers.{i}.mixer.o_proj.", transposed=True),
            Name("transformer.h.{i}.ln_2.", "layers.{i}.mlp_norm."),
            Name("transformer.h.{i}.mlp.c_fc.", "layers.{i}.mlp.up_proj.", transposed=True),
            Name("transformer.h.{i}.mlp.c_proj.", "layers.{i}.mlp.down_proj.", transposed=True),
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
        initial={
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
            *UNSCALED_ROPE_KEYS,
            Key("hidden_act", "mlp", "relu2", choices=ACTIVATIONS),
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
            **WITHOUT_SOFTCAPPING,
            "norm_affine": False,
            "embed_norm": True,
            "mlp_bias": False,
            "attention.qk_norm": True,
            "attention.head_dim": 0,
            "attention.window_size": 0,
        },
        initial={
            "init_outputs": MIXERS_BY_DEPTH
        },  # as their class does it; nanochat's own code: docs/mixers.md
        older=LLAMA_OLDER,
    ),
}
