"""The family tables: their classes' own logits and gradients, both directions of config and names, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from golden import FLA_CASES, read
from hypothesis import given, settings
from hypothesis import strategies as some

from longfire.errors import SettingsError
from longfire.hub.families import FAMILIES, choose_family, config_from_shape, settings_of, shape_from_config, whole
from longfire.mixers import MIXERS
from longfire.model import Model
from longfire.shape import ModelShape

TRANSFORMERS = [name for name, family in FAMILIES.items() if family.package == "transformers"]


def loaded(config: dict, weights: dict) -> Model:
    """Our model of their config and weights."""
    family, shape = FAMILIES[config["model_type"]], shape_from_config(config, "config")
    ours = {family.to_ours(name): tensor for name, tensor in weights.items()}
    if shape.tie_word_embeddings:
        ours["head.weight"] = ours["embed.weight"]
    model = Model(shape)
    model.load_state_dict(ours)
    return model


def compare(model: Model, config: dict, ids_BT, logits_BTW, loss, grads) -> None:
    """fp32 on both sides, some 20 roundings of 1e-7 in a row: logits within 1e-4 of the largest, gradients within 1e-3."""
    ours_BTW = model.logits(model(ids_BT))
    assert (ours_BTW - logits_BTW).abs().max() <= 1e-4 * logits_BTW.abs().max()
    ours = F.cross_entropy(ours_BTW[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    ours.backward()
    theirs = {FAMILIES[config["model_type"]].to_ours(name): grad for name, grad in grads.items()}
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - theirs[name]).abs().max() <= 1e-3 * theirs[name].abs().max(), name


@pytest.mark.parametrize("case", FLA_CASES)
def test_fla_classes_own_logits_and_gradients(case):
    golden = read(case)
    model = loaded(golden.config, golden.weights)
    compare(model, golden.config, golden.ids_BT, golden.logits_BTW, golden.loss, golden.grads)


def test_golden_files_cover_what_fla_families_have():
    configs = [read(case).config for case in FLA_CASES]
    assert {config["model_type"] for config in configs} == {n for n, f in FAMILIES.items() if f.package == "fla"}
    for key, values in {
        "use_short_conv": (True, False),
        "num_kv_heads": (None, 1),
        "use_output_gate": (True, False),
    }.items():
        assert all(any(c["model_type"] == "gla" and c[key] == value for c in configs) for value in values)
    assert any(config.get("attn") for config in configs)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 9}),
    ],
)  # fmt: skip
def test_transformers_classes_own_logits_and_gradients(model_type, changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=97, num_attention_heads=4, **changes
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ids_BT = torch.randint(0, 97, (2, 41))
    out = theirs(ids_BT, labels=ids_BT)
    out.loss.backward()
    parameters = dict(theirs.named_parameters())
    grads = {name: p.grad for name, p in parameters.items()}
    saved = json.loads(config.to_json_string())
    model = loaded(saved, {name: p.detach() for name, p in parameters.items()})
    compare(model, saved, ids_BT, out.logits.detach(), out.loss.detach(), grads)


@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_a_silent_config_means_what_their_class_takes(model_type):
    theirs = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string())
    assert whole(shape_from_config({"model_type": model_type}, "")) == whole(shape_from_config(theirs, ""))


@some.composite
def shapes(draw) -> ModelShape:
    """Shapes that some family can express, every setting of the tables drawn."""
    mixer = draw(some.sampled_from(sorted(MIXERS)))
    kv_heads = some.sampled_from([0, 1, 2, 4])
    given = {
        "attention": {
            "num_heads": 4,
            "num_kv_heads": draw(kv_heads),
            "rope_theta": draw(some.sampled_from([10000.0, 5e5])),
            "window_size": draw(some.sampled_from([0, 7])),
            "qkv_bias": draw(some.booleans()),
        },
        "gla": {
            "num_heads": 4,
            "num_kv_heads": draw(kv_heads),
            "expand_k": draw(some.sampled_from([0.5, 1.0])),
            "expand_v": draw(some.sampled_from([1.0, 2.0])),
            "feature_map": draw(some.sampled_from(["none", "relu", "swish"])),
            "use_short_conv": draw(some.booleans()),
            "conv_size": draw(some.sampled_from([3, 4])),
            "use_output_gate": draw(some.booleans()),
            "clamp_min": draw(some.sampled_from([None, -0.5, 0.0])),
        },
        "gated_delta_net": {
            "num_heads": 2,
            "num_v_heads": draw(some.sampled_from([0, 2, 4])),
            "head_dim": draw(some.sampled_from([8, 16])),
            "expand_v": draw(some.sampled_from([1.0, 2.0])),
            "use_gate": draw(some.booleans()),
            "use_short_conv": draw(some.booleans()),
            "conv_size": draw(some.sampled_from([3, 4])),
            "allow_neg_eigval": draw(some.booleans()),
        },
    }
    if mixer == "attention" and not given["attention"]["qkv_bias"]:
        given["attention"]["head_dim"] = draw(some.sampled_from([0, 8, 24]))
    types = draw(
        some.lists(some.sampled_from([mixer, "attention"]), min_size=3, max_size=3).filter(lambda t: mixer in t)
    )
    return ModelShape(
        hidden_size=32,
        num_hidden_layers=3,
        layer_types=tuple(types),
        mixers={name: given[name] for name in types},
        vocab_size=draw(some.integers(1, 999)),
        intermediate_size=draw(some.sampled_from([0, 48])),
        norm_eps=draw(some.sampled_from([1e-5, 1e-6])),
        tie_word_embeddings=draw(some.booleans()),
        initializer_range=draw(some.sampled_from([0.02, 0.006])),
        max_position_embeddings=draw(some.sampled_from([0, 512])),
    )


@given(shapes())
@settings(deadline=None, max_examples=200)
def test_ours_to_theirs_and_back(shape):
    config = json.loads(json.dumps(config_from_shape(shape, bos_id=1, eos_id=2, length=128)))
    back = shape_from_config(config, "config.json")
    limit = shape.max_position_embeddings or 128  # the one thing that is added: their classes want a number
    assert whole(back) == whole(replace(shape, max_position_embeddings=limit))
    assert config_from_shape(back, bos_id=1, eos_id=2) == config
    family = FAMILIES[config["model_type"]]
    with torch.device("meta"):
        ours = list(Model(shape).state_dict())
    theirs = [family.to_theirs(name) for name in ours]
    assert None not in theirs and len(set(theirs)) == len(theirs)
    assert [family.to_ours(name) for name in theirs] == ours


@pytest.mark.parametrize("case", FLA_CASES)
def test_theirs_to_ours_and_back(case):
    """What we write for a shape that came from fla says the same as fla's own config, key by key."""
    theirs = read(case).config
    shape = shape_from_config(theirs, case)
    mine = config_from_shape(shape, bos_id=theirs["bos_token_id"], eos_id=theirs["eos_token_id"])
    if (
        theirs["model_type"] != mine["model_type"]
    ):  # softmax with a bias and a window is fla's; without, transformers' own
        assert theirs["model_type"] == "transformer" and mine["model_type"] in TRANSFORMERS
    else:
        ignored = {"architectures", "dtype", "pad_token_id"}
        ignored |= {key for key in ("num_kv_heads", "num_v_heads") if theirs.get(key) is None}  # we say num_heads
        differ = {key for key in mine if key not in ignored and mine[key] != theirs.get(key)}
        assert not differ, {key: (mine[key], theirs.get(key)) for key in differ}


