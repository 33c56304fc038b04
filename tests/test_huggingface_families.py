"""The family tables: their classes' own logits and gradients, both directions of config and names, and what is refused."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from golden import FLA_CASES, read
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.huggingface.check import KL_NATS, kl
from longfire.huggingface.families import (
    FAMILIES,
    choose_family,
    class_of_export,
    config_from_hf,
    config_to_hf,
)
from longfire.huggingface.family_writing import (
    TRAINING_ONLY,
    config_of,
    is_idle,
    left_out,
    normalised,
    refusals,
    values_of,
)
from longfire.huggingface.load import model_of
from longfire.huggingface.tensors import to_ours, to_theirs
from longfire.mixers.mixer import Cache, Sequence
from longfire.model import Model
from longfire.ops.documents import Documents

TRANSFORMERS = [name for name, family in FAMILIES.items() if family.package == "transformers"]


def loaded(config: dict, weights: dict) -> Model:
    """Our model of their config and weights."""
    shape = config_from_hf(config, "config")
    return model_of(shape, {name: t.contiguous() for name, t in ours_of(config, weights).items()})


def ours_of(config: dict, theirs: dict) -> dict:
    return to_ours(FAMILIES[config["model_type"]], config_from_hf(config, "config"), theirs)


def compare(model: Model, config: dict, ids_BT, logits_BTW, loss, grads) -> None:
    """fp32 on both sides, some 20 roundings of 1e-7 in a row: logits within 1e-4 of the largest, gradients within 1e-3."""
    ours_BTW = model.logits(model(ids_BT))
    assert (ours_BTW - logits_BTW).abs().max() <= 1e-4 * logits_BTW.abs().max()
    assert kl(logits_BTW, ours_BTW.detach()) < KL_NATS
    ours = F.cross_entropy(ours_BTW[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    ours.backward()
    theirs = ours_of(config, grads)
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # 1e-7: without rotary positions a bias of the keys shifts all scores alike, and its gradient is rounding only
        assert (parameter.grad - theirs[name]).abs().max() <= 1e-3 * theirs[
            name
        ].abs().max() + 1e-7, name


@pytest.mark.parametrize("case", FLA_CASES)
def test_fla_classes_own_logits_and_gradients(case):
    golden = read(case)
    model = loaded(golden.config, golden.weights)
    compare(model, golden.config, golden.ids_BT, golden.logits_BTW, golden.loss, golden.grads)


def test_golden_files_cover_what_fla_families_have():
    configs = [read(case).config for case in FLA_CASES]
    assert {config["model_type"] for config in configs} == {
        n for n, f in FAMILIES.items() if f.package == "fla"
    }
    for key, values in {
        "use_short_conv": (True, False),
        "num_kv_heads": (None, 1),
        "use_output_gate": (True, False),
    }.items():
        assert all(
            any(c["model_type"] == "gla" and c[key] == value for c in configs) for value in values
        )
    assert any(config.get("attn") for config in configs)


def test_keys_that_flas_classes_do_not_read_change_nothing():
    """RetNet's model does not pass the convolutions of its config to its layers; GLA's gates keys and no values, whatever it says."""
    said = {
        "retnet": {"use_short_conv": True, "conv_size": 3},
        "gla": {"use_gk": False, "use_gv": True},
        "delta_net": {"use_output_norm": False},
        "transformer": {"elementwise_affine": False},
    }
    for model_type, keys in said.items():
        silent = {"model_type": model_type}
        assert config_from_hf({**silent, **keys, "fuse_norm": False}, "") == config_from_hf(
            silent, ""
        )
    assert config_from_hf({"model_type": "retnet"}, "").intermediate_size == 2816, (
        "hidden_ratio is 2 there: 2/3 * 2 * 2048"
    )


def rope(kind: str, **more) -> dict:
    return {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": kind, "factor": 4.0, **more},
    }


ORIGINAL = {"original_max_position_embeddings": 32}
LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0]}
LLAMA3 = {**ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = {
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 9,
}
CASES = {
    "llama, grouped heads": ("llama", {"num_key_value_heads": 2}),
    "llama, own head size, tied": (
        "llama",
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        },
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("llama", rope("linear")),
    "llama, dynamic": ("llama", {**rope("dynamic"), "max_position_embeddings": 16}),
    "llama, llama3": ("llama", rope("llama3", **LLAMA3)),
    "llama, longrope": ("llama", rope("longrope", **ORIGINAL, **LONGROPE)),
    "qwen3, longrope, short": (
        "qwen3",
        {
            "head_dim": 8,
            "num_key_value_heads": 4,
            **rope("longrope", original_max_position_embeddings=64, **LONGROPE),
        },
    ),
    "llama, yarn": ("llama", rope("yarn", **ORIGINAL)),
    "llama, yarn with all of it": (
        "llama",
        rope(
            "yarn",
            **ORIGINAL,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
            mscale=0.7,
            mscale_all_dim=1.3,
        ),
    ),
    "llama, yarn with its factor": ("llama", rope("yarn", **ORIGINAL, attention_factor=1.5)),
    "mistral": ("mistral", {"num_key_value_heads": 1, "sliding_window": 9}),
    "mistral, no window": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "ministral": (
        "ministral",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 9,
            "layer_types": MIXED["layer_types"],
        },
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2, all slide": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2, last layer slides, yarn": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "num_key_value_heads": 2,
            **rope("yarn", **ORIGINAL),
        },
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, layers listed, biases": (
        "qwen3",
        {**MIXED, "head_dim": 8, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "gpt2": ("gpt2", {"n_positions": 64}),
    "gpt2, untied, own width, scores by layer": (
        "gpt2",
        {
            "n_positions": 64,
            "n_inner": 40,
            "tie_word_embeddings": False,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gpt2, exact gelu": ("gpt2", {"n_positions": 64, "activation_function": "gelu"}),
    "llama, gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "nanochat": ("nanochat", {"num_key_value_heads": 2, "pad_token_id": None}),
    "nanochat, biases, another cap, tied, llama3": (
        "nanochat",
        {
            **rope("llama3", **LLAMA3),
            "attention_bias": True,
            "final_logit_softcapping": 2.5,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "pad_token_id": None,
        },
    ),
    "nanochat, no cap": ("nanochat", {"final_logit_softcapping": None, "pad_token_id": None}),
}


def theirs_of(case: str):
    """Their model of a case, with every parameter large enough to matter, and its config as a file holds it."""
    model_type, changes = CASES[case]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {} if model_type == "gpt2" else {"intermediate_size": 48}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=97, **sizes, **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(
        config
    ).eval()  # eval: GPT-2's dropout is off
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return theirs, json.loads(config.to_json_string())


def parameters_of(theirs) -> dict:
    return {name: p.detach() for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_transformers_classes_own_logits_and_gradients(case):
    theirs, config = theirs_of(case)
    ids_BT = torch.randint(0, 97, (2, 41))
    out = theirs(ids_BT, labels=ids_BT)
    out.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    model = loaded(config, parameters_of(theirs))
    compare(model, config, ids_BT, out.logits.detach(), out.loss.detach(), grads)


@pytest.mark.parametrize("case", [case for case in CASES if case != "llama, dynamic"])
@torch.no_grad()
def test_cached_decoding_is_theirs(case):
    """A prompt, then token by token, each side with its own cache. (With dynamic scaling theirs keeps keys turned as they were when
    the text was shorter, ours turns them anew: contract 10.)"""
    theirs, config = theirs_of(case)
    model = loaded(config, parameters_of(theirs))
    ids_BT = torch.randint(0, 97, (1, 30))
    out, cache = None, Cache()
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
        out = theirs(
            ids_BT[:, start:end], use_cache=True, past_key_values=out and out.past_key_values
        )
        got = model.logits(fed(model, ids_BT[:, start:end], cache))
        assert kl(out.logits, got) < KL_NATS, end


def fed(model: Model, ids_BT, cache: Cache):
    positions_BT = torch.arange(cache.length, cache.length + ids_BT.shape[1]).expand_as(ids_BT)
    return model(ids_BT, Sequence(positions_BT, cache=cache))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_packed_documents_are_their_class_on_each_alone(case):
    theirs, config = theirs_of(case)
    model = loaded(config, parameters_of(theirs))
    lengths = [11, 1, 23, 6]
    ids_BT = torch.randint(0, 97, (1, sum(lengths)))
    document_BT = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    positions_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    ours = model.logits(
        model(ids_BT, Sequence(positions_BT, Documents.from_ids(document_BT)))
    ).split(lengths, 1)
    for alone, packed in zip(ids_BT.split(lengths, 1), ours):
        fresh = copy.deepcopy(
            theirs
        )  # their dynamic scaling remembers the longest row that it has seen
        assert kl(fresh(alone).logits, packed) < KL_NATS


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_their_config(case):
    """Their class reads our config as its own, key by key, wherever the family that we choose is the one it came from."""
    _, config = theirs_of(case)
    shape = config_from_hf(config, case)
    family = FAMILIES[config["model_type"]]
    assert not list(refusals(family, normalised(shape)))
    mine = config_of(family, config["model_type"], normalised(shape), 77)
    again = json.loads(transformers.AutoConfig.for_model(**mine).to_json_string())
    ignored = {
        "architectures",
        "head_dim",
        "max_window_layers",
        "layer_types",
        "transformers_version",
        "n_inner",
        "pretraining_tp",
    }
    differ = {
        key
        for key in config.keys() - ignored
        if config[key] != again.get(key) and config[key] is not None
    }
    if "rope_parameters" in differ:  # of optional ones we say the default
        assert config["rope_parameters"].items() <= again["rope_parameters"].items()
    assert differ <= {"rope_parameters"}, {key: (config[key], again.get(key)) for key in differ}
    assert (
        normalised(config_from_hf(again, case))
        == normalised(config_from_hf(mine, case))
        == normalised(shape)
    )


@pytest.mark.parametrize("case", CASES)
def test_names_and_bytes_go_both_ways(case):
    theirs, config = theirs_of(case)
    family, shape, before = (
        FAMILIES[config["model_type"]],
        config_from_hf(config, case),
        parameters_of(theirs),
    )
    after = to_theirs(family, shape, to_ours(family, shape, before))
    assert after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_a_silent_config_means_what_their_class_takes(model_type):
    theirs = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string())
    assert normalised(config_from_hf({"model_type": model_type}, "")) == normalised(
        config_from_hf(theirs, "")
    )


ROPES = [
    {},
    {"rope": "linear", "rope_factor": 2.0},
    {"rope": "dynamic", "rope_factor": 2.0, "rope_original_length": 512},
    {"rope": "yarn", "rope_factor": 4.0, "rope_original_length": 64},
    {
        "rope": "yarn",
        "rope_factor": 4.0,
        "rope_original_length": 64,
        "rope_beta_fast": 8.0,
        "rope_attention_factor": 0.5,
        "rope_mscale": 0.7,
        "rope_mscale_all_dim": 1.1,
        "rope_truncate": False,
    },
    {"rope": "llama3", "rope_factor": 8.0, "rope_original_length": 64, "rope_low_freq_factor": 1.5},
    {"rope": "longrope", "rope_factor": 8.0, "rope_original_length": 64},
]


@some.composite
def attentions(draw) -> dict:
    """Settings of softmax attention that a class of transformers has in every layer."""
    biased = draw(some.booleans())
    return {
        "num_heads": 4,
        "num_kv_heads": draw(some.sampled_from([0, 1, 2, 4])),
        "head_dim": draw(some.sampled_from([0, 8, 24])),
        "rope_theta": draw(some.sampled_from([10000.0, 5e5])),
        "qkv_bias": biased,
        "o_bias": biased,
        "qk_norm": draw(some.booleans()),
        "dropout": draw(some.sampled_from([0.0, 0.1])),
        **draw(some.sampled_from(ROPES)),
    }


@some.composite
def softmax_shapes(draw) -> ModelConfig:
    """Llama, Mistral, Ministral, Qwen2, Qwen3: windows in some layers, all or none."""
    given, types = (
        draw(attentions()),
        draw(
            some.lists(some.sampled_from(["attention", "attention:local"]), min_size=3, max_size=3)
        ),
    )
    slides = "attention:local" in types
    if slides and given["qkv_bias"] and not given["qk_norm"]:
        given |= {"o_bias": False}  # Qwen2; with o_bias there is no class that slides
    mlp_bias = draw(some.booleans()) and not (slides or given["qk_norm"])
    if not slides and not given["qk_norm"] and given["qkv_bias"] and not mlp_bias:
        given |= {"o_bias": draw(some.booleans())}
    if given.get("rope") == "longrope":
        pairs = (given["head_dim"] or 8) // 2
        factors = [draw(some.sampled_from([1.0, 1.25, 4.0])) for _ in range(pairs)]
        given |= {"rope_short_factor": (1.0,) * pairs, "rope_long_factor": tuple(factors)}
    mixers = {"attention": given, "attention:local": {**given, "window_size": 7}}
    limit = 512 if given.get("rope") == "dynamic" else draw(some.sampled_from([0, 512]))
    return model_config_of(
        draw,
        types,
        {name: mixers[name] for name in types},
        mlp_bias=mlp_bias,
        max_position_embeddings=limit,
    )


@some.composite
def gpt2_shapes(draw) -> ModelConfig:
    given = {
        "num_heads": 4,
        "rope": "none",
        "qkv_bias": True,
        "o_bias": True,
        "dropout": draw(some.sampled_from([0.0, 0.1])),
        "scale_by_inverse_layer": draw(some.booleans()),
    }
    return model_config_of(
        draw,
        ["attention"] * 3,
        {"attention": given},
        norm="layernorm",
        mlp="gelu",
        mlp_bias=True,
        learned_positions=True,
        max_position_embeddings=64,
        dropout=draw(some.sampled_from([0.0, 0.2])),
        embed_dropout=draw(some.sampled_from([0.0, 0.3])),
    )


@some.composite
def fla_shapes(draw) -> ModelConfig:
    """fla's families, with softmax layers of up to two kinds."""
    kv_heads = some.sampled_from([0, 1, 2, 4])
    hybrids = {
        f.mixer
        for f in FAMILIES.values()
        if f.package == "fla" and "attention.num_heads" in f.layers.places
    }
    mixer = draw(some.sampled_from(sorted(hybrids - {"mamba"})))  # Samba is below
    yes_or_no, expand = some.booleans(), some.sampled_from([0.5, 1.0, 2.0])
    given = {
        "gla": {
            "num_heads": 4,
            "num_kv_heads": draw(kv_heads),
            "expand_k": draw(some.sampled_from([0.5, 1.0])),
            "expand_v": draw(some.sampled_from([1.0, 2.0])),
            "feature_map": draw(
                some.sampled_from(
                    ["none", "relu", "swish", "sigmoid", "logsigmoid", "gelu", "relu2"]
                )
            ),
            "use_short_conv": draw(yes_or_no),
            "conv_size": draw(some.sampled_from([3, 4])),
            "use_output_gate": draw(yes_or_no),
            "elementwise_affine": draw(yes_or_no),
            "clamp_min": draw(some.sampled_from([None, -0.5, 0.0])),
        },
        "retention": {
            "num_heads": 4,
            "num_kv_heads": draw(kv_heads),
            "expand_k": draw(expand),
            "expand_v": draw(expand),
            "feature_map": draw(
                some.sampled_from(["none", "relu", "swish", "sigmoid", "gelu", "relu2"])
            ),
            "use_output_gate": draw(yes_or_no),
            "elementwise_affine": draw(yes_or_no),
        },
        "linear_attention": {
            "num_heads": 4,
            "num_kv_heads": draw(kv_heads),
            "expand_k": draw(expand),
            "expand_v": draw(expand),
            "feature_map": draw(
                some.sampled_from(
                    ["elementwise_product", "hedgehog", "t2r", "dpfp", "elu", "relu", "none"]
                )
            ),
            **{
                name: draw(yes_or_no)
                for name in (
                    "tie_feature_map_qk",
                    "norm_q",
                    "norm_k",
                    "norm_feature_map",
                    "elementwise_affine",
                )
            },
        },
        "delta_net": {
            "num_heads": 4,
            "expand_k": draw(expand),
            "expand_v": draw(expand),
            "conv_size": draw(some.sampled_from([3, 4])),
            "qk_activation": draw(some.sampled_from(["swish", "relu", "elu", "none"])),
            "qk_norm": draw(some.sampled_from(["l2", "sum"])),
            **{
                name: draw(yes_or_no)
                for name in ("use_beta", "use_gate", "use_short_conv", "allow_neg_eigval")
            },
        },
        "kda": {
            "num_heads": 2,
            "num_v_heads": draw(some.sampled_from([0, 2, 4])),
            "head_dim": draw(some.sampled_from([8, 16])),
            "expand_v": draw(expand),
            "use_short_conv": draw(yes_or_no),
            "conv_size": draw(some.sampled_from([3, 4])),
            "allow_neg_eigval": draw(yes_or_no),
            **draw(
                some.sampled_from(
                    [{}, {"lower_bound": -6.0}, {"lower_bound": -5.0, "safe_gate": True}]
                )
            ),
        },
        "gated_delta_net": {
            "num_heads": 2,
            "num_v_heads": draw(some.sampled_from([0, 2, 4])),
            "head_dim": draw(some.sampled_from([8, 16])),
            "expand_v": draw(some.sampled_from([1.0, 2.0])),
            "use_gate": draw(some.booleans()),
            "output_gate_activation": draw(some.sampled_from(["swish", "sigmoid"])),
            "use_short_conv": draw(some.booleans()),
            "conv_size": draw(some.sampled_from([3, 4])),
            "allow_neg_eigval": draw(some.booleans()),
        },
        "gsa": {
            "num_heads": 4,
            "num_kv_heads": draw(kv_heads),
            "num_slots": draw(some.sampled_from([0, 6, 64])),
            "expand_k": draw(expand),
            "feature_map": draw(some.sampled_from(["swish", "relu", "t2r"])),
            "use_short_conv": draw(yes_or_no),
            "conv_size": draw(some.sampled_from([3, 4])),
            "gate_logit_normalizer": draw(some.sampled_from([8.0, 4.5])),
            "elementwise_affine": draw(yes_or_no),
        },
        "hgrn2": {
            "expand_ratio": draw(some.sampled_from([8, 32])),
            "use_short_conv": draw(some.booleans()),
            "conv_size": draw(some.sampled_from([3, 4])),
            "use_lower_bound": draw(some.booleans()),
            "elementwise_affine": draw(some.booleans()),
        },
        **{
            name: {
                "num_heads": draw(some.sampled_from([2, 4])),
                "num_kv_heads": draw(some.sampled_from([0, 1, 2])),
                "rope_theta": draw(some.sampled_from([10000.0, 5e5])),
                "window_size": draw(some.sampled_from([0, 7])),
                "qkv_bias": draw(some.booleans()),
            }
            for name in ("attention", "attention:local")
        },
    }
    kinds = some.sampled_from([mixer, "attention", "attention:local"])
    types = draw(some.lists(kinds, min_size=3, max_size=3).filter(lambda types: mixer in types))
    limit = draw(some.sampled_from([0, 512]))
    return model_config_of(
        draw, types, {name: given[name] for name in types}, max_position_embeddings=limit
    )


