"""What only linear attention has: constant and value decays, an attention-like closed form. The rest: test_ops_fast_chunkwise.py."""

import pytest
import recurrences as r
import torch

from longfire.ops.fast.linear_attention import linear_attention_chunkwise
from longfire.ops.linear_attention import linear_attention_reference


def test_a_constant_decay_is_a_scalar_decay_that_does_not_change():
    made = r.inputs("linear_attention", 0, T=70, K=4, V=5, decay="constant")
    expanded = {**made, "g": made["g"].expand(r.B, 70, r.H).contiguous()}
    constant, scalar = (r.results(linear_attention_chunkwise, x) for x in (made, expanded))
    torch.testing.assert_close(constant["d_g"], scalar["d_g"].sum((0, 1)))
    torch.testing.assert_close(constant["o"], scalar["o"])


def test_without_decay_it_is_attention_without_softmax():
    made = r.inputs("linear_attention", 1, T=100, K=4, V=5, decay="none", state=False)
    scores_BHTT = torch.einsum("bthk,bshk->bhts", made["q"], made["k"]).tril() / 4**0.5
    o_BTHV = torch.einsum("bhts,bshv->bthv", scores_BHTT, made["v"])
    for form in (linear_attention_reference, linear_attention_chunkwise):
        torch.testing.assert_close(r.call(form, made)[0], o_BTHV)


def test_retention_is_attention_times_powers_of_the_decay():
    """RetNet's parallel form (Sun 2023, eq. 5): scores times gamma^(t-s)."""
    made = r.inputs("linear_attention", 2, T=100, K=4, V=5, decay="constant", state=False)
    t = torch.arange(100)
    powers_HTT = (made["g"][:, None, None] * (t[:, None] - t[None, :]).clamp(min=0)).exp().tril()
    scores_BHTT = torch.einsum("bthk,bshk->bhts", made["q"], made["k"]) * powers_HTT / 4**0.5
    o_BTHV = torch.einsum("bhts,bshv->bthv", scores_BHTT, made["v"])
    torch.testing.assert_close(r.call(linear_attention_chunkwise, made)[0], o_BTHV)


def test_value_decay_is_attention_times_a_decay_for_each_value_channel():
    """The first pass of gated slot attention, all pairs written out (Zhang 2024): exp of the sum of gv between j and i."""
    made = r.inputs("linear_attention", 3, T=100, K=4, V=5, decay="value", state=False)
    log_BHTV = made["gv"].cumsum(1).transpose(1, 2)
    between_BHTTV = (log_BHTV[:, :, :, None] - log_BHTV[:, :, None]).exp()
    scores_BHTT = torch.einsum("bthk,bshk->bhts", made["q"], made["k"]).tril() / 4**0.5
    o_BTHV = torch.einsum(
        "bhts,bhtsv,bshv->bthv", scores_BHTT, between_BHTTV.nan_to_num(posinf=0.0), made["v"]
    )
    for form in (linear_attention_reference, linear_attention_chunkwise):
        torch.testing.assert_close(r.call(form, made)[0], o_BTHV)


@pytest.mark.parametrize("tokens", [1, 70, 150])
@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "vector"])
@pytest.mark.parametrize("form", [linear_attention_reference, linear_attention_chunkwise])
def test_grouped_heads_are_heads_repeated(form, decay, tokens):
    made = r.inputs("linear_attention", 4, T=tokens, K=4, V=5, decay=decay)
    grouped = {**made, "q": torch.randn(r.B, tokens, 2 * r.H, 4, dtype=torch.float64)}
    repeated = {
        **grouped,
        "g": None
        if made["g"] is None
        else made["g"].repeat_interleave(2, 0 if decay == "constant" else 2),
    }
    repeated |= {name: made[name].repeat_interleave(2, 2) for name in "kv"}
    repeated["initial_state_BHKV"] = made["initial_state_BHKV"].repeat_interleave(2, 1)
    (o, state), (true_o, true_state) = r.call(form, grouped), r.call(form, repeated)
    torch.testing.assert_close(o, true_o)
    torch.testing.assert_close(state, true_state[:, ::2])
