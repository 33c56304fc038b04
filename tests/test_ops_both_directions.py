"""ops/both_directions.py: every mixer sees all tokens of its document and no other, from either end alike."""

import pytest
import torch
import torch.nn.functional as F
from conftest import MIXER_SETTINGS, tiny_model

from longfire.mixers.mixer import Sequence
from longfire.ops.documents import Documents
from longfire.ops.fast.full_attention import full_attention_fused
from longfire.ops.full_attention import full_attention_reference

T = 12
each_mixer = pytest.mark.parametrize("mixer", sorted(MIXER_SETTINGS))


def made(mixer: str, **changes):
    """A model in both directions, without rotary positions, which know left from right."""
    if mixer == "attention":
        changes["mixers"] = {"attention": {**MIXER_SETTINGS["attention"], "rope": "none"}}
    return tiny_model(mixer, direction="both", **changes)


def hidden(model, ids_BT, documents=None):
    positions_BT = torch.zeros_like(ids_BT)
    return model(ids_BT, Sequence(positions_BT, documents))


@each_mixer
def test_the_reversed_sequence_gives_the_reversed_outputs(mixer):
    model = made(mixer)
    ids_BT = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            hidden(model, ids_BT.flip(1)), hidden(model, ids_BT).flip(1), rtol=1e-4, atol=1e-4
        )


@each_mixer
def test_each_token_sees_all_of_its_document_and_nothing_else(mixer):
    """By gradients: of one output to the embedding of each token."""
    model = made(mixer)
    ids_BT = torch.arange(T)[None]
    documents = Documents.from_ids(torch.tensor([[0] * 5 + [1] * 7]))
    for token, seen in ((0, range(5)), (4, range(5)), (5, range(5, T)), (11, range(5, T))):
        model.zero_grad()
        hidden(model, ids_BT, documents)[0, token].square().sum().backward()
        reached = model.embed.weight.grad[:T].abs().sum(1).nonzero().flatten().tolist()
        assert reached == list(seen)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cut", [False, True])
def test_full_attention_is_torchs_in_float64(window, cut):
    chance = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 8, generator=chance).double() for heads in (4, 2, 2))
    ids_BT = torch.tensor([[0] * 4 + [1] * 8, [0] * T]) if cut else torch.zeros(2, T).long()
    documents = Documents.from_ids(ids_BT) if cut else None
    seen = ids_BT[:, None, :, None] == ids_BT[:, None, None, :]
    if window:
        seen = seen & ((torch.arange(T)[:, None] - torch.arange(T)).abs() < window)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    true = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)
    for form in (full_attention_reference, full_attention_fused):
        o_BTHV = form(q, k, v, window=window, documents=documents)
        torch.testing.assert_close(o_BTHV, true.transpose(1, 2))


def test_dropout_is_the_same_in_both_forms():
    chance = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, 2, 8, generator=chance) for _ in range(3))
    noise_BT = torch.randint(2**31, (2, T), generator=chance, dtype=torch.int32)
    whole, dropped = (
        full_attention_fused(q, k, v, dropout=p, noise_BT=noise_BT) for p in (0.0, 0.5)
    )
    assert not torch.allclose(whole, dropped)
    torch.testing.assert_close(
        dropped, full_attention_reference(q, k, v, dropout=0.5, noise_BT=noise_BT)
    )
