"""parallel/tensor_refusals.py: what processes cannot share is refused, with the fix."""

import re

import pytest
import torch
from conftest import tiny_config
from test_parallel_tensor import TOKENS, model_config_of, refused

from longfire.mixers import MIXERS
from longfire.mixers.gla import GLA
from longfire.model import Model
from longfire.parallel.tensor_refusals import refusals


@pytest.mark.parametrize(
    ("mixer", "changes", "seq_len", "message"),
    [
        (
            "attention",
            {"mixers": {"attention": {"num_heads": 12, "num_kv_heads": 3}}, "hidden_size": 48},
            64,
            "must divide the 3 kv_heads of attention.*a divisor of 3, or change num_kv_heads",
        ),
        (
            "gla",
            {"mixers": {"gla": {"num_heads": 4, "num_kv_heads": 2}}},
            64,
            "must divide the 2 kv_heads of gla.*a divisor of 2, or change num_kv_heads",
        ),
        ("hgrn2", {}, 64, "the 2 heads of hgrn2.*change expand_ratio"),
        (
            "mamba",
            {"mixers": {"mamba": {"intermediate_size": 42}}},
            64,
            "the 42 channels of mamba.*intermediate_size",
        ),
        ("mamba2", {}, 64, "the 2 groups of mamba2.*n_groups"),
        (
            "rwkv7",
            {"intermediate_size": 42},
            64,
            "the 42 channels of mlp channel_mix.key.weight; change their number",
        ),
        ("rwkv7", {}, 70, "training.seq_len = 70.*sequence_parallel to false"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_number_and_mend(mixer, changes, seq_len, message):
    said = refused(tiny_config(mixer, **changes), 4, seq_len)
    assert re.search(message, said) and "parallelism.tensor_parallel_degree = 4" in said, said


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_can_be_shared_is_not_refused(mixer):
    assert refused(model_config_of(mixer), 4) == ""


def test_a_mixer_that_does_not_say_how_it_is_split_is_refused():
    with torch.device("meta"):
        model = Model(model_config_of("gla"))
    model.layers[0].mixer.stray = torch.nn.Parameter(torch.empty(4))
    assert "gla does not say how stray is split (roles); set it to 1" in "\n".join(
        refusals(model, 2, True, TOKENS)
    )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"divided": {}}, "which of its attributes count heads"),
        ({"roles": {**GLA.roles, "q_proj": "colum"}}, "known where it says colum "),
        ({"roles": {**GLA.roles, "o_proj": "column"}}, "which matrix ends it"),
    ],
)
def test_a_mixer_that_leaves_open_how_it_is_shared_is_refused(attributes, message, monkeypatch):
    for name, value in attributes.items():
        monkeypatch.setattr(GLA, name, value)
    said = refused(model_config_of("gla"), 2)
    assert message in said and "set it to 1" in said, said
