"""Promise 11: every fast op equals its reference implementation forward and backward; which form runs, and why, is reported once; no
fallback is silent. The cases are those of `longfire doctor`, which a user runs on his own machine."""

import inspect
from pathlib import Path

import pytest
import torch
from logged import logged_to

from longfire.config.run import Run
from longfire.doctor.check import CASES
from longfire.doctor.op_cases import DTYPES, SIZES, Draw, errors, results, tolerance
from longfire.initialise import build
from longfire.model import Model
from longfire.ops import attention, delta_rule, forms, linear_attention, short_conv
from longfire.ops.choice import OF_FLA, choose
from longfire.ops.forms import OPS, Choice
from longfire.training.setup import make_state

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[2] / "recipes/quickstart.toml"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_equals_reference(case, dtype):
    found, limit = errors(case, CPU, dtype), tolerance(case, CPU, dtype)
    assert {"output"} < found.keys() and any(name.startswith("d ") for name in found)
    assert max(found.values()) <= limit, {
        name: error for name, error in found.items() if error > limit
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_floating_input_gets_a_gradient(case):
    inputs = case.inputs(Draw(), SIZES["cpu"])
    floating = {
        name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    assert {f"d {name}" for name in floating} <= errors(case, CPU, torch.float32).keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_case_compares_zeros(case):
    """Two forms that agree on nothing but zeros have shown nothing."""
    true = results(getattr(case.module, f"{case.op}_reference"), case.inputs(Draw(), SIZES["cpu"]))
    assert all(x.abs().max() > 0 for x in true.values()), [
        name for name, x in true.items() if not x.abs().max()
    ]


OPS_OF_CASES = {f"{case.module.__name__}.{case.op}": (case.module, case.op) for case in CASES}


@pytest.mark.parametrize("module, op", OPS_OF_CASES.values(), ids=OPS_OF_CASES)
def test_one_signature(module, op):
    fast, slow = (inspect.signature(getattr(module, name)) for name in (op, f"{op}_reference"))
    assert list(fast.parameters.values()) == list(slow.parameters.values())


def test_the_whole_model_is_the_same_with_slow_kernels(tiny_config):
    """`model.kernels = reference` reaches every op: the same model runs on the truths alone, and the fast forms are not called."""
    shape = tiny_config("gla", "gated_delta_net", "attention", initializer_range=0.2)
    ids_BT = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(0))

    def logits_and_gradients(wanted):
        choose(CPU, wanted)
        model: Model = build(shape, 0)
        logits_BTW = model.logits(model(ids_BT))
        logits_BTW.logsumexp(-1).sum().backward()
        return logits_BTW.detach(), {name: p.grad for name, p in model.named_parameters()}

    fast, fast_gradients = logits_and_gradients("torch")
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear_attention, delta_rule, short_conv, attention):
            patch.delitem(module.FORMS.forms, "torch")  # choosing it would raise
        slow, slow_gradients = logits_and_gradients("reference")
    # fp32: 3 layers of some 10 operations, each off by a rounding of 1e-7 or so
    assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()
    for name, gradient in slow_gradients.items():
        assert (
            fast_gradients[name] - gradient
        ).abs().max() <= 1e-4 * gradient.abs().max().clamp_min(1e-6), name


def test_the_choice_and_its_reason_are_reported_once(tmp_path):
    notes: list[str] = []
    with logged_to(notes):
        run = Run.compose(RECIPE, {"job.dump_folder": str(tmp_path), "model.kernels": "reference"})
        make_state(run, run.known_model_config.with_vocabulary(300), CPU)
    message = [note for note in notes if note.startswith("kernels")]
    assert len(message) == 1
    assert message[0] == f"kernels: {', '.join(OPS)}: reference (model.kernels = reference)"


def test_a_chosen_kernel_that_is_not_there_raises(monkeypatch):
    """fla is chosen and cannot run here (no package, or no GPU): an error, never our own form in its place."""
    monkeypatch.setattr(forms, "decided", {op: Choice("fla", "for the test") for op in OF_FLA})
    q = torch.randn(1, 16, 2, 16)
    with pytest.raises((ImportError, RuntimeError, ValueError)):
        linear_attention.linear_attention(q, q, q)
    with pytest.raises((ImportError, RuntimeError, ValueError)):
        delta_rule.delta_rule(q, q, q, torch.rand(1, 16, 2))