@some.composite
def mamba_shapes(draw) -> ModelConfig:
    """fla's families without MLPs and without hybrids."""
    given = {
        "mamba2": {
            "head_dim": draw(some.sampled_from([4, 8])),
            "state_size": draw(some.sampled_from([8, 128])),
            "expand": draw(some.sampled_from([1, 2])),
            "n_groups": draw(some.sampled_from([1, 2])),
            "conv_kernel": draw(some.sampled_from([3, 4])),
            "use_conv_bias": draw(some.booleans()),
            "use_bias": draw(some.booleans()),
            "dt_low": draw(some.sampled_from([0.0, 0.1])),
            "dt_high": draw(some.sampled_from([0.0, 0.2])),
            "rmsnorm": draw(some.booleans()),
            "norm_before_gate": draw(some.booleans()),
            "D_has_hdim": draw(some.booleans()),
        },
    }
    given["mamba"] = {
        "intermediate_size": draw(some.sampled_from([0, 24, 64])),
        "state_size": draw(some.sampled_from([4, 16])),
        "dt_rank": draw(some.sampled_from([0, 2, 5])),
        "conv_kernel": draw(some.sampled_from([3, 4])),
        "use_conv_bias": draw(some.booleans()),
        "use_bias": draw(some.booleans()),
    }
    mixer = draw(some.sampled_from(sorted(given)))
    fp32 = draw(some.booleans())
    shape = model_config_of(
        draw, [mixer] * 3, {mixer: given[mixer]}, mlp="none", residual_in_fp32=fp32
    )
    if mixer == "mamba2" or draw(some.booleans()):
        return shape
    types = ("mamba", "attention", draw(some.sampled_from(["mamba", "attention"])))  # Samba
    mixers = {
        "mamba": {**given["mamba"], "use_conv_bias": True},
        "attention": {"num_heads": 4, "window_size": 7},
    }
    width = draw(some.sampled_from([0, 512, 768]))
    return replace(
        shape,
        mlp="swiglu",
        layer_types=types,
        mixers=mixers,
        intermediate_size=width,
        residual_in_fp32=False,
    )


