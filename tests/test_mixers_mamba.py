"""Mamba and Mamba-2 beside transformers' own classes, whose configs have other keys; for Mamba-2 in groups they are the reference:
fla's way without CUDA gives every group the heads of another."""

import json

import pytest
import torch
import transformers
from test_huggingface_families import compare, loaded

from longfire.mixers.mixer import Cache, Sequence


def theirs_of(model_type: str, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=12,
        tie_word_embeddings=False,
        **changes,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in theirs.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):  # as they begin
            parameter.data += 0.2 * torch.randn_like(parameter)
    return theirs, json.loads(config.to_json_string())


CASES = [
    ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 2, "time_step_limit": (0.01, 0.3)}),
    ("mamba", {"expand": 1, "time_step_rank": 3, "use_bias": True}),
    (
        "mamba2",
        {"num_heads": 4, "head_dim": 16, "n_groups": 4, "use_bias": True, "use_conv_bias": False},
    ),
]


@pytest.mark.parametrize("model_type, changes", CASES)
def test_logits_and_gradients_of_transformers_class(model_type, changes):
    theirs, config = theirs_of(model_type, **changes)
    ids_BT = torch.randint(97, (2, 41))
    out = theirs(ids_BT, labels=ids_BT)
    out.loss.backward()
    parameters = dict(theirs.named_parameters())
    model = loaded(config, {name: p.detach() for name, p in parameters.items()})
    grads = {name: p.grad for name, p in parameters.items()}
    compare(model, config, ids_BT, out.logits.detach(), out.loss.detach(), grads)
    cache, logits = Cache(), []
    for i in range(41):
        positions_BT = torch.full((2, 1), i)
        logits.append(
            model.logits(model(ids_BT[:, i : i + 1], Sequence(positions_BT, cache=cache))).detach()
        )
    assert (torch.cat(logits, 1) - out.logits).abs().max() <= 1e-4 * out.logits.abs().max()
