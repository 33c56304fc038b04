"""Mamba's selective scan against the recurrence in numpy and its autograd, document by document."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longfire.doctor.op_cases import results
from longfire.ops.documents import Documents
from longfire.ops.fast import selective_scan as module
from longfire.ops.fast.selective_scan import selective_scan_chunks
from longfire.ops.selective_scan import selective_scan, selective_scan_reference

pytestmark = pytest.mark.dtype

B = 2
EPS32 = torch.finfo(torch.float32).eps
both_forms = pytest.mark.parametrize("form", [selective_scan_chunks, selective_scan_reference])


def inputs(
    T: int, D: int = 5, N: int = 3, seed: int = 0, documents: float = 0.0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "x_BTD": randn(B, T, D),
        "dt_BTD": torch.nn.functional.softplus(randn(B, T, D)),
        "A_DN": -randn(D, N).exp(),
        "B_BTN": randn(B, T, N),
        "C_BTN": randn(B, T, N),
        "initial_state_BDN": randn(B, D, N),
    }
    if documents:
        made["documents"] = Documents.from_ids(
            (torch.rand(B, T, generator=generator) < documents).long().cumsum(1)
        )
    return made


def converted(made: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in made.items()}


def errors(made: dict, dtype: torch.dtype) -> dict[str, float]:
    """max |chunks - truth| / max |truth| of each output and gradient, the reference in float64 of the same rounded inputs."""
    rounded = converted(made, dtype)
    got, true = (
        results(selective_scan_chunks, rounded),
        results(selective_scan_reference, converted(rounded, torch.float64)),
    )
    floor = 1e-12 * max(float(x.abs().max()) for x in true.values())
    return {
        name: float((got[name] - x).abs().max() / x.abs().max().clamp_min(floor))
        for name, x in true.items()
    }


@both_forms
@settings(deadline=None, max_examples=25)
@given(
    T=some.sampled_from([1, 2, 31, 32, 33, 70]),
    N=some.integers(1, 4),
    share=some.sampled_from([0.0, 0.1, 1.0]),
)
def test_equals_the_recurrence_on_paper(form, T, N, share):
    made = inputs(T, 4, N, T, share)
    x, dt, A, write, read, given = (x.numpy() for x in made.values() if isinstance(x, Tensor))
    ids = made["documents"].ids_BT.numpy() if share else np.zeros((B, T))
    y, last = selective(x, dt, A, write, read, given.copy(), ids)
    got_y, got_last = form(**made)
    torch.testing.assert_close(got_y, torch.from_numpy(y))
    torch.testing.assert_close(got_last, torch.from_numpy(last))


def selective(x, dt, A, write, read, h, ids) -> tuple[np.ndarray, np.ndarray]:
    """One row, token, channel and number at a time (Gu 2023, eq. 2 with the simplified discretisation of B)."""
    y = np.zeros_like(x)
    for b, t, d in np.ndindex(x.shape):
        if t and ids[b, t] != ids[b, t - 1]:
            h[b, d] = 0.0
        for n in range(A.shape[1]):
            h[b, d, n] = (
                np.exp(dt[b, t, d] * A[d, n]) * h[b, d, n]
                + dt[b, t, d] * write[b, t, n] * x[b, t, d]
            )
            y[b, t, d] += read[b, t, n] * h[b, d, n]
    return y, h


@settings(deadline=None, max_examples=40)
@given(
    T=some.integers(1, 70),
    D=some.integers(1, 5),
    N=some.integers(1, 5),
    share=some.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_gradient_equals_autograds(T, D, N, share):
    for name, error in errors(inputs(T, D, N, T, share), torch.float64).items():
        assert error < 1e-12, name


@both_forms
def test_gradients_are_derivatives(form):
    made = inputs(35, 2, 2, documents=0.1)
    leaves = {name: x.requires_grad_() for name, x in made.items() if isinstance(x, Tensor)}
    assert torch.autograd.gradcheck(
        lambda *values: form(**{**made, **dict(zip(leaves, values))}),
        tuple(leaves.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("step", [0.0, 20.0, 1e4])
def test_any_step_is_exact(step):
    """Every third step leaves all as it was (0), almost nothing (20), or nothing (1e4), as exact as the others."""
    made = inputs(100)
    made["dt_BTD"][:, ::3] = step
    found = errors(made, torch.float32)
    assert max(found.values()) < 16 * EPS32, found


def test_bf16_rounds_only_outputs_and_gradients():
    made = converted(inputs(60), torch.bfloat16)
    y, state = selective_scan(**{**made, "A_DN": made["A_DN"].float()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    found = errors(made, torch.bfloat16)
    assert max(found.values()) < 2**-8, found


@both_forms
@pytest.mark.parametrize("cut", [1, 32, 37])
def test_a_row_can_be_continued_from_its_state(form, cut):
    made = inputs(70)
    along_T = {name for name, x in made.items() if x.shape[1:2] == (70,)}
    y, last = form(**made)
    first, state = form(**{name: x[:, :cut] if name in along_T else x for name, x in made.items()})
    rest = {name: x[:, cut:] if name in along_T else x for name, x in made.items()}
    second, end = form(**{**rest, "initial_state_BDN": state})
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, last)


@both_forms
def test_documents_do_not_see_each_other_at_all(form):
    made = inputs(60)
    ids_T = (torch.arange(60) >= 20).long() + (torch.arange(60) >= 45).long()
    made["documents"] = Documents.from_ids(ids_T.expand(B, -1))
    leaves = {
        name: made[name].requires_grad_()
        for name in ("x_BTD", "dt_BTD", "B_BTN", "initial_state_BDN")
    }
    y, _ = form(**made)
    gradients = dict(zip(leaves, torch.autograd.grad(y[:, 30].sum(), list(leaves.values()))))
    assert not gradients.pop("initial_state_BDN").any()
    for name, x in gradients.items():
        assert x.abs().sum((0, 2)).nonzero().flatten().tolist() == list(range(20, 31)), name


def test_what_is_kept_is_the_inputs_and_a_state_for_each_chunk():
    made, kept = inputs(160, D=8, N=16), {}
    leaves = converted(made, torch.float32)
    leaves["x_BTD"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
    ):
        selective_scan(**leaves)
    states = 160 // module.TOKENS * B * 8 * 16 * 4
    assert sum(kept.values()) <= sum(x.nbytes for x in leaves.values()) + states


@pytest.mark.slow
def test_compiled_equals_eager():
    made = converted(inputs(70, documents=0.1), torch.float32)
    eager, compiled = (
        results(form, made)
        for form in (selective_scan, torch.compile(selective_scan, fullgraph=True))
    )
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x)