@some.composite
def rwkv7_shapes(draw) -> ModelConfig:
    given = {
        "head_dim": draw(some.sampled_from([8, 16])),
        "key_norm_eps": draw(some.sampled_from([1e-6, 1e-24])),
        **{
            f"{name}_low_rank_dim": draw(some.sampled_from([4, 8]))
            for name in ("decay", "a", "v", "gate")
        },
    }
    return model_config_of(
        draw,
        ["rwkv7"] * 3,
        {"rwkv7": given},
        mlp="channel_mix",
        norm="layernorm",
        norm_bias=draw(some.booleans()),
        embed_norm=draw(some.booleans()),
    )


def model_config_of(draw, types: list[str], mixers: dict, **more) -> ModelConfig:
    return ModelConfig(
        hidden_size=32,
        num_hidden_layers=3,
        layer_types=tuple(types),
        mixers=mixers,
        vocab_size=draw(some.integers(1, 999)),
        intermediate_size=draw(some.sampled_from([0, 48])),
        norm_eps=draw(some.sampled_from([1e-5, 1e-6])),
        tie_word_embeddings=draw(some.booleans()),
        initializer_range=draw(some.sampled_from([0.02, 0.006])),
        **more,
    )


ANY_SHAPE = some.one_of(
    softmax_shapes(), gpt2_shapes(), fla_shapes(), mamba_shapes(), rwkv7_shapes()
)


