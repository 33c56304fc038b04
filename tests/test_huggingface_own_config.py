"""huggingface/own_config.py: config.json of our own class holds every key, is read strictly, and says which version wrote it."""

import json
from dataclasses import asdict, fields, replace

import any_model
import pytest
from hypothesis import given, settings

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.read_model import read_model_config
from longfire.config.strict import read_own_settings
from longfire.errors import SettingsError
from longfire.huggingface import own_config
from longfire.huggingface.families import choose_family, class_of_export, config_from_hf
from longfire.mixers import MIXERS


def config_of(shape: ModelConfig) -> dict:
    return json.loads(json.dumps(own_config.config_of(shape, 128)))


def in_full(shape: ModelConfig) -> ModelConfig:
    """The shape with every setting of its mixers, defaults too."""
    mixers = {}
    for name in dict.fromkeys(shape.layer_types):
        given = shape.mixers.get(name, {})
        mixers[name] = asdict(
            read_own_settings(MIXERS[mixer_of(name)], name, given, shape.hidden_size)
        )
    return replace(shape, mixers=mixers, pad_vocab_multiple=1)


@settings(max_examples=60, deadline=None)
@given(any_model.shapes())
def test_every_setting_comes_back(shape):
    assert own_config.read_model_config(config_of(shape), "config.json") == in_full(shape)


def test_every_option_of_every_mixer_is_tried_by_the_tests():
    """What is written is the whole dataclass, so a new key cannot be forgotten; that it is tried can."""
    for name, mixer in MIXERS.items():
        tried = {key for choices in any_model.OPTIONS[name] for some in choices for key in some}
        untried = (
            {f.name for f in fields(mixer.Config)} - tried - any_model.MIXER_SETTINGS[name].keys()
        )
        assert not untried, name


def test_what_tools_read_stands_at_the_top(tiny_config):
    shape = tiny_config("gla", "attention", vocab_size=97, tie_word_embeddings=True)
    config = config_of(shape)
    top = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    top |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    top |= {"model_type": "longfire", "architectures": ["LongfireForCausalLM"], "format_version": 1}
    top |= {"tie_word_embeddings": True, "initializer_range": 0.02}
    assert {key: config[key] for key in top} == top
    assert "num_attention_heads" not in config_of(tiny_config("gla", "kda"))
    assert config_of(replace(shape, max_position_embeddings=64))["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c["shape"].update(noise=1),
            r"config.json: unknown key 'noise'.* \(written by longfire 9.0",
        ),
        (
            lambda c: c["shape"]["gla"].update(noise=1),
            r"gla.noise is unknown.*written by longfire 9.0.*install",
        ),
        (
            lambda c: c["shape"].update(layer_types=["hyena", "gla"]),
            "'hyena', which is no mixer of this longfire",
        ),
        (
            lambda c: c.update(format_version=2),
            "format_version = 2, written by longfire 9.0; this longfire .* reads 1",
        ),
        (lambda c: c.pop("format_version"), "format_version = None must be 1"),
        (lambda c: c.update(shape={}), "shape is empty"),
        (lambda c: c.update(shape=[1]), r"shape = \[1\] must be a table"),
        (lambda c: c["shape"].update(vocab_size=9), "shape.vocab_size belongs beside shape"),
        (lambda c: c.pop("hidden_size"), "hidden_size is missing"),
        (lambda c: c.update(hidden_size="32"), "hidden_size = '32' must be a whole number"),
        (lambda c: c["shape"]["gla"].update(num_heads=5), "gla"),
    ],
)
def test_what_this_version_cannot_read_is_named(tiny_config, change, message):
    config = {**config_of(tiny_config("gla", "kda")), "longfire_version": "9.0"}
    change(config)
    with pytest.raises(SettingsError, match=message):
        config_from_hf(config, "config.json")


def test_keys_of_tools_change_nothing(tiny_config):
    shape = tiny_config("gla", "kda")
    config = {
        **config_of(shape),
        "transformers_version": "5.0",
        "use_cache": False,
        "dtype": "bfloat16",
        "_name_or_path": "x",
    }
    assert config_from_hf(config, "") == in_full(shape)


def test_a_run_takes_the_config_of_an_export(tiny_config, tmp_path):
    shape = tiny_config("gla", "kda")
    (tmp_path / "config.json").write_text(json.dumps(config_of(shape)))
    assert read_model_config(tmp_path) == in_full(shape)


def test_a_class_of_another_package_comes_first(tiny_config):
    assert choose_family(tiny_config("attention")) == "llama"
    assert (
        choose_family(
            tiny_config(
                "gla", "attention", mixers={"gla": {"num_heads": 2}, "attention": {"num_heads": 4}}
            )
        )
        == "gla"
    )
    hybrid = tiny_config("gla", "kda")
    assert choose_family(hybrid) == "longfire"
    assert class_of_export(tiny_config("attention")) == "LlamaForCausalLM of transformers"
    reported = class_of_export(hybrid)
    assert (
        reported.startswith(
            "LongfireForCausalLM of longfire, since no class of transformers or fla"
        )
        and "nearest: gla" in reported
    )
