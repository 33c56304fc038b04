"""What only diagonal plus low rank has: c reads before the decay, and the delta rules are cases of it. The rest:
test_ops_fast_chunkwise.py."""

import pytest
import recurrences as r
import torch

from longfire.ops.delta_rule import delta_rule_reference
from longfire.ops.dplr import dplr_reference
from longfire.ops.fast.dplr import dplr_chunkwise

both_forms = pytest.mark.parametrize("form", [dplr_chunkwise, dplr_reference])


@both_forms
@pytest.mark.parametrize("documents", [0.0, 0.05])
def test_the_delta_rule_is_a_case(form, documents):
    """There the decayed state is read, here the state before its decay: so c carries the decay."""
    made = r.inputs("delta_rule", 0, T=100, K=4, V=5, decay="vector", documents=documents)
    k, written = made["k"], made["beta"][..., None] * made["k"]
    case = {name: x for name, x in made.items() if name != "beta"}
    case |= {"k": written, "c": made["g"].exp() * k, "b": -written}
    for got, true in zip(r.call(form, case), r.call(delta_rule_reference, made)):
        torch.testing.assert_close(got, true)


@both_forms
def test_what_is_read_comes_from_before_the_decay(form):
    """A decay of 0 wipes the state of the step before, and yet b writes what c read in it."""
    made = r.inputs("dplr", 1, T=3, K=4, V=5, decay="vector")
    made["g"].fill_(-torch.inf)
    made["v"].zero_()
    _, state = r.call(form, made)
    true = made["initial_state_BHKV"]
    for t in range(3):
        true = made["b"][:, t, :, :, None] * (made["c"][:, t, :, :, None] * true).sum(
            2, keepdim=True
        )
    torch.testing.assert_close(state, true)


@both_forms
def test_gradients_where_c_and_b_have_nothing_to_do_with_each_other(form):
    generator = torch.Generator().manual_seed(2)
    made = r.inputs("dplr", 2, T=6, K=3, V=2, decay="vector", documents=0.3)
    for name in ("c", "b"):
        made[name] = torch.randn(made[name].shape, generator=generator, dtype=torch.float64)
    leaves = {name: x.requires_grad_() for name, x in made.items() if isinstance(x, torch.Tensor)}

    def function(*values):
        return r.call(form, {**made, **dict(zip(leaves, values))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@both_forms
def test_the_first_of_a_document_reads_nothing(form):
    """The gradient of c is exactly zero where a document starts, and only there."""
    made = r.inputs("dplr", 3, T=100, K=4, V=5, decay="vector")
    ids_T = (torch.arange(100) >= 30).long() + (torch.arange(100) >= 64).long()
    made["documents"] = r.Documents.from_ids(ids_T.expand(r.B, -1))
    o, _ = r.call(form, {**made, "c": made["c"].requires_grad_()})
    (d_c,) = torch.autograd.grad(o.square().sum(), made["c"])
    still_T = d_c.abs().sum((0, 2, 3)) == 0
    assert still_T.nonzero().flatten().tolist() == [30, 64]