@given(ANY_SHAPE)
@settings(deadline=None, max_examples=40)
def test_ours_to_theirs_and_back(shape):
    assert_goes_both_ways(shape)


@pytest.mark.slow
@given(ANY_SHAPE)
@settings(deadline=None, max_examples=300)
def test_many_of_ours_to_theirs_and_back(shape):
    assert_goes_both_ways(shape)


def assert_goes_both_ways(shape):
    config = json.loads(json.dumps(config_to_hf(shape, bos_id=1, eos_id=2, length=128)))
    back = config_from_hf(config, "config.json")
    limit = (
        shape.max_position_embeddings or 128
    )  # the one thing that is added: their classes want a number
    assert normalised(resting(back)) == normalised(
        replace(resting(shape), max_position_embeddings=limit)
    )
    assert config_to_hf(back, bos_id=1, eos_id=2) == config
    family = FAMILIES[config["model_type"]]
    ours = {name: torch.randn(tensor.shape) for name, tensor in meta_state(shape).items()}
    theirs = to_theirs(family, shape, ours)
    again = to_ours(family, shape, theirs)
    if shape.tie_word_embeddings:
        del ours["head.weight"]
    assert again.keys() == ours.keys()
    assert all(again[name].equal(ours[name]) for name in ours)


def resting(shape: ModelConfig) -> ModelConfig:
    """Without what changes no logits: the one setting here that fla's classes have no key for, and how weights begin, which a
    config says in the name of its class alone."""
    return replace(
        shape,
        init_outputs="published",
        mixers={
            name: {**given, "dropout": 0.0} if mixer_of(name) == "attention" else given
            for name, given in shape.mixers.items()
        },
    )


