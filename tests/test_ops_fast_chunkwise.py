"""The chunkwise recurrences against one written in numpy: every decay, document layout, length and head size."""

import pytest
import recurrences as r
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfire.ops.delta_rule import delta_rule_reference
from longfire.ops.dplr import dplr_reference
from longfire.ops.fast import chunkwise
from longfire.ops.fast.delta_rule import delta_rule_chunkwise
from longfire.ops.fast.dplr import dplr_chunkwise
from longfire.ops.fast.linear_attention import linear_attention_chunkwise
from longfire.ops.linear_attention import linear_attention_reference

FORMS = {
    "linear_attention": (linear_attention_chunkwise, linear_attention_reference),
    "delta_rule": (delta_rule_chunkwise, delta_rule_reference),
    "dplr": (dplr_chunkwise, dplr_reference),
}
CASES = [
    ("linear_attention", decay)
    for decay in ("none", "constant", "scalar", "vector", "value", "vector and value")
]
CASES += [("linear_attention", f"{decay}, one key") for decay in ("none", "constant", "scalar")]
CASES += [("delta_rule", decay) for decay in ("none", "scalar", "vector")] + [("dplr", "vector")]
EPS32 = torch.finfo(torch.float32).eps

every_case = pytest.mark.parametrize("op, decay", CASES)
decaying_case = pytest.mark.parametrize(
    "op, decay", [case for case in CASES if not case[1].startswith("none")]
)


@st.composite
def anything(draw):
    """Every length around the chunk, head sizes down to 1, documents of every density."""
    op, decay = draw(st.sampled_from(CASES))
    T = draw(
        st.one_of(st.integers(1, 9), st.sampled_from([31, 63, 64, 65, 100, 127, 128, 129, 150]))
    )
    K, V, seed = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 2**31))
    documents = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    return op, r.inputs(op, seed, T, K, V, decay, state=draw(st.booleans()), documents=documents)


@settings(deadline=None, max_examples=80)
@given(anything())
def test_both_forms_equal_the_recurrence_on_paper(case):
    op, made = case
    o, state = r.by_numpy(made)
    for form in FORMS[op]:
        got_o, got_state = r.call(form, made)
        torch.testing.assert_close(got_o, torch.from_numpy(o), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got_state, torch.from_numpy(state), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=80)
@given(anything())
def test_every_gradient_of_the_chunks_equals_the_recurrence(case):
    op, made = case
    for name, error in r.errors(*FORMS[op], made, torch.float64).items():
        assert error < 1e-11, name


