"""Keys of a config.json that transformers' own class ignores are named and passed over; a misspelt one is not taken for such."""

import pytest

from longfire.config.config_file import read_config
from longfire.errors import SettingsError
from longfire.huggingface.families import config_from_hf, ignored_keys, ignored_line

LLAMA = {"model_type": "llama", "num_hidden_layers": 2}
HARMLESS = {
    "model_max_length": 4096,
    "use_flash_attn": True,
    "num_logits_to_keep": 1,
    "layer_types": ["full_attention"] * 2,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "neftune_noise_alpha": 5.0,
    "sliding_window": None,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_that_their_class_ignores_changes_no_shape(key):
    config = {**LLAMA, key: HARMLESS[key]}
    assert config_from_hf(config, "config.json") == config_from_hf(LLAMA, "config.json")


def test_a_key_inside_rope_parameters():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = {**LLAMA, "rope_scaling": {**scaling, "finetuned": True}}
    assert config_from_hf(config, "") == config_from_hf({**LLAMA, "rope_scaling": scaling}, "")
    assert ignored_keys(config, "") == ["rope_parameters.finetuned"]


def test_in_how_many_products_a_matrix_was_multiplied_changes_nothing():
    assert config_from_hf({**LLAMA, "pretraining_tp": 2}, "") == config_from_hf(LLAMA, "")


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_key_value_head", 4),  # a misspelling
        ("hidden_sizes", 64),
        ("rope_thetas", 5e5),  # a misspelling of an older spelling
        ("sliding_window", 64),  # other families have one
        ("final_logit_softcapping", 30.0),
        ("init_outputs", "zeros"),  # keys of longfire's own
        ("norm", "layernorm"),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_key_that_may_mean_something_is_refused(key, value):
    with pytest.raises(SettingsError, match=key):
        config_from_hf({**LLAMA, key: value}, "config.json")


def test_a_misspelling_is_answered_with_the_key_that_it_resembles():
    with pytest.raises(SettingsError, match="did you mean 'rope_theta'"):
        config_from_hf({**LLAMA, "rope_thetas": 5e5}, "config.json")


def test_a_key_of_ours_belongs_into_the_recipe():
    with pytest.raises(SettingsError, match=r"write it under \[model\] of the recipe"):
        config_from_hf({**LLAMA, "block": "parallel"}, "config.json")


def test_they_are_named():
    (line,) = ignored_line({**LLAMA, **HARMLESS}, "here")
    assert "use_flash_attn" in line and "does not use" in line
    assert ignored_line(LLAMA, "here") == []


def test_infinity_is_read_and_nan_is_not(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "mamba2", "dt_limit": [0.0, Infinity]}')
    assert config_from_hf(read_config(file), "") == config_from_hf({"model_type": "mamba2"}, "")
    file.write_text('{"model_type": "mamba2", "norm_eps": NaN}')
    with pytest.raises(SettingsError, match="NaN is no number"):
        read_config(file)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
def test_the_original_length_where_its_kind_of_rotary_positions_has_no_use_for_it(kind):
    scaling = {"rope_type": kind, "factor": 2.0} if kind != "default" else {"rope_type": kind}
    config = {**LLAMA, "rope_scaling": {**scaling, "original_max_position_embeddings": 64}}
    assert config_from_hf(config, "") == config_from_hf({**LLAMA, "rope_scaling": scaling}, "")
    assert ignored_keys(config, "") == ["rope_parameters.original_max_position_embeddings"]
    assert ignored_keys({**LLAMA, "original_max_position_embeddings": 64}, "") == ignored_keys(
        config, ""
    )


def test_a_kind_of_rotary_positions_uses_its_own_keys_alone():
    config = {**LLAMA, "rope_parameters": {"rope_type": "default", "factor": 4.0, "beta_fast": 16}}
    assert config_from_hf(config, "") == config_from_hf(LLAMA, "")
    assert ignored_keys(config, "") == ["rope_parameters.factor", "rope_parameters.beta_fast"]
    with pytest.raises(SettingsError, match="factor = 4.0 means nothing"):  # it was meant to scale
        config_from_hf({**LLAMA, "rope_parameters": {"factor": 4.0}}, "")


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_length_beside_the_scaling(kind):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    scaling = {"rope_type": kind, "factor": 4.0, **more}
    inside = {**LLAMA, "rope_scaling": {**scaling, "original_max_position_embeddings": 512}}
    beside = {**LLAMA, "rope_scaling": scaling, "original_max_position_embeddings": 512}
    shape = config_from_hf(beside, "")
    assert shape == config_from_hf(inside, "")
    assert shape.mixers["attention"]["rope_original_length"] == 512
    both = config_from_hf({**inside, "original_max_position_embeddings": 256}, "")
    assert both.mixers["attention"]["rope_original_length"] == 256, (
        "their classes look outside first"
    )
