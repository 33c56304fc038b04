"""compiling.py: what decides whether to compile, by what it costs; a rate that is measured on the model's own layers."""

import pytest
import torch
from test_training_loop import composed
from torch._dynamo.testing import CompileCounter

from longfire.data.batch import Batch
from longfire.initialise import build
from longfire.loss import loss_sum
from longfire.ops import bf16
from longfire.ops.documents import Documents
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


@pytest.mark.parametrize("mixer", ["attention", "gla", "mamba2"])
@pytest.mark.parametrize("has_documents", [False, True])
def test_a_block_is_compiled_without_a_break_and_not_anew(
    monkeypatch, tiny_config, mixer, has_documents
):
    """Also where nobody has found before whether bf16 has units, and with documents that differ from
    batch to batch. Documents break the graph of softmax attention alone, by design."""
    monkeypatch.setattr(bf16, "_answers", {})
    torch._dynamo.reset()
    model = build(tiny_config(mixer), 0, CPU, torch.bfloat16)
    counter = CompileCounter()
    breaks_by_design = mixer == "attention" and has_documents
    for block in model.layers:
        block.compile(dynamic=False, backend=counter, fullgraph=not breaks_by_design)
    made = []
    for number in range(3):
        ids_BT = torch.arange(60).view(2, 30)
        documents = None
        if has_documents:
            documents = Documents.from_ids(ids_BT // (5 + number))
        rows = Batch(ids_BT, ids_BT, torch.arange(30).expand(2, 30), documents)
        loss_sum(model, rows, 64).backward()
        made.append(counter.frame_count)
    assert made == [made[0]] * 3
    if not breaks_by_design:
        assert made[0] <= 2, "at most one for each block"