def meta_state(shape: ModelConfig) -> dict:
    with torch.device("meta"):
        return Model(shape).state_dict()


@pytest.mark.parametrize("case", FLA_CASES)
def test_theirs_to_ours_and_back(case):
    """What we write for a shape that came from fla says the same as fla's own config, key by key."""
    theirs = read(case).config
    shape = config_from_hf(theirs, case)
    mine = config_to_hf(shape, bos_id=theirs["bos_token_id"], eos_id=theirs["eos_token_id"])
    if (
        theirs["model_type"] != mine["model_type"]
    ):  # softmax with a bias and a window is fla's; without, transformers' own
        assert theirs["model_type"] == "transformer" and mine["model_type"] in TRANSFORMERS
    else:
        ignored = {"architectures", "dtype", "torch_dtype", "transformers_version", "pad_token_id"}
        ignored |= {
            key for key in ("num_kv_heads", "num_v_heads") if theirs.get(key) is None
        }  # we say num_heads
        ignored |= {
            "max_position_embeddings",
            *FAMILIES[theirs["model_type"]].older,
        } - theirs.keys()
        differ = {key for key in mine if key not in ignored and mine[key] != theirs.get(key)}
        assert not differ, {key: (mine[key], theirs.get(key)) for key in differ}


def test_every_setting_has_its_place_in_every_family():
    """A setting that a mixer gains must be given a key, or a value that the family is known to have."""
    from conftest import MIXER_SETTINGS

    for model_type, family in FAMILIES.items():
        hybrid = any(name.startswith("attention.") for name in family.layers.places)
        types = (family.mixer, "attention") if hybrid else (family.mixer,)
        shape = ModelConfig(
            32, len(types), types, {name: MIXER_SETTINGS[name] for name in types}, vocab_size=9
        )
        values = values_of(normalised(shape))
        for name in {"attention.rope", "mlp"} & family.ours.keys():
            values[name] = {"": family.ours[name]}
        without = {name for name in values if is_idle(name, values)} | {*TRAINING_ONLY}
        assert values.keys() - without <= family.placed() <= values.keys(), model_type


