"""Promise 4: initialisation is keyed by (seed, parameter name, global shape), visits every parameter, and every parameter moves."""

import pytest
import torch

from longfire.initialise import build, initialise
from longfire.mixers import MIXERS
from longfire.model import Model
from longfire.ops.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_same_whatever_was_drawn_before_and_however_the_model_was_made(mixer, tiny_config):
    shape = tiny_config(mixer)
    from_meta = build(shape, seed=3)
    torch.manual_seed(999)
    torch.randn(17)
    direct = Model(shape)
    initialise(direct, seed=3)
    for (name, a), b in zip(from_meta.named_parameters(), direct.parameters()):
        assert torch.equal(a, b), name


def test_a_parameter_does_not_depend_on_its_neighbours(tiny_config):
    short, long = (
        build(tiny_config("attention"), 0),
        build(tiny_config("attention", num_hidden_layers=5), 0),
    )
    ours = dict(long.named_parameters())
    for name, parameter in short.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def test_another_seed_gives_other_matrices(tiny_config):
    a, b = build(tiny_config(), 0), build(tiny_config(), 1)
    assert not torch.equal(a.embed.weight, b.embed.weight)


def test_the_audit_names_a_parameter_without_a_rule(tiny_config):
    model = Model(tiny_config())
    model.layers[0].mixer.stray = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="stray"):
        initialise(model, 0)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(mixer, tied, tiny_model):
    """A parameter without one would be one that the forward forgot."""
    model = tiny_model(mixer, tie_word_embeddings=tied)
    ids_BT = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    hidden = model(ids_BT[:, :-1])
    linear_cross_entropy(
        hidden.flatten(0, 1), model.head.weight, ids_BT[:, 1:].flatten()
    ).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_tied_embeddings_stay_one_tensor_from_meta_on(tiny_config):
    model = build(tiny_config(tie_word_embeddings=True), 0)
    assert model.head.weight is model.embed.weight
