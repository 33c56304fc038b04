"""shape.py: what a config.json may say, and which errors a wrong one gives."""

import json

import pytest

from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig
from longfire.config.own_keys import read_own_keys
from longfire.errors import SettingsError
from longfire.mlps import MLPS

MIXERS = ("attention", "gla")
NAMES = (MIXERS, tuple(MLPS))
GOOD = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "layer_types": ["gla", "attention"],
    "gla": {"num_heads": 2},
}


def test_a_pattern_of_layer_types_repeats():
    shape = read_own_keys(GOOD, "x.json", *NAMES)
    assert shape.layer_types == ("gla", "attention", "gla", "attention")
    assert shape.mixers == {"gla": {"num_heads": 2}}


def test_the_default_mlp_width_is_flas():
    # fla: int(hidden * 4 * 2 / 3) rounded up to a multiple of 256; gla-340M: hidden 1024 -> 2816
    assert ModelConfig(1024, 2, ("gla",)).intermediate_size == 2816


def test_to_dict_and_back():
    shape = read_own_keys(GOOD, "x.json", *NAMES)
    assert read_own_keys(json.loads(json.dumps(shape.to_dict())), "x.json", *NAMES) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "x.json: unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"layer_types": ["gla"] * 3}, "3 entries, which do not divide num_hidden_layers = 4"),
        ({"mlp": "elu"}, "mlp = 'elu' is not one of swiglu, geglu"),
        (
            {"init_matrices": "xavier"},
            "init_matrices = 'xavier' is not one of published, initializer_range",
        ),
        (
            {"init_embedding": -1.0},
            "init_embedding = -1.0 must be a standard deviation above 0, or 'zeros'",
        ),
        (
            {"init_matrices": "zeros"},
            "init_matrices = 'zeros', but an MLP or a recurrence is a product",
        ),
        ({"init_outputs": 0}, "init_outputs = 0 must be a standard deviation above 0, or 'zeros'"),
        ({"init_head": True}, "init_head = True must be a number or the name of a rule"),
        ({"init_head": None}, "init_head = None must be a number or the name of a rule"),
        (
            {"init_head": "zeros", "tie_word_embeddings": True},
            "the head is the embedding; remove init_head",
        ),
        (
            {"final_logit_softcapping": -15.0},
            "final_logit_softcapping = -15.0 must be a cap above 0",
        ),
        ({"final_logit_softcapping": None}, "final_logit_softcapping = None must be a number"),
        ({"hidden_size": 0}, "must all be positive"),
        ({"hidden_size": "32"}, "x.json: hidden_size = '32' must be a whole number"),
        ({"hidden_size": 32.0}, "hidden_size = 32.0 must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be a whole number"),
        ({"intermediate_size": -4}, "intermediate_size = -4 must be 0 or more"),
        ({"layer_types": "gla"}, "layer_types = 'gla' must be a list of names"),
        ({"norm_eps": "1e-6"}, "norm_eps = '1e-6' must be a number"),
        ({"norm_eps": True}, "norm_eps = True must be a number"),
        ({"norm_eps": -1e-6}, "norm_eps = -1e-06 must be at least 0"),
        ({"norm_eps": float("nan")}, "norm_eps = nan must be a finite number"),
        (
            {"initializer_range": -0.02},
            "initializer_range = -0.02 must be a standard deviation above 0",
        ),
        ({"init_matrices": float("inf")}, "init_matrices = inf must be a finite number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' must be true or false"),
    ],
)
def test_a_wrong_shape_names_key_value_and_fix(change, message):
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        read_own_keys({**GOOD, **change}, "x.json", *NAMES)


def test_a_missing_key_is_named():
    with pytest.raises(SettingsError, match="x.json: layer_types missing"):
        read_own_keys({k: v for k, v in GOOD.items() if k != "layer_types"}, "x.json", *NAMES)


def test_the_vocabulary_comes_from_the_tokenizer_unless_the_config_has_more_words():
    open_shape = read_own_keys(GOOD, "x.json", *NAMES)
    assert open_shape.with_vocabulary(300).vocab_size == 300
    padded = read_own_keys({**GOOD, "vocab_size": 512}, "x.json", *NAMES)
    assert padded.with_vocabulary(300).vocab_size == 512
    with pytest.raises(SettingsError, match="smaller than the tokenizer's 600 words"):
        padded.with_vocabulary(600)


def test_a_whole_number_will_do_for_a_number():
    assert read_own_keys({**GOOD, "norm_eps": 1}, "x.json", *NAMES).norm_eps == 1


def test_read_config_names_the_file(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(SettingsError, match="list.json: it must be an object, not a list"):
        read_config(tmp_path / "list.json")
    with pytest.raises(SettingsError, match="no such file"):
        read_config(tmp_path / "none.json")
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(SettingsError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)


def test_a_tied_config_that_was_written_before_published_was_the_default_is_read():
    # its init_* keys name the default of then; a run with this config.json goes on
    written = dict.fromkeys(
        ("init_matrices", "init_outputs", "init_embedding", "init_head"), "initializer_range"
    )
    read_own_keys({**GOOD, **written, "tie_word_embeddings": True}, "x.json", *NAMES)
    read_own_keys(
        {**GOOD, "init_embedding": 0.5, "init_head": 0.5, "tie_word_embeddings": True},
        "x.json",
        *NAMES,
    )
