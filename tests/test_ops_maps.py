"""A segment's map gives the state that its op ends in, from any state before it; and two maps compose."""

from functools import partial

import pytest
import recurrences as r
import torch

from longfire.ops.delta_rule import delta_rule
from longfire.ops.documents import Documents
from longfire.ops.dplr import dplr
from longfire.ops.linear_attention import linear_attention
from longfire.ops.maps import RECURRENCES
from longfire.ops.maps.selective_scan import selective_scan_map
from longfire.ops.maps.slot_attention import slot_attention_map
from longfire.ops.maps.wide_values import with_wide_values
from longfire.ops.selective_scan import selective_scan
from longfire.ops.slot_attention import slot_attention

OPS = {
    "linear_attention": (
        linear_attention,
        ["none", "constant", "scalar", "vector", "vector and value", "value", "scalar, one key"],
    ),
    "delta_rule": (delta_rule, ["none", "scalar", "vector"]),
    "dplr": (dplr, ["vector"]),
}
CASES = [(name, decay) for name, (_, decays) in OPS.items() for decay in decays]
MAPS = {recurrence.op: recurrence.map for recurrence in RECURRENCES.values()}


def map_of(op, made):
    def of(*positional, initial_state_BHKV, **named):
        return MAPS[op](*positional, **named)

    return r.call(of, made)


@pytest.mark.parametrize("documents", [0.0, 0.02, 0.3])
@pytest.mark.parametrize(("name", "decay"), CASES)
def test_the_map_gives_the_last_state_and_its_gradients(name, decay, documents):
    """T = 150 is two chunks and a part of one; the reference is the op itself, whose own truth is test_ops_fast_chunkwise.py's."""
    op = OPS[name][0]
    made = r.inputs(name, 0, T=150, K=6, V=5, decay=decay, documents=documents)
    wanted = [x for x in made.values() if isinstance(x, torch.Tensor)]
    for x in wanted:
        x.requires_grad_()
    _, last = r.call(op, made)
    found = map_of(op, made)(made["initial_state_BHKV"])
    torch.testing.assert_close(found, last, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(last)
    for mine, true in zip(
        *(torch.autograd.grad(x, wanted, weights, allow_unused=True) for x in (found, last))
    ):
        if true is not None and true.any():
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("documents", [None, [40, 60], [100]])
def test_the_map_of_a_selective_scan(documents):
    B, T, D, N = 2, 100, 5, 3
    x, dt, gates = (
        torch.randn(B, T, D).double(),
        torch.rand(B, T, D).double(),
        torch.randn(2, B, T, N).double(),
    )
    A, state = -torch.rand(D, N).double(), torch.randn(B, D, N).double()
    if documents is not None:
        ids_BT = (
            torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).expand(B, T)
        )
        documents = Documents.from_ids(ids_BT)
    _, last = selective_scan(x, dt, A, *gates, initial_state_BDN=state, documents=documents)
    torch.testing.assert_close(
        selective_scan_map(x, dt, A, *gates, documents=documents)(state), last
    )


@pytest.mark.parametrize("starts", [None, [40, 60], [100]])
def test_the_map_of_slots(starts):
    B, T, H, G, K, V, M = 2, 100, 4, 2, 6, 5, 3
    q, k, v = (torch.randn(B, T, heads, size).double() for heads, size in ((H, K), (G, K), (G, V)))
    s, g = torch.rand(B, T, G, M).double(), -torch.rand(B, T, G, M).double()
    state = torch.randn(B, G, M, K + V).double()
    documents = None
    if starts is not None:
        ids_T = torch.arange(len(starts)).repeat_interleave(torch.tensor(starts))
        documents = Documents.from_ids(ids_T.expand(B, T))
    _, last = slot_attention(q, k, v, s, g, initial_state_BGMX=state, documents=documents)
    found = slot_attention_map(q, k, v, s, g, documents=documents)(state)
    torch.testing.assert_close(found, last)


@pytest.mark.parametrize(
    ("name", "decay"),
    [("linear_attention", "vector"), ("delta_rule", "scalar"), ("dplr", "vector")],
)
def test_strong_decays_lose_nothing_in_fp32(name, decay):
    """exp(-200) is 0 in fp32: what is written after the last such decay must stay to the digit."""
    made = r.inputs(name, 1, T=130, K=6, V=5, decay=decay)
    made["g"][:, ::40] = -200.0
    true = map_of(OPS[name][0], made)
    found = map_of(OPS[name][0], r.converted(made, torch.float32))
    torch.testing.assert_close(
        found.write.double(), true.write, rtol=1e-4, atol=1e-5 * true.write.abs().max().item()
    )


def assert_as_map_and_op(op, at_once, made):
    """Outputs and gradients of at_once(state_before, *inputs) are those of the map, the state that
    `state_before` makes of it, and then the op."""
    wanted = [
        x for key, x in made.items() if isinstance(x, torch.Tensor) and key != "initial_state_BHKV"
    ]
    for x in wanted:
        x.requires_grad_()

    def state_before(mine):
        return torch.tanh(mine(made["initial_state_BHKV"]))

    def once(*positional, initial_state_BHKV, **named):
        return at_once(state_before, *positional, **named), None

    def twice(*positional, initial_state_BHKV, **named):
        before = state_before(MAPS[op](*positional, **named))
        return op(*positional, initial_state_BHKV=before, **named)

    found, true = r.call(once, made)[0], r.call(twice, made)[0]
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(true)
    for mine, theirs in zip(*(torch.autograd.grad(o, wanted, weights) for o in (found, true))):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "decay"), [(name, d) for name, d in CASES if "value" not in d and "one key" not in d]
)
@pytest.mark.parametrize("documents", [0.0, 0.05])
def test_chunks_worked_on_once_give_the_same(name, decay, documents, monkeypatch):
    """Outputs and gradients of `around`, whose state before the tokens is made of their own map, in several pieces (of 64 tokens)."""
    monkeypatch.setattr("longfire.ops.fast.chunkwise.SEGMENT_NUMBERS", 1)
    op = OPS[name][0]
    (recurrence,) = (one for one in RECURRENCES.values() if one.op is op)
    made = r.inputs(name, 2, T=150, K=6, V=5, decay=decay, documents=documents)
    assert_as_map_and_op(op, recurrence.on_segments, made)


@pytest.mark.parametrize(
    ("name", "decay"), [(name, d) for name, d in CASES if name in ("delta_rule", "dplr")]
)
@pytest.mark.parametrize("documents", [0.0, 0.05])
def test_wide_values_give_the_same(name, decay, documents):
    """Outputs and gradients of `with_wide_values`, here of our own form, beside the map and then the op."""
    op = OPS[name][0]
    made = r.inputs(name, 3, T=150, K=6, V=5, decay=decay, documents=documents)
    assert_as_map_and_op(op, partial(with_wide_values, op), made)
