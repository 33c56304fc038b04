"""Gated slot attention: its form in two passes beside the reference, and the reference beside the paper's equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longfire.ops.documents import Documents
from longfire.ops.fast.slot_attention import slot_attention_in_two_passes
from longfire.ops.slot_attention import slot_attention_reference

B, T, H, G, K, V, M = 2, 70, 4, 2, 6, 5, 3


def made(tokens: int = T, has_documents: bool = False, has_state: bool = True) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q_BTHK": normal(B, tokens, H, K),
        "k_BTGK": normal(B, tokens, G, K),
        "v_BTGV": normal(B, tokens, G, V),
        "s_BTGM": normal(B, tokens, G, M).sigmoid(),
        "g_BTGM": F.logsigmoid(2 * normal(B, tokens, G, M)),
    }
    if has_state:
        inputs["initial_state_BGMX"] = normal(B, G, M, K + V)
    if has_documents:
        starts_BT = torch.rand(B, tokens, generator=generator) < 0.1
        inputs["documents"] = Documents.from_ids(starts_BT.long().cumsum(1))
    return inputs


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("tokens", [T, 1])
def test_two_passes_are_the_reference(tokens, has_documents, has_state):
    inputs = made(tokens, has_documents, has_state)
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor)]
    found = slot_attention_in_two_passes(**inputs)
    wanted = slot_attention_reference(**inputs)
    gradients = []
    for outputs in (found, wanted):
        total = sum((x * torch.sin(torch.arange(x.numel()).view_as(x))).sum() for x in outputs)
        gradients.append(torch.autograd.grad(total, leaves))
    for mine, true in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


def test_the_reference_is_equation_6():
    inputs = made(4)
    o_BTHV, state_BGMX = slot_attention_reference(**inputs)
    q, k, v, s, g = (inputs[name][1] for name in ("q_BTHK", "k_BTGK", "v_BTGV", "s_BTGM", "g_BTGM"))
    head = 3
    group = head // (H // G)
    keys_KM = inputs["initial_state_BGMX"][1, group, :, :K].T
    values_MV = inputs["initial_state_BGMX"][1, group, :, K:]
    for t in range(4):
        decay_M = g[t, group].exp()
        keys_KM = keys_KM @ decay_M.diag() + torch.outer(k[t, group], s[t, group])
        values_MV = decay_M.diag() @ values_MV + torch.outer(s[t, group], v[t, group])
        o_V = values_MV.T @ (keys_KM.T @ q[t, head]).softmax(-1)
        torch.testing.assert_close(o_BTHV[1, t, head], o_V)
    torch.testing.assert_close(state_BGMX[1, group], torch.cat([keys_KM.T, values_MV], -1))


@pytest.mark.parametrize("form", [slot_attention_in_two_passes, slot_attention_reference])
def test_a_row_in_two_parts_is_the_whole_row(form):
    inputs = made()
    whole, last = form(**inputs)
    names = ("q_BTHK", "k_BTGK", "v_BTGV", "s_BTGM", "g_BTGM")
    outputs = []
    state = inputs["initial_state_BGMX"]
    for part in (slice(0, 33), slice(33, T)):
        o_BTHV, state = form(*(inputs[name][:, part] for name in names), initial_state_BGMX=state)
        outputs.append(o_BTHV)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)
