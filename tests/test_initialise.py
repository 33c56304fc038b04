"""initialise.py: each role begins as the shape asks, for every mixer and MLP, and a mixer's own rules come first."""

import math

import pytest
import torch
from conftest import tiny_config
from plans import PLANS, parts, state_of, whole
from worlds import in_processes

from longfire.errors import SettingsError
from longfire.initialise import (
    build,
    fan_in,
    keyed_generator,
    output_weights,
    own_rules,
    published_rules,
    role_of,
)
from longfire.mixers import MIXERS
from longfire.mlps import MLPS
from longfire.model import Model
from longfire.parallel.mesh import ALONE, Mesh

ENDS = {  # the matrix that ends each mixer, by hand
    **dict.fromkeys(MIXERS, "o_proj"),
    "mamba": "out_proj",
    "mamba2": "out_proj",
}
ALL_ROLES = {
    "init_matrices": "fan_in_uniform",
    "init_outputs": "zeros",
    "init_embedding": 1.0,
    "init_head": 0.5,
}


def roles(model: Model) -> dict[str, str]:
    """Parameter -> its role, of those that begin by one."""
    own, outputs = own_rules(model), output_weights(model)
    modules = dict(model.named_modules())
    return {
        name: role_of(name, modules[name.rpartition(".")[0]], outputs)
        for name, _ in model.named_parameters()
        if name not in own
    }


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_has_a_role_and_one_matrix_ends_a_mixer(mixer):
    with torch.device("meta"):
        model = Model(tiny_config(mixer, mlp="swiglu"))
    found = roles(model)
    assert set(found.values()) <= {"matrices", "outputs", "embedding", "head", "norm", "bias"}
    ends = {name for name in output_weights(model) if ".mixer." in name}
    assert ends == {f"layers.{layer}.mixer.{ENDS[mixer]}.weight" for layer in range(2)}


@pytest.mark.parametrize("mlp", MLPS)
def test_one_matrix_ends_an_mlp(mlp):
    with torch.device("meta"):
        model = Model(tiny_config("gla", mlp=mlp))
    end = "value" if mlp == "channel_mix" else "down_proj"
    assert {f"layers.{layer}.mlp.{end}.weight" for layer in range(2)} <= output_weights(model)


@pytest.mark.parametrize("mixer", MIXERS)
def test_roles_begin_as_the_shape_asks(mixer):
    """Against torch's own generators: uniform with std 1/sqrt(fan_in) for matrices and convolutions, and so on."""
    model = build(tiny_config(mixer, **ALL_ROLES), seed=5)
    parameters = dict(model.named_parameters())
    for name, role in roles(model).items():
        expected = by_torch(role, parameters[name].detach(), keyed_generator(5, name))
        assert torch.equal(parameters[name], expected), name


def by_torch(role: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What ALL_ROLES asks of a role."""
    first, bound = torch.empty_like(like), math.sqrt(3 / like[0].numel())
    match role:
        case "matrices":
            return first.uniform_(-bound, bound, generator=generator)
        case "embedding":
            return first.normal_(0, 1.0, generator=generator)
        case "head":
            return first.normal_(0, 0.5, generator=generator)
        case "norm":
            return first.fill_(1)
        case "outputs" | "bias":
            return first.zero_()
    raise AssertionError(role)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixers_own_rules_come_first_and_the_default_is_as_it_was(mixer):
    plain, changed = (build(tiny_config(mixer, **changes), 3) for changes in ({}, ALL_ROLES))
    others = dict(changed.named_parameters())
    found, own, published = roles(plain), own_rules(plain), published_rules(plain)
    for name, value in plain.named_parameters():
        if name in own:
            assert torch.equal(value, others[name]), name
        elif name in published:
            assert not torch.equal(value, others[name]), name
        elif found[name] not in ("norm", "bias"):
            first = torch.empty_like(value)
            first.detach().normal_(0.0, 0.02, generator=keyed_generator(3, name))
            assert torch.equal(value, first), name


@pytest.mark.parametrize(("rule", "kurtosis"), [("fan_in", 3.0), ("fan_in_uniform", 1.8)])
def test_both_fan_in_rules_keep_the_variance(rule, kurtosis):
    """50,000 numbers: their variance is within 2 % of 1/fan_in, and the fourth moment tells normal from uniform."""
    shape = tiny_config("attention", hidden_size=128, init_matrices=rule, intermediate_size=400)
    weight = build(shape, 0).layers[0].mlp.up_proj.weight.detach()
    assert fan_in(weight) == 128
    assert weight.var() * 128 == pytest.approx(1, abs=0.02)
    assert (weight**4).mean() / weight.var() ** 2 == pytest.approx(kurtosis, abs=0.1)


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_matrices_of_zeros_get_no_gradient_and_outputs_of_zeros_do(mlp):
    """Why shape.py refuses init_matrices = "zeros"."""
    ids_BT = torch.arange(12).reshape(2, 6)
    for zeros, learns in {"matrices": False, "outputs": True}.items():
        model = build(tiny_config("gla", mlp=mlp, norm_affine=False), 0)
        found = roles(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if found.get(name) == zeros:
                    parameter.zero_()
        model.logits(model(ids_BT)).square().sum().backward()
        moved = [
            name
            for name, p in model.named_parameters()
            if found.get(name) == "outputs" and p.grad.any()
        ]
        assert bool(moved) == learns


def test_an_embedding_by_fan_in_has_rows_of_length_one():
    model = build(tiny_config("attention", hidden_size=256, init_embedding="fan_in"), 0)
    assert model.embed.weight.detach().norm(dim=1).mean() == pytest.approx(1, abs=0.02)


def test_a_tied_head_begins_as_the_embedding():
    model = build(tiny_config("attention", tie_word_embeddings=True, init_embedding=1.0), 0)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.detach().std() == pytest.approx(1, abs=0.1)


def test_learned_positions_are_embeddings():
    shape = tiny_config(
        "attention", learned_positions=True, max_position_embeddings=40, init_embedding="zeros"
    )
    model = build(shape, 0)
    assert not model.positions.weight.any() and not model.embed.weight.any()


def test_a_mixer_that_does_not_say_what_ends_it_cannot_begin_so(monkeypatch):
    silent = {name: role for name, role in MIXERS["gla"].roles.items() if role != "row"}
    monkeypatch.setattr(MIXERS["gla"], "roles", silent)
    build(tiny_config("gla"), 0)
    with pytest.raises(
        SettingsError, match="init_outputs = 'zeros', but GLA does not say which matrix ends it"
    ):
        build(tiny_config("gla", init_outputs="zeros"), 0)


HYBRID = ("gla", "mamba", "attention", "rwkv7")
BEGIN = {**ALL_ROLES, "init_matrices": "fan_in"}


def begun(rank: int, plan: str):
    mesh = Mesh.of_degrees(PLANS[plan].degrees, "cpu")
    return parts(state_of(HYBRID, PLANS[plan], mesh, **BEGIN))


@pytest.mark.parametrize(
    "plan", ["fsdp 2 x tp 2", pytest.param("pp 2 x tp 2", marks=pytest.mark.slow)]
)
def test_every_layout_begins_with_the_same_bytes(plan):
    """fan_in is that of the whole matrix, whatever of it a process holds."""
    true = parts(state_of(HYBRID, PLANS["one"], ALONE, **BEGIN))
    answers = in_processes(PLANS[plan].processes, begun, plan)
    for name, numbers in whole(answers, true).items():
        assert torch.equal(numbers, true[name][0][1]), name