@every_case
@pytest.mark.parametrize("form", [0, 1], ids=["chunkwise", "reference"])
def test_gradients_are_derivatives(op, decay, form):
    made = r.inputs(op, 0, T=5, K=3, V=2, decay=decay, documents=0.3)
    leaves = {name: x.requires_grad_() for name, x in made.items() if isinstance(x, torch.Tensor)}

    def function(*values):
        return r.call(FORMS[op][form], {**made, **dict(zip(leaves, values))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@every_case
def test_fp32_loses_a_few_roundings(op, decay):
    """Rounding errors of sums of T K = 2400 terms add up to some sqrt(T K) / 3 = 16 eps; measured: 1 to 12."""
    made = r.inputs(op, 1, T=150, K=16, V=8, decay=decay, documents=0.02)
    errors = r.errors(*FORMS[op], made, torch.float32)
    assert max(errors.values()) < 16 * EPS32, errors


@decaying_case
@pytest.mark.parametrize("log_decay", [-20.0, -90.0, -1e4, -torch.inf])
def test_strong_decays_are_exact(op, decay, log_decay):
    """Every third step forgets almost all, those between little: values and gradients stay as exact as with weak decays."""
    made = r.inputs(op, 2, T=150, K=16, V=8, decay=decay)
    for name in {"g", "gv"} & {name for name, x in made.items() if x is not None}:
        made[name][
            (slice(None), slice(None, None, 3)) if not decay.startswith("constant") else slice(None)
        ] = log_decay
    errors = r.errors(*FORMS[op], made, torch.float32)
    assert max(errors.values()) < 16 * EPS32, errors


@pytest.mark.parametrize(
    "op, decay, name", [*((op, "vector", "g") for op in FORMS), ("linear_attention", "value", "gv")]
)
@pytest.mark.parametrize("log_decay", [-20.0, -1e4])
def test_decays_that_are_all_strong_have_right_small_gradients(op, decay, name, log_decay):
    """Gradients of g are then of size e^-20 (or 0): right to fp32 rounding, not lost under sums of larger terms."""
    made = r.inputs(op, 3, T=70, K=8, V=8, decay=decay)
    made[name][:] = log_decay
    rounded = r.converted(made, torch.float32)
    fast, slow = FORMS[op]
    got = r.results(fast, rounded)[f"d_{name}"]
    true = r.results(slow, r.converted(rounded, torch.float64))[f"d_{name}"]
    torch.testing.assert_close(
        got.double(), true, rtol=1e-4, atol=float(true.abs().max()) * 16 * EPS32
    )


@every_case
def test_bf16_inputs_round_only_outputs_and_gradients(op, decay):
    """All work is fp32: what is bf16 carries one rounding (2^-9), the state is fp32 and carries none."""
    made = r.inputs(op, 4, T=70, K=8, V=8, decay=decay, state=False)
    rounded = r.converted(made, torch.bfloat16)
    fast, slow = FORMS[op]
    o, state = r.call(fast, rounded)
    true_o, true_state = r.call(slow, r.converted(rounded, torch.float64))
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(
        state.double(), true_state, rtol=0, atol=float(true_state.abs().max()) * 16 * EPS32
    )
    torch.testing.assert_close(o.double(), true_o, rtol=2**-8, atol=1e-5)
    errors = r.errors(fast, slow, made, torch.bfloat16)
    assert max(errors.values()) < 2**-8, errors


@every_case
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_a_row_can_be_continued_from_its_state(op, decay, cut):
    fast, T = FORMS[op][0], 140
    made = r.inputs(op, 5, T=T, K=4, V=5, decay=decay)

    def part(start: int, stop: int) -> r.Inputs:
        along_T = {
            name for name, x in made.items() if isinstance(x, torch.Tensor) and x.shape[1:2] == (T,)
        }
        return {name: x[:, start:stop] if name in along_T else x for name, x in made.items()}

    o, state = r.call(fast, made)
    first_o, middle = r.call(fast, part(0, cut))
    second_o, last = r.call(fast, {**part(cut, T), "initial_state_BHKV": middle})
    torch.testing.assert_close(torch.cat([first_o, second_o], 1), o, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last, state, rtol=1e-11, atol=1e-11)


@every_case
def test_documents_do_not_see_each_other_at_all(op, decay):
    """Neighbours of a document change: its outputs stay bit for bit, in fp32, though it starts inside a chunk."""
    made = r.converted(r.inputs(op, 6, T=150, K=8, V=8, decay=decay), torch.float32)
    ids_T = (torch.arange(150) >= 70).long() + (torch.arange(150) >= 133).long()
    made["documents"] = r.Documents.from_ids(ids_T.expand(r.B, -1))
    other = dict(made)
    for name in {"q", "k", "v", "c", "b"} & made.keys():
        other[name] = torch.where((ids_T == 1)[:, None, None], made[name], made[name].flip(1))
    other["initial_state_BHKV"] = made["initial_state_BHKV"] * 1e6
    o, _ = r.call(FORMS[op][0], made)
    other_o, _ = r.call(FORMS[op][0], other)
    assert torch.equal(o[:, 70:133], other_o[:, 70:133])
    assert not torch.equal(o[:, :70], other_o[:, :70])


@every_case
def test_gradients_are_exactly_zero_from_the_future_and_from_other_documents(op, decay):
    made = r.inputs(op, 7, T=150, K=8, V=8, decay=decay)
    made["documents"] = r.Documents.from_ids((torch.arange(150) >= 70).long().expand(r.B, -1))
    along_T = {"q", "k", "v", "c", "b"} & made.keys()
    leaves = {name: made[name].requires_grad_() for name in (*along_T, "initial_state_BHKV")}
    o, _ = r.call(FORMS[op][0], made)
    gradients = dict(zip(leaves, torch.autograd.grad(o[:, 100].sum(), list(leaves.values()))))
    for name in along_T:
        outside = torch.cat([gradients[name][:, :70], gradients[name][:, 101:]], 1)
        assert not outside.any(), name
        assert gradients[name][:, 100].any(), name
    assert not gradients["initial_state_BHKV"].any()


@every_case
@pytest.mark.parametrize("documents", [0.0, 0.02])
def test_segments_of_a_long_row_change_nothing(monkeypatch, op, decay, documents):
    made = r.inputs(op, 8, T=300, K=4, V=5, decay=decay, documents=documents)
    whole = r.results(FORMS[op][0], made)
    monkeypatch.setattr(chunkwise, "SEGMENT_NUMBERS", 128 * r.B * r.H * 5)
    for name, x in r.results(FORMS[op][0], made).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op", FORMS)
def test_scale_is_a_factor_of_the_output(op):
    made = r.inputs(op, 9, T=20, K=4, V=5, decay="vector", state=False)
    args = [made[name] for name in ("q", "k", "v", "beta", "c", "b", "g") if name in made]
    for form in FORMS[op]:
        torch.testing.assert_close(form(*args, scale=3.0)[0], form(*args)[0] * 3.0 * 4**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, decay",
    [
        ("linear_attention", "vector"),
        ("linear_attention", "value"),
        ("delta_rule", "scalar"),
        ("dplr", "vector"),
    ],
)
def test_compiled_equals_eager(op, decay):
    """In one graph: nothing in an op may break it."""
    made = r.converted(
        r.inputs(op, 10, T=150, K=8, V=8, decay=decay, documents=0.02), torch.float32
    )
    eager = r.results(FORMS[op][0], made)
    for name, x in r.results(torch.compile(FORMS[op][0], fullgraph=True), made).items():
        torch.testing.assert_close(x, eager[name], rtol=1e-4, atol=1e-5)
