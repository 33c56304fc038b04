"""What only the delta rule has: it overwrites what a key held. The rest: test_ops_fast_chunkwise.py."""

import pytest
import recurrences as r
import torch

from longfire.ops.delta_rule import delta_rule_reference
from longfire.ops.fast.delta_rule import delta_rule_chunkwise

both_forms = pytest.mark.parametrize("form", [delta_rule_chunkwise, delta_rule_reference])


@both_forms
def test_a_key_recalls_the_last_value_written_to_it(form):
    """With beta = 1 and orthonormal keys used again and again, the state is a table of the last value of each key."""
    T, K, V = 100, 8, 5
    which_T = torch.arange(T) * 5 % K
    k_BTHK = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64))[0][which_T][None, :, None]
    v_BTHV = torch.randn(1, T, 1, V, dtype=torch.float64)
    beta_BTH = torch.ones(1, T, 1, dtype=torch.float64)
    q_BTHK = torch.cat([k_BTHK[:, :3], k_BTHK[:, :-3]], 1)  # ask for the key of three tokens ago
    o_BTHV, _ = form(q_BTHK, k_BTHK, v_BTHV, beta_BTH, scale=1.0)
    torch.testing.assert_close(o_BTHV[:, 3:], v_BTHV[:, :-3])


@both_forms
def test_with_beta_zero_the_state_only_decays(form):
    made = r.inputs("delta_rule", 0, T=70, K=4, V=5, decay="vector")
    made["beta"].zero_()
    _, state = r.call(form, made)
    torch.testing.assert_close(
        state, made["g"].sum(1).exp()[..., None] * made["initial_state_BHKV"]
    )


def test_with_beta_two_the_state_is_reflected_and_keeps_its_norm_over_a_long_row():
    """I - 2 k k^T is orthogonal: 1024 of them lose no more than rounding, in fp32 too."""
    made = r.converted(r.inputs("delta_rule", 1, T=1024, K=8, V=4, decay="none"), torch.float32)
    made["beta"].fill_(2.0)
    made["v"].zero_()
    _, state = r.call(delta_rule_chunkwise, made)
    torch.testing.assert_close(
        state.norm(dim=(2, 3)), made["initial_state_BHKV"].norm(dim=(2, 3)), rtol=1e-4, atol=0
    )
