"""The kernels of the selective scan beside the reference of their op, in Triton's interpreter,
which computes on the CPU. Started by `make triton`."""

import pytest
import torch

from longfire.doctor.cases.selective_scan import cases, selective_scan_inputs
from longfire.doctor.op_cases import DTYPES, Draw, Sizes, errors, results, tolerance
from longfire.ops import forms
from longfire.ops.fast import scan_kernels
from longfire.ops.forms import Choice
from longfire.ops.selective_scan import selective_scan, selective_scan_reference

CPU = torch.device("cpu")
# Two blocks of channels of which one is not full, and chunks of which the last is not.
SIZES = Sizes(B=2, T=21, H=2, K=20, V=1, W=1)


@pytest.fixture(autouse=True)
def kernels_run():
    forms.decided["selective_scan"] = Choice("triton", "the interpreter")
    yield
    forms.decided.clear()


@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("chunk_tokens", [8, 32])
def test_every_case_of_the_doctor(case, dtype, chunk_tokens, monkeypatch):
    """Forward, last state and every gradient, as the doctor compares them on a GPU."""
    monkeypatch.setattr(scan_kernels, "TOKENS", chunk_tokens)
    limit = tolerance(case, CPU, dtype, tokens=SIZES.T)
    for name, error in errors(case, CPU, dtype, SIZES).items():
        assert error <= limit, name


def test_a_number_of_states_that_is_no_power_of_two():
    """Places beyond N are neither read nor written."""
    draw = Draw()
    inputs = selective_scan_inputs(draw, SIZES, documents=True)
    N = 6
    inputs["A_DN"] = inputs["A_DN"][:, :N]
    inputs["B_BTN"] = inputs["B_BTN"][..., :N]
    inputs["C_BTN"] = inputs["C_BTN"][..., :N]
    inputs["initial_state_BDN"] = inputs["initial_state_BDN"][..., :N]
    got = results(selective_scan, inputs)
    expected = results(selective_scan_reference, inputs)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


def test_one_token():
    """As in decoding: one token, from a state."""
    inputs = selective_scan_inputs(Draw(), SIZES._replace(T=1))
    got = results(selective_scan, inputs)
    for name, x in results(selective_scan_reference, inputs).items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)