def test_every_setting_has_its_place_in_every_family():
    """A setting that a mixer gains must be given a key, or a value that the family is known to have."""
    examples = {
        "attention": {"num_heads": 2},
        "gla": {"num_heads": 2},
        "gated_delta_net": {"num_heads": 2, "head_dim": 8},
    }
    for model_type, family in FAMILIES.items():
        types = (family.mixer, "attention") if family.attn else (family.mixer,)
        shape = ModelShape(32, len(types), types, {name: examples[name] for name in types}, vocab_size=9)
        placed = {key.ours for key in (*family.keys, *family.attn)} | family.ours.keys()
        assert settings_of(whole(shape)).keys() == placed, model_type


def test_tables_need_no_torch():
    code = "import sys, longfire.hub.families; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "gpt_neox"}, r"'gpt_neox' is none that longfire can read \(llama, mistral, .*gla"),
        ({}, "model_type = None"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu' only"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = .*no such setting"),
        ({"model_type": "llama", "rope_parameters": 7}, "rope_parameters = 7 must be a table"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type = 'yarn'"),
        ({"model_type": "llama", "hidden_size": "64"}, "hidden_size = '64' must be of type int"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size = null"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gla", "elementwise_affine": False}, "elementwise_affine = False"),
        ({"model_type": "gla", "fuse_norm": False}, "fuse_norm = False"),
        ({"model_type": "gla", "attnres_block_size": 4}, "attnres_block_size = 4"),
        ({"model_type": "gla", "hidden_ratio": 3}, "hidden_ratio = 3"),
        ({"model_type": "gla", "use_short_convs": True}, "use_short_convs = True.*no such setting"),
        ({"model_type": "gated_deltanet", "output_gate_activation": "sigmoid"}, "output_gate_activation = 'sigmoid'"),
        ({"model_type": "transformer", "qk_norm": True}, "qk_norm = True"),
        ({"model_type": "gla", "num_hidden_layers": 2, "attn": {"layers": [2], "num_heads": 2}}, r"attn.layers = \[2\]"),
        ({"model_type": "gla", "attn": {"layers": [1], "num_heads": 2, "sinks": 4}}, "attn has unknown keys.*sinks"),
        ({"model_type": "gla", "attn": [{"layers": [0], "num_heads": 2}, {"layers": [1], "num_heads": 4}]}, "different settings"),
    ],
)  # fmt: skip
def test_what_we_cannot_express_is_named(config, message):
    with pytest.raises(SettingsError, match=message):
        shape_from_config(config, "config.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer_types": ("gla", "gated_delta_net")}, "gla .layer_types has gated_delta_net"),
        ({"layer_types": ("attention",), "norm": "layernorm"}, "norm = 'layernorm'"),
        ({"layer_types": ("gla",), "mlp": "gelu"}, "mlp = 'gelu'"),
        ({"layer_types": ("gla",), "mixers": {"gla": {"num_heads": 2, "gate_low_rank": 8}}}, "gla.gate_low_rank = 8"),
        ({"layer_types": ("attention",), "mixers": {"attention": {"num_heads": 2, "qk_norm": True}}}, "qk_norm = True"),
    ],
)
def test_what_they_cannot_express_is_named(tiny_shape, changes, message):
    with pytest.raises(SettingsError, match=message):
        config_from_shape(replace(tiny_shape("gla", "gated_delta_net", "attention"), num_hidden_layers=6, **changes))


def test_spellings_of_older_files():
    today = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    older = {"model_type": "llama", "rope_theta": 500000, "rope_scaling": None, "torch_dtype": "float16"}
    assert shape_from_config(older, "") == shape_from_config(today, "")
    ratio = {"model_type": "gla", "hidden_ratio": 3, "intermediate_size": 300}
    assert shape_from_config(ratio, "").intermediate_size == 300


@pytest.mark.parametrize(
    "mixer, settings, model_type",
    [
        ("attention", {}, "llama"),
        ("attention", {"window_size": 8}, "mistral"),
        ("attention", {"window_size": 8, "qkv_bias": True}, "transformer"),
        ("gla", {}, "gla"),
        ("gated_delta_net", {"head_dim": 8}, "gated_deltanet"),
    ],
)
def test_the_family_that_most_people_can_load_is_chosen(mixer, settings, model_type):
    assert choose_family(ModelShape(32, 1, (mixer,), {mixer: {"num_heads": 2, **settings}}, vocab_size=9)) == model_type