def test_the_page_lists_every_family():
    page = (Path(__file__).parents[1] / "docs/hugging_face.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.M)[1:] == TRANSFORMERS
    of_fla = re.search(r"^Of fla: (.*?);", page, re.M | re.S)[1]
    assert set(re.findall(r"`(\w+)`", of_fla)) == FAMILIES.keys() - set(TRANSFORMERS)


def test_tables_need_no_torch():
    code = "import sys, longfire.huggingface.families; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"model_type": "gpt_neox"},
            r"'gpt_neox' is none that longfire can read \(llama, mistral, .*gla",
        ),
        ({}, "model_type = None"),
        ({"model_type": "llama", "hidden_act": "tanh"}, "hidden_act = 'tanh'.*'silu' or .* only"),
        (
            {"model_type": "nanochat", **rope("yarn", **ORIGINAL)},
            "rope_type = 'yarn'.*'default' or .* only",
        ),
        (
            {"model_type": "llama", "final_logit_softcapping": 30.0},
            "final_logit_softcapping = 30.0: longfire has no such",
        ),
        (
            {"model_type": "llama", "attention_bias": "yes"},
            "attention_bias = 'yes' must be of type bool",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear"}},
            "rope_parameters.factor is missing",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "longrope", "factor": 2}},
            "short_factor is missing",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"factor": 2}},
            "factor = 2 means nothing with attention.rope = 'default'",
        ),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {"model_type": "llama", "rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is named twice",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters.full_attention",
        ),
        (
            {"model_type": "llama", "sliding_window": 64},
            "sliding_window = 64.*no such setting for llama",
        ),
        (
            {"model_type": "qwen2", "attention_bias": False, "layer_types": ["full_attention"]},
            "layer_types = .* 32 times",
        ),
        (
            {"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "use_sliding_window.*no window",
        ),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "layer_types = .*chunked",
        ),
        (
            {"model_type": "gpt2", "activation_function": "tanh"},
            "activation_function = 'tanh'.*'gelu_new' or .* only",
        ),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention = True"),
        ({"model_type": "llama", "rope_parameters": 7}, "rope_parameters = 7 must be a table"),
        ({"model_type": "llama", "hidden_size": "64"}, "hidden_size = '64' must be of type int"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size = null"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gla", "hidden_act": "powlu"}, "hidden_act = 'powlu'.*'swish' only"),
        ({"model_type": "gla", "feature_map": "elu"}, "feature_map = 'elu'.*None or 'relu' or"),
        ({"model_type": "gla", "attnres_block_size": 4}, "attnres_block_size = 4"),
        ({"model_type": "gsa", "expand_v": 2}, "expand_v = 2.*expand_v = 1 only"),
        ({"model_type": "hgrn2", "expand_ratio": None}, "expand_ratio = null"),
        ({"model_type": "mamba2", "num_heads": 3}, "num_heads = 3 is none"),
        ({"model_type": "mamba2", "dt_limit": [0.1]}, r"dt_limit = \[0.1\] is none"),
        (
            {"model_type": "mamba2", "norm_eps": 1e-5, "layer_norm_epsilon": 1e-6},
            "norm_eps is named twice",
        ),
        ({"model_type": "mamba", "dt_rank": "half"}, "dt_rank = 'half' is none"),
        (
            {"model_type": "mamba", "intermediate_size": "wide"},
            "intermediate_size = 'wide' is none",
        ),
        ({"model_type": "samba", "hidden_ratio": "4"}, "hidden_ratio = '4' is none"),
        ({"model_type": "samba", "hidden_ratio": 1e308}, "hidden_ratio = 1e\\+308 is none"),
        ({"model_type": "rwkv7", "attn": {"layers": [0]}}, "attn = .*attn = None only"),
        ({"model_type": "rwkv7", "hidden_act": "relu"}, "hidden_act = 'relu'.*'sqrelu' only"),
        ({"model_type": "rwkv7", "head_dim": None, "num_heads": 0}, "num_heads = 0 is none"),
        ({"model_type": "gla", "hidden_ratio": 3}, "hidden_ratio = 3"),
        ({"model_type": "gla", "use_short_convs": True}, "use_short_convs = True.*no such setting"),
        (
            {"model_type": "gated_deltanet", "output_gate_activation": "relu"},
            "output_gate_activation = 'relu'.*'swish' or 'sigmoid'",
        ),
        (
            {"model_type": "retnet", "feature_map": "gelu"},
            "feature_map = 'gelu'.*'gelu_pytorch_tanh' only",
        ),
        ({"model_type": "retnet", "hidden_ratio": 4}, "hidden_ratio = 4.*hidden_ratio = 2 only"),
        ({"model_type": "delta_net", "qk_norm": "l1"}, "qk_norm = 'l1'.*'l2' or 'sum' only"),
        (
            {"model_type": "gla", "num_hidden_layers": 2, "attn": {"layers": [2], "num_heads": 2}},
            r"attn.layers = \[2\]",
        ),
        (
            {"model_type": "gla", "attn": {"layers": [1], "num_heads": 2, "sinks": 4}},
            "attn has unknown keys.*sinks",
        ),
        (
            {
                "model_type": "gla",
                "attn": [{"layers": [0], "num_heads": 2}, {"layers": [0], "num_heads": 4}],
            },
            r"\[0\] .*each once",
        ),
        ({"model_type": "gla", "attn": {"layers": [0]}}, "attn: num_heads is missing"),
    ],
)
def test_what_we_cannot_express_is_named(config, message):
    with pytest.raises(SettingsError, match=message):
        config_from_hf(config, "config.json")


