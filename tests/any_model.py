"""Shapes of models as a user may write them: any mixers side by side, any options of each, any blocks around them."""

from typing import Any

from conftest import MIXER_SETTINGS
from hypothesis import strategies as some

from longfire.config.model_config import ModelConfig
from longfire.config.strict import read_own_settings
from longfire.errors import SettingsError
from longfire.mixers import MIXERS
from longfire.mlps import MLPS

HIDDEN = 32
YES = (False, True)
CONVOLUTION = [{}, {"use_short_conv": True, "conv_size": 3}, {"use_short_conv": False}]
ROPES = [
    {},
    {"rope": "none"},
    {"rope_theta": 500.0},
    {"rotary_fraction": 0.5},
    {"rope": "linear", "rope_factor": 2.0},
    {"rope": "dynamic", "rope_factor": 2.0, "rope_original_length": 64},
    {
        "rope": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 16,
        "rope_beta_fast": 8.0,
        "rope_beta_slow": 0.5,
        "rope_mscale": 0.7,
        "rope_mscale_all_dim": 0.9,
    },
    {
        "rope": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 16,
        "rope_truncate": False,
        "rope_attention_factor": 1.2,
    },
    {
        "rope": "llama3",
        "rope_factor": 4.0,
        "rope_original_length": 32,
        "rope_low_freq_factor": 1.5,
        "rope_high_freq_factor": 3.0,
    },
    {
        "rope": "longrope",
        "head_dim": 12,
        "rope_factor": 4.0,
        "rope_original_length": 32,
        "rope_short_factor": (1.0, 1.0, 1.1, 1.2, 1.3, 1.5),
        "rope_long_factor": (1.0, 1.5, 2.0, 3.0, 4.0, 4.0),
    },
]
# Of each mixer: options of which one entry each is taken, over the settings of conftest.py.
OPTIONS: dict[str, list[list[dict[str, Any]]]] = {
    "attention": [
        ROPES,
        [{}, {"num_kv_heads": 1}, {"num_kv_heads": 0}],
        [{}, {"head_dim": 12}],
        [{}, {"window_size": 5}],
        [{}, {"qkv_bias": True}],
        [{}, {"o_bias": True}],
        [{}, {"qk_norm": True}, {"qk_norm": True, "qk_norm_eps": 1e-3}],
        [{}, {"dropout": 0.1}],
        [{}, {"scale_by_inverse_layer": True}],
    ],
    "linear_attention": [
        [
            {"feature_map": name}
            for name in ("elementwise_product", "hedgehog", "t2r", "dpfp", "elu", "relu", "none")
        ],
        [{}, {"num_kv_heads": 1}],
        [{}, {"expand_k": 0.5}, {"expand_v": 2.0}],
        [{"tie_feature_map_qk": value} for value in YES],
        [{"norm_q": value} for value in YES],
        [{"norm_k": value} for value in YES],
        [{"norm_feature_map": value} for value in YES],
        [{"elementwise_affine": value} for value in YES],
        [{"qk_norm": value} for value in YES],
    ],
    "retention": [
        [{"elementwise_affine": value} for value in YES],
        [{}, {"expand_k": 0.5}],
        [{}, {"num_kv_heads": 1}],
        [{"expand_v": 1.0}, {}],
        [{"feature_map": name} for name in ("none", "relu", "swish")],
        [{"use_output_gate": value} for value in YES],
        [{"gate_fn": name} for name in ("swish", "sigmoid")],
        [{"qk_norm": value} for value in YES],
    ],
    "gla": [
        [{"elementwise_affine": value} for value in YES],
        CONVOLUTION,
        [{}, {"num_kv_heads": 1}],
        [{}, {"expand_k": 1.0}, {"expand_v": 2.0}],
        [{"feature_map": name} for name in ("none", "relu", "gelu")],
        [{}, {"clamp_min": -0.5}],
        [{"use_output_gate": value} for value in YES],
        [{"gate_fn": name} for name in ("swish", "sigmoid")],
        [{}, {"gate_logit_normalizer": 4.0, "gate_low_rank": 5}],
        [{"qk_norm": value} for value in YES],
    ],
    "gsa": [
        CONVOLUTION,
        [{"feature_map": name} for name in ("swish", "relu", "t2r")],
        [{}, {"num_slots": 0}],
        [{"elementwise_affine": value} for value in YES],
        [{"qk_norm": value} for value in YES],
        [{}, {"expand_k": 0.5}],
        [{}, {"gate_logit_normalizer": 4.0}],
    ],
    "hgrn2": [
        CONVOLUTION,
        [{"elementwise_affine": value} for value in YES],
        [{"use_lower_bound": value} for value in YES],
        [{}, {"expand_ratio": 8}],
    ],
    "mamba": [
        [{}, {"intermediate_size": 48}],
        [{"use_conv_bias": value} for value in YES],
        [{"use_bias": value} for value in YES],
        [{}, {"conv_kernel": 3}],
    ],
    "mamba2": [
        [{}, {"conv_kernel": 3}],
        [{"use_bias": value} for value in YES],
        [{}, {"expand": 1}],
        [{"use_conv_bias": value} for value in YES],
        [{"rmsnorm": value} for value in YES],
        [{"norm_before_gate": value} for value in YES],
        [{"D_has_hdim": value} for value in YES],
        [{}, {"dt_low": 0.01, "dt_high": 0.5}],
    ],
    "delta_net": [
        [{}, {"expand_k": 0.5}, {"expand_v": 2.0}],
        CONVOLUTION,
        [{"qk_activation": name} for name in ("swish", "relu", "elu", "none")],
        [{"qk_norm": name} for name in ("l2", "sum")],
        [{"use_gate": value} for value in YES],
        [{"use_beta": value} for value in YES],
        [{"allow_neg_eigval": value} for value in YES],
    ],
    "gated_delta_net": [
        [{}, {"expand_v": 1.0}],
        CONVOLUTION,
        [{}, {"num_v_heads": 4}],
        [{"use_gate": value} for value in YES],
        [{"output_gate_activation": name} for name in ("swish", "sigmoid")],
        [{"allow_neg_eigval": value} for value in YES],
    ],
    "kda": [
        CONVOLUTION,
        [{}, {"num_v_heads": 4}],
        [{}, {"expand_v": 2.0}],
        [{}, {"allow_neg_eigval": True}],
        [{}, {"lower_bound": -5.0, "safe_gate": True}],
    ],
    "rwkv7": [[{}, {"head_dim": 16}], [{}, {"key_norm_eps": 1e-3}]],
}
BLOCKS: list[list[dict[str, Any]]] = [
    [{"mlp": name} for name in (*MLPS, "none")],
    [
        {},
        {"norm": "layernorm"},
        {"norm": "layernorm", "norm_bias": False},
        {"norm_affine": False},
        {"norm_eps": 1e-3},
    ],
    [{"block": name} for name in ("pre", "post", "parallel", "parallel_tied")],
    [{}, {"mlp_bias": True}],
    [{}, {"embed_norm": True}],
    [
        {},
        {"learned_positions": True, "max_position_embeddings": 96},
        {"max_position_embeddings": 512},
    ],
    [{}, {"tie_word_embeddings": True}],
    [{}, {"final_logit_softcapping": 3.0}],
    [{}, {"residual_in_fp32": True}],
    [{}, {"dropout": 0.1, "embed_dropout": 0.2}],
    [{}, {"init_outputs": "zeros"}, {"init_matrices": "fan_in", "init_embedding": 0.5}],
    [{}, {"pad_vocab_multiple": 64}],
]


