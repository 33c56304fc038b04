"""compiling.py: what decides whether to compile, by what it costs; a rate that is measured on the model's own layers."""

import pytest
import torch
from test_training_loop import composed

from longfire.training import compiling
from longfire.training.compiling import compile_decision, eager_rate, sample_of

CPU = torch.device("cpu")
FORWARD_FLOPS = 2e7  # of a token


def not_asked() -> float:
    raise AssertionError("nothing needs to be measured")


@pytest.fixture(autouse=True)
def a_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "cxx_compiler", lambda: "/usr/bin/c++")


@pytest.mark.parametrize("flops_per_second, compiled", [(1e10, True), (1e12, False)])
def test_a_run_of_minutes_is_decided_by_a_trial(flops_per_second, compiled):
    """1,500 steps of 2,048 tokens at 60 MFLOP: 5 h or 3 min."""
    run = composed(training__compile="auto", training__steps="1500")
    decided, why = compile_decision(run, FORWARD_FLOPS, CPU, lambda: flops_per_second)
    assert decided is compiled
    assert ("more than 10 min" in why) if compiled else ("too short" in why and "by a trial" in why)


def test_what_is_plain_needs_no_trial():
    for changes, expected in (
        ({"training__steps": "4"}, False),
        ({"training__steps": "1000000000"}, True),
        ({"training__steps": "1500", "training__max_seconds": "300"}, False),
        ({"training__compile": "on"}, True),
        ({"training__compile": "off"}, False),
    ):
        run = composed(**{"training__compile": "auto", **changes})
        assert compile_decision(run, FORWARD_FLOPS, CPU, not_asked)[0] is expected, changes


def test_without_a_compiler_the_run_goes_on_eager_and_says_so(monkeypatch):
    monkeypatch.setattr(compiling, "cxx_compiler", lambda: None)
    compiled, why = compile_decision(
        composed(training__compile="on"), FORWARD_FLOPS, CPU, not_asked
    )
    assert not compiled and "no C++ compiler" in why


def test_a_trial_is_of_one_layer_of_each_type_and_leaves_random_numbers_alone(tiny_config):
    shape = tiny_config("gla", "attention", num_hidden_layers=6)
    before = torch.get_rng_state()
    model = sample_of(shape, 0, torch.float32, CPU)
    assert [type(block.mixer).__name__ for block in model.layers] == ["GLA", "Attention"]
    assert eager_rate(composed(), model) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