QK_NORM_OF_LINEAR_MIXERS = [
    (
        {"layer_types": (mixer,), "mixers": {mixer: {"num_heads": 2, "qk_norm": True}}},
        f"{mixer}.qk_norm = True, it has False only",
    )
    for mixer in ("gla", "gsa", "linear_attention", "retention")
]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_types": ("gla", "gated_delta_net")}, "gla .layer_types has gated_delta_net"),
        ({"layer_types": ("attention",), "norm": "layernorm"}, "norm = 'layernorm'"),
        ({"layer_types": ("gla",), "mlp": "gelu"}, "mlp = 'gelu'"),
        (
            {"layer_types": ("gla",), "mixers": {"gla": {"num_heads": 2, "gate_low_rank": 8}}},
            "gla.gate_low_rank = 8",
        ),
        (
            {
                "layer_types": ("attention",),
                "mixers": {"attention": {"num_heads": 2, "qk_norm_eps": 1e-3, "qk_norm": True}},
            },
            "qk_norm_eps = 0.001",
        ),
        (
            {
                "layer_types": ("attention",),
                "mixers": {"attention": {"num_heads": 2, "o_bias": True}},
            },
            "attention.qkv_bias = False and attention.o_bias = True, which are one attention_bias",
        ),
        (
            {
                "layer_types": ("attention", "attention:local"),
                "mixers": {
                    "attention": {"num_heads": 2, "window_size": 5},
                    "attention:local": {"num_heads": 2, "window_size": 9},
                },
            },
            "attention:2.window_size = 9: its layers have one",
        ),
        (
            {
                "layer_types": ("attention", "attention:b"),
                "mixers": {"attention": {"num_heads": 2}, "attention:b": {"num_heads": 4}},
            },
            "attention.num_heads = 2, attention:2.num_heads = 4: its layers have one",
        ),
        (
            {
                "layer_types": ("gla", "attention"),
                "mixers": {"gla": {"num_heads": 2}, "attention": {"num_heads": 2, "o_bias": True}},
            },
            "attention.o_bias = True, it has False only",
        ),
        ({"layer_types": ("attention",), "block": "parallel"}, "block = 'parallel'"),
        ({"layer_types": ("gla",), "embed_norm": True}, "embed_norm = True"),
        (
            {"layer_types": ("gla",), "final_logit_softcapping": 15.0},
            "final_logit_softcapping = 15.0, it has 0.0 only",
        ),
        (
            {"layer_types": ("attention",), "final_logit_softcapping": 15.0},
            "final_logit_softcapping = 15.0",
        ),
        ({"layer_types": ("attention",), "norm_affine": False}, "norm_affine = False"),
        ({"layer_types": ("attention",), "mlp": "silu"}, "mlp = 'silu'"),
        *QK_NORM_OF_LINEAR_MIXERS,
    ],
)
def test_what_they_cannot_express_is_named(tiny_config, changes, message):
    shape = replace(
        tiny_config("gla", "gated_delta_net", "attention"), num_hidden_layers=6, **changes
    )
    assert choose_family(shape) == "longfire"
    assert re.search(message, class_of_export(shape))


def test_spellings_of_older_files():
    today = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    older = {
        "model_type": "llama",
        "rope_theta": 500000,
        "rope_scaling": None,
        "torch_dtype": "float16",
    }
    assert config_from_hf(older, "") == config_from_hf(today, "")
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    today = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, **scaled}}
    older = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**scaled, "type": "yarn"}}
    silent = {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {"type": "yarn", "factor": 4},
    }  # 2048 positions
    assert config_from_hf(older, "") == config_from_hf(today, "") == config_from_hf(silent, "")
    gpt2 = {
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 64,
        "n_head": 4,
        "task_specific_params": {"x": {}},
    }
    assert config_from_hf(gpt2, "").intermediate_size == 256, (
        "n_inner: four times as wide where nothing is said"
    )
    assert config_from_hf({**gpt2, "hidden_size": 64}, "") == config_from_hf(gpt2, "")
    ratio = {"model_type": "gla", "hidden_ratio": 3, "intermediate_size": 300}
    assert config_from_hf(ratio, "").intermediate_size == 300
    for model_type, key, only in (
        ("transformer", "attention_bias", False),
        ("mamba2", "rms_norm", True),
        ("gsa", "use_rope", False),
    ):
        said = config_from_hf(
            {"model_type": model_type, key: only}, ""
        )  # as flame's own files do, though fla reads neither
        assert said == config_from_hf({"model_type": model_type}, "")
        with pytest.raises(SettingsError, match=key):
            config_from_hf({"model_type": model_type, key: not only}, "")