@some.composite
def shapes(draw: some.DrawFn, names: tuple[str, ...] = tuple(MIXERS)) -> ModelConfig:
    """A model of up to three layers, of which two may have one mixer with other settings each."""
    kinds = draw(some.lists(some.sampled_from(names), min_size=1, max_size=3))
    types, mixers = [], {}
    for number, kind in enumerate(kinds):
        name = kind if kind not in types else f"{kind}:{number}"
        types.append(name)
        mixers[name] = draw(settings_of(kind))
    around = {
        key: value for choices in BLOCKS for key, value in draw(some.sampled_from(choices)).items()
    }
    if around["mlp"] in ("none", "channel_mix"):
        around["mlp_bias"] = False
    if around["mlp"] == "none" and around["block"].startswith("parallel"):
        around["block"] = "pre"
    shape = ModelConfig(
        HIDDEN, len(types), tuple(types), mixers, vocab_size=97, intermediate_size=48, **around
    )
    return shape.with_vocabulary(97)


@some.composite
def settings_of(draw: some.DrawFn, mixer: str) -> dict[str, Any]:
    """Settings of a mixer: as conftest.py has them, with as many options as go together."""
    given = dict(MIXER_SETTINGS[mixer])
    for choices in OPTIONS[mixer]:
        tried = {**given, **draw(some.sampled_from(choices))}
        try:
            read_own_settings(MIXERS[mixer], mixer, tried, HIDDEN)
        except SettingsError:  # options that exclude each other
            continue
        given = tried
    return given
