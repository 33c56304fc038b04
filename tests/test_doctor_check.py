"""The doctor finds an op that is wrong in any of its results, says which, and exits with 1; a sound machine gives 0."""

import pytest
import torch

from longfire.cli import main as longfire
from longfire.doctor import check
from longfire.ops import attention, bf16, short_conv
from longfire.ops.forms import OPS

pytestmark = pytest.mark.dtype

CPU = torch.device("cpu")


def case(op: str, name: str) -> check.Case:
    return next(case for case in check.CASES if (case.op, case.name) == (op, name))


def few(monkeypatch) -> None:
    names = [
        ("attention", "window"),
        ("delta_rule", "scalar decay"),
        ("linear_cross_entropy", "in chunks"),
    ]
    monkeypatch.setattr(check, "CASES", tuple(case(*name) for name in names))


def test_a_sound_machine(monkeypatch, capsys):
    few(monkeypatch)
    assert longfire(["doctor"]) == 0
    out = capsys.readouterr().out
    for fact in (
        "python ",
        torch.__version__,
        "triton ",
        "compiler ",
        "GiB",
        "bf16",
        "6 of 6 right",
    ):
        assert fact in out, fact
    assert out.count(" ok") == 6 and "FAIL" not in out
    assert "need CUDA" in out or torch.cuda.is_available(), "why the backend was chosen is reported"


def test_a_wrong_op_is_found_and_named(monkeypatch, capsys):
    few(monkeypatch)
    right = attention.attention
    monkeypatch.setattr(
        attention, "attention", lambda *a, window, **k: right(*a, window=window + 1, **k)
    )
    assert check.main() == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 2 and "4 of 6 right" in out
    assert (
        "wrong: attention, window (torch, float32, cpu); attention, window (torch, bfloat16, cpu)"
        in out
    )
    assert "model.kernels = reference" in out


def wrong_gradient(op):
    """The op with a right output and a gradient 1 % off."""

    def wrapped(**inputs):
        q = inputs["q_BTHK"]
        return op(**{**inputs, "q_BTHK": q * 1.01 - (q * 0.01).detach()})

    return wrapped


def wrong_state(op):
    def wrapped(**inputs):
        o, state = op(**inputs)
        return o, state * 1.0001

    return wrapped


def wrong_initial_state(op):
    return lambda **inputs: op(
        **{**inputs, "initial_state_BHKV": 1.001 * inputs["initial_state_BHKV"]}
    )


def not_finite(op):
    def wrapped(**inputs):
        o, state = op(**inputs)
        return o / (o != o.max()), state

    return wrapped


@pytest.mark.parametrize(
    "spoil, where",
    [
        (wrong_gradient, "d q_BTHK"),
        (wrong_state, ""),
        (wrong_initial_state, ""),
        (not_finite, "output"),
    ],
)
def test_every_result_is_looked_at(monkeypatch, spoil, where):
    sound = case("linear_attention", "vector decay")
    assert check.check(sound, CPU, torch.float32)[0]
    monkeypatch.setattr(sound.module, sound.op, spoil(getattr(sound.module, sound.op)))
    right, worst, _ = check.check(sound, CPU, torch.float32)
    assert not right and where in worst


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AssertionError, ImportError, KeyError])
def test_a_form_that_cannot_run_is_a_finding(monkeypatch, error):
    def no_kernel(**_):
        raise error("no kernel image is available\nand more")

    monkeypatch.setattr(short_conv, "short_conv", no_kernel)
    is_right, where, _ = check.check(case("short_conv", "width 4"), CPU, torch.float32)
    assert not is_right and where == error.__name__


def test_a_gradient_of_strong_decays_is_held_to_what_it_is_a_difference_of(monkeypatch):
    """With decays of e^-20 next to nothing is left of d g (1e-8). An error of a thousandth of q dq
    is rounding of TF32 there; a fault as large as q dq itself is found."""
    strong = case("linear_attention", "vector decay of e^-20")
    right = getattr(strong.module, strong.op)

    def off_by(share: float):
        def wrapped(**inputs):
            o, state = right(**inputs)
            g = inputs["g"]
            return o + share * (g - g.detach()).sum(), state

        return wrapped

    monkeypatch.setattr(strong.module, strong.op, off_by(1e-9))
    assert check.check(strong, CPU, torch.float32)[0]
    monkeypatch.setattr(strong.module, strong.op, off_by(1.0))
    assert check.check(strong, CPU, torch.float32)[:2] == (False, "d g")


def test_tolerances_follow_type_and_device():
    softmax, recurrence = case("attention", "causal"), case("delta_rule", "no decay")
    assert check.tolerance(recurrence, CPU, torch.float32) < 32 * torch.finfo(torch.float32).eps
    assert check.tolerance(recurrence, CPU, torch.bfloat16) < 4 * torch.finfo(torch.bfloat16).eps
    limits = []
    for native in (False, True):
        with bf16.assumed(native):
            limits.append(check.tolerance(softmax, CPU, torch.bfloat16))
    assert limits[0] == check.tolerance(recurrence, CPU, torch.bfloat16) < limits[1] < 0.1


def test_every_op_that_has_a_choice_is_looked_at():
    assert set(OPS) <= {case.op for case in check.CASES}
    assert len({str(case) for case in check.CASES}) == len(check.CASES)


def test_what_a_device_lacks_is_not_available_and_not_wrong(monkeypatch, capsys):
    of_float8 = case("float8_linear", "scales of rows")
    assert check.check(of_float8, CPU, torch.float32)[0] and not of_float8.missing(CPU)
    lacking = of_float8._replace(missing=lambda device: "this GPU has no float8 units")
    monkeypatch.setattr(check, "CASES", (lacking, case("attention", "window")))
    assert check.main() == 0
    out = capsys.readouterr().out
    assert "not available this GPU has no float8 units" in " ".join(out.split())
    assert "2 of 2 right" in out


def test_a_gpu_without_units_lacks_float8(monkeypatch):
    missing = case("float8_linear", "scales of rows").missing
    device = torch.device("cuda")
    for capability, reason in (((8, 0), "this GPU has no float8 units"), ((9, 0), "")):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, capability=capability: capability
        )
        assert missing(device) == reason