def test_the_original_length_may_stand_outside_the_table():
    """As in Phi-3's files; their class looks there first when the model is made, whether it declares the key or not."""
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    outside = {
        **sizes,
        "rope_theta": 5e5,
        "rope_scaling": scaled,
        "original_max_position_embeddings": 512,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy(outside)))
    assert theirs.config.rope_parameters["original_max_position_embeddings"] == 512
    ours = config_from_hf({"model_type": "llama", **outside}, "")
    assert ours.mixers["attention"]["rope_original_length"] == 512
    silent = {
        "model_type": "llama",
        "original_max_position_embeddings": 512,
    }  # of no use without scaling
    assert config_from_hf(silent, "") == config_from_hf({"model_type": "llama"}, "")


@pytest.mark.parametrize(
    "mixer, settings, model_type",
    [
        ("attention", {}, "llama"),
        ("attention", {"window_size": 8}, "mistral"),
        ("attention", {"qkv_bias": True}, "qwen2"),
        ("attention", {"qk_norm": True, "window_size": 8}, "qwen3"),
        ("attention", {"qk_norm": True, "qk_norm_eps": 1e-5}, "transformer"),
        ("gla", {}, "gla"),
        ("retention", {}, "retnet"),
        ("linear_attention", {}, "linear_attn"),
        ("delta_net", {}, "delta_net"),
        ("kda", {"head_dim": 8}, "kda"),
        ("gated_delta_net", {"head_dim": 8}, "gated_deltanet"),
    ],
)
def test_the_family_that_most_people_can_load_is_chosen(mixer, settings, model_type):
    assert (
        choose_family(
            ModelConfig(32, 1, (mixer,), {mixer: {"num_heads": 2, **settings}}, vocab_size=9)
        )
        == model_type
    )


def test_what_changes_training_only_is_left_out_and_named():
    shape = ModelConfig(
        32,
        1,
        ("attention",),
        {"attention": {"num_heads": 2, "dropout": 0.1}},
        vocab_size=9,
        dropout=0.2,
    )
    assert choose_family(shape) == "llama"
    assert config_to_hf(shape)["attention_dropout"] == 0.1
    assert left_out(FAMILIES["llama"], shape) == ["dropout = 0.2"]
    begun = replace(shape, dropout=0.0, init_head="zeros", init_embedding=1.0)
    assert choose_family(begun) == "llama"
    assert left_out(FAMILIES["llama"], begun) == ["init_embedding = 1.0", "init_head = 'zeros'"]
    assert left_out(FAMILIES["transformer"], shape) == ["dropout = 0.2", "attention.dropout = 0.1"]


def test_layers_of_several_kinds_keep_their_settings():
    """fla's `attn` may be several tables; ours are then variants of one mixer, numbered as they come."""
    attn = [
        {"layers": [0, 3], "num_heads": 2, "window_size": 8},
        {"layers": [1], "num_heads": 4},
        {"layers": [2], "num_heads": 4},
    ]
    shape = config_from_hf(
        {
            "model_type": "gla",
            "num_hidden_layers": 5,
            "hidden_size": 32,
            "vocab_size": 9,
            "attn": attn,
        },
        "",
    )
    assert shape.layer_types == ("attention", "attention:2", "attention:2", "attention", "gla")
    assert (
        shape.mixers["attention"]["window_size"] == 8
        and shape.mixers["attention:2"]["num_heads"] == 4
    )
    written = config_to_hf(shape)["attn"]
    assert [(table["layers"], table["num_heads"], table["window_size"]) for table in written] == [
        ([0, 3], 2, 8),
        ([1, 2], 4, None),
    ]


AS_PUBLISHED = {
    "GPT-2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "SmolLM2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "Qwen2.5 with yarn": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_configs_as_they_are_published_mean_what_their_class_takes(name):
    published = AS_PUBLISHED[name]
    ours = normalised(config_from_hf(published, name))
    again = json.loads(
        transformers.AutoConfig.for_model(**copy.deepcopy(published)).to_json_string()
    )
    assert normalised(config_from_hf(again, name)) == ours


def test_readers_of_older_configs_find_theta_and_scaling():
    """transformers before 5, llama.cpp's and vLLM's converters read rope_theta, rope_scaling and torch_dtype."""
    config = config_to_hf(
        config_from_hf({"model_type": "llama", **rope("yarn", **ORIGINAL), "rope_theta": 1e4}, "")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e4
    assert config["rope_scaling"]["rope_type"] == config["rope_scaling"]["type"] == "yarn"
    assert config["rope_scaling"]["factor"] == 4.0 and "rope_theta" not in config["rope_scaling"]
    assert config["torch_dtype"] == config["dtype"] and config["transformers_version"]
    plain = config_to_hf(config_from_hf({"model_type": "llama", "rope_theta": 5e5}, ""))
    assert (plain["rope_theta"], plain["rope_scaling"]) == (5e5, None)
