"""optim/: what decays and what does not, schedules against transformers' own, clipping against torch's own."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from longfire.config.settings import LRScheduler, Optimizer
from longfire.config.settings.optimizer import ScheduleName
from longfire.huggingface import transformers_model
from longfire.mixers import MIXERS
from longfire.optim import (
    clip_gradients,
    make_optimizer,
    parameter_groups,
    roles,
    set_learning_rate,
)
from longfire.training.schedule import schedule

CPU = torch.device("cpu")
ALL_MIXERS = ("gla", "gated_delta_net", "attention")


def names_by_decay(model: nn.Module, optimizer: Optimizer) -> dict[bool, set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for group in parameter_groups(model, optimizer):
        found[group["weight_decay"] > 0] |= {names[p] for p in group["params"]}
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_norms_biases_embeddings_and_decay_rates_do_not_decay(tiny_model, tied):
    mixers = {
        "attention": {"num_heads": 4, "qkv_bias": True, "qk_norm": True},
        "gla": {"num_heads": 2},
        "gated_delta_net": {"num_heads": 2, "head_dim": 8},
    }
    model = tiny_model(
        *ALL_MIXERS,
        mixers=mixers,
        tie_word_embeddings=tied,
        norm="layernorm",
        mlp="gelu",
        mlp_bias=True,
    )
    found = names_by_decay(model, Optimizer(weight_decay=0.1))
    assert found[True] | found[False] == dict(model.named_parameters()).keys()
    assert not found[True] & found[False]
    assert {name.rsplit(".", 1)[-1] for name in found[True]} == {"weight"}
    kept = {
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "layers.0.mixer_norm.weight",
        "layers.1.mixer.A_log",
        "layers.1.mixer.dt_bias",
        "layers.0.mixer.gk_proj.1.bias",
        "layers.2.mixer.q_norm.weight",
        "layers.2.mixer.q_proj.bias",
        "layers.2.mlp.up_proj.bias",
        "layers.0.mixer.g_norm_swish_gate.weight",
    }
    assert kept <= found[False]
    assert {
        "layers.0.mixer.gk_proj.0.weight",
        "layers.2.mixer.q_proj.weight",
        "layers.1.mlp.up_proj.weight",
    } <= found[True]
    assert ("head.weight" in found[True]) != tied, "a head that is the embedding is an embedding"


def test_a_step_without_gradient_signal_shrinks_matrices_alone(tiny_model):
    model = tiny_model(*ALL_MIXERS)
    optimizer = make_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5), CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = names_by_decay(model, Optimizer(weight_decay=0.5))[True]
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in decayed else before[name]
        assert parameter.allclose(expected, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_roles_of_every_mixer(tiny_model, mixer):
    """matrix is what decays, but for the head; embedding and head are one parameter each."""
    model = tiny_model(mixer, learned_positions=True, max_position_embeddings=64)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: role for p, role in roles(model).items()}
    assert found.keys() == set(names.values())
    assert {name for name, role in found.items() if role == "embedding"} == {
        "embed.weight",
        "positions.weight",
    }
    assert {name for name, role in found.items() if role == "head"} == {"head.weight"}
    decayed = names_by_decay(model, Optimizer(weight_decay=0.1))[True]
    assert {name for name, role in found.items() if role == "matrix"} == decayed - {"head.weight"}
    assert {found[name] for name in found if name.endswith(("norm.weight", ".bias", "A_log"))} == {
        "other"
    }


def test_a_tied_head_is_an_embedding(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    assert roles(model)[model.head.weight] == "embedding" and "head" not in roles(model).values()


def test_roles_of_a_model_of_transformers():
    shape = transformers_model.read_model_config(
        {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 20,
            "tie_word_embeddings": False,
        },
        "x",
    )
    model = transformers_model.build(shape, 0)
    found = {name: roles(model)[p] for name, p in model.named_parameters()}
    assert (
        found["theirs.model.embed_tokens.weight"] == "embedding"
        and found["theirs.lm_head.weight"] == "head"
    )
    assert (
        found["theirs.model.norm.weight"] == "other"
        and found["theirs.model.layers.0.mlp.up_proj.weight"] == "matrix"
    )


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_each_role_moves_by_its_multiple_of_the_rate(tiny_model, name):
    """With beta1 = 0.8, no weight decay and eps = 1e-10, Adam's first step of any gradient is the rate itself."""
    scales = {"embedding": 100.0, "head": 0.5, "matrix": 2.0, "other": 0.0}
    given = {f"{role}_lr_scale": scale for role, scale in scales.items()}
    model = tiny_model("gated_delta_net", "attention")
    chosen = Optimizer(name=name, lr=1e-4, beta1=0.8, eps=1e-10, weight_decay=0.0, **given)
    optimizer = make_optimizer(model, chosen, CPU)
    set_learning_rate(optimizer, 1e-3)
    before = {p: p.detach().clone() for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    for parameter, role in roles(model).items():
        expected = before[parameter] - 1e-3 * scales[role]
        torch.testing.assert_close(
            parameter.detach(), expected, rtol=0, atol=1e-6 * max(1, scales[role])
        )


def test_equal_settings_share_a_group(tiny_model):
    assert len(parameter_groups(tiny_model(), Optimizer())) == 2
    assert len(parameter_groups(tiny_model(), Optimizer(weight_decay=0.0))) == 1
    assert len(parameter_groups(tiny_model(), Optimizer(embedding_lr_scale=2.0))) == 3


@pytest.mark.parametrize(
    "mixer, kept",
    [
        ("mamba", {"mixer.A_log", "mixer.D"}),
        ("rwkv7", {"mixer.r_k", "mixer.x_r", "mlp.x_k", "mixer.w_lora.lora.2.bias"}),
        ("hgrn2", {"lower_bounds"}),
    ],
)
def test_rates_bounds_and_shares_do_not_decay_whatever_their_dims(tiny_model, mixer, kept):
    found = names_by_decay(tiny_model(mixer), Optimizer(weight_decay=0.1))
    assert {name for name in found[True] if any(name.endswith(leaf) for leaf in kept)} == set()
    assert all(any(name.endswith(leaf) for name in found[False]) for leaf in kept)


def test_adam_has_no_decay_and_frozen_parameters_are_left_out(tiny_model):
    model = tiny_model()
    model.norm.weight.requires_grad_(False)
    groups = parameter_groups(model, Optimizer(name="Adam", weight_decay=0.1))
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert not any(p is model.norm.weight for group in groups for p in group["params"])
    optimizer = make_optimizer(
        model, Optimizer(name="Adam", beta1=0.8, beta2=0.99, eps=1e-6, lr=0.5), CPU
    )
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"], optimizer.defaults["lr"]) == (
        (0.8, 0.99),
        1e-6,
        0.5,
    )


def test_fused_equals_plain(tiny_model):
    moved = {}
    for fused in (True, False):
        model = tiny_model(seed=4)
        optimizer = make_optimizer(model, Optimizer(fused=fused, weight_decay=0.1), CPU)
        draw = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step()
        moved[fused] = dict(model.named_parameters())
    for name, parameter in moved[True].items():
        assert parameter.allclose(moved[False][name], rtol=1e-5, atol=1e-7), name


def rates(total: int, warmup: int, **changes) -> list[float]:
    return [schedule(step, total, warmup, LRScheduler(**changes)) for step in range(total)]


def rates_of_transformers(
    name: str, total: int, warmup: int, floor: float, decay: int = 0
) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "cosine":
        theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, total, min_lr_rate=floor
        )
    elif name == "linear":
        theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    else:
        theirs = transformers.get_wsd_schedule(
            optimizer,
            warmup,
            decay,
            num_training_steps=total,
            decay_type="linear",
            min_lr_ratio=floor,
        )
    found = []
    for _ in range(total):
        found.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize(
    "name, floor", [("cosine", 0.1), ("cosine", 0.0), ("linear", 0.0), ("wsd", 0.1), ("wsd", 0.0)]
)
def test_after_the_warm_up_it_is_the_schedule_of_transformers(name, floor, warmup):
    ours = rates(100, warmup, name=name, min_lr_ratio=floor, decay_ratio=0.25)
    theirs = rates_of_transformers(name, 100, warmup, floor, decay=25)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-6)
    assert ours[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


@pytest.mark.parametrize("warmup", [0, 50, 85, 95, 99])
def test_wsd_decays_to_its_floor_however_long_the_warm_up(warmup):
    """The predecessor's decay vanished when the warm-up was longer than the stable part."""
    found = rates(100, warmup, name="wsd", min_lr_ratio=0.1, decay_ratio=0.1)
    begin = max(warmup, 90)
    assert found[warmup:begin] == [1.0] * (begin - warmup)
    assert found[begin:] == pytest.approx([1 - 0.9 * i / (100 - begin) for i in range(100 - begin)])
    assert schedule(
        100, 100, warmup, LRScheduler(name="wsd", min_lr_ratio=0.1, decay_ratio=0.1)
    ) == pytest.approx(0.1)


def learning_rates(theirs: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """Of so many steps of a scheduler whose peak is 1."""
    found = []
    for _ in range(steps):
        found.append(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()
    return found


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_inverse_square_root_is_that_of_transformers(warmup):
    for timescale in (0, 7):
        theirs = transformers.get_inverse_sqrt_schedule(sgd(), warmup, timescale or None)
        ours = rates(100, warmup, name="inverse_sqrt", min_lr_ratio=0.0, timescale_steps=timescale)
        assert ours[warmup:] == pytest.approx(learning_rates(theirs, 100)[warmup:], rel=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_the_polynomial_is_that_of_transformers(power):
    theirs = transformers.get_polynomial_decay_schedule_with_warmup(
        sgd(), 20, 100, lr_end=0.05, power=power
    )
    ours = rates(100, 20, name="polynomial", min_lr_ratio=0.05, power=power)
    assert ours[20:] == pytest.approx(learning_rates(theirs, 100)[20:], rel=1e-12)


def test_steps_and_milestones_are_those_of_torch():
    """Fractions of a step, of a run that counts in tokens, lie in the step that they are part of."""
    steps = torch.optim.lr_scheduler.StepLR(sgd(), 30, 0.5)
    ours = rates(100, 0, name="step", step_size=30, gamma=0.5, min_lr_ratio=0.0)
    assert ours == pytest.approx(learning_rates(steps, 100))
    milestones = torch.optim.lr_scheduler.MultiStepLR(sgd(), [10, 50], 0.3)
    chosen = LRScheduler(name="multistep", milestones=(10, 50), gamma=0.3, min_lr_ratio=0.0)
    ours = [schedule(step, 100, 0, chosen) for step in range(100)]
    assert ours == pytest.approx(learning_rates(milestones, 100))
    assert schedule(9.9, 100, 0, chosen) == 1.0 and schedule(10.1, 100, 0, chosen) == 0.3


def test_the_floor_holds_for_shapes_without_an_end():
    assert min(rates(100, 0, name="step", step_size=10, gamma=0.1, min_lr_ratio=0.05)) == 0.05
    assert min(rates(100, 1, name="inverse_sqrt", min_lr_ratio=0.3)) == 0.3


def test_constant_stays():
    assert rates(10, 2, name="constant", min_lr_ratio=0.0) == [0.5] + [1.0] * 9


@given(
    some.sampled_from([name for name in get_args(ScheduleName) if name != "plateau"]),
    some.integers(1, 500),
    some.integers(0, 500),
    some.floats(0, 1),
    some.floats(0, 1),
)
@settings(deadline=None, max_examples=300)
def test_any_schedule_stays_between_floor_and_peak_and_falls_only_after_the_warm_up(
    name, total, warmup, floor, decay
):
    warmup = min(warmup, total)
    shape = {"step_size": 7, "milestones": (3, 90), "gamma": 0.5, "power": 2.0}
    found = rates(total, warmup, name=name, min_lr_ratio=floor, decay_ratio=decay, **shape)
    assert all(0 < rate <= 1 for rate in found[:warmup]) and all(
        floor - 1e-9 <= rate <= 1 for rate in found[warmup:]
    )
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


@given(some.floats(0, 150), some.floats(1, 50))
@settings(deadline=None)
def test_fractions_of_a_step_lie_between_its_neighbours(position, warmup):
    """Counted in tokens, a position need not be whole; past the end the floor stays."""
    scheduler = LRScheduler(min_lr_ratio=0.1)
    at = lambda place: schedule(place, 100.0, warmup, scheduler)
    if position >= warmup:
        assert at(position + 1) <= at(position) <= 1.0
    else:
        assert at(position) == pytest.approx(min(1.0, (position + 1) / warmup))
    assert at(position + 100) == pytest.approx(0.1)


def with_gradients(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(g.shape if g is not None else 3)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = None if gradient is None else gradient.clone()
    return parameters


@pytest.mark.parametrize("max_norm", [0.1, 4.999, 5.0, 6.0])
def test_clipping_is_torchs(max_norm):
    gradients = (torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), None)
    ours, theirs = with_gradients(*gradients), with_gradients(*gradients)
    assert clip_gradients([p.grad for p in ours[:2]], max_norm).item() == pytest.approx(5.0)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert all(
        a.grad is None if b.grad is None else a.grad.equal(b.grad) for a, b in zip(ours, theirs)
    )


def test_zero_does_not_clip_and_a_norm_that_is_not_finite_is_reported():
    parameters = with_gradients(torch.tensor([300.0, 400.0]))
    assert clip_gradients([p.grad for p in parameters], 0.0).item() == 500.0
    assert parameters[0].grad.tolist() == [300.0, 400.0]
    for bad in (torch.inf, torch.nan):
        assert not clip_gradients([torch.tensor([1.0, bad])], 1.0).isfinite()
    assert clip_gradients([], 1.0).item() == 0.0


def test_defaults_are_those_of_the_settings(tiny_model):
    optimizer = make_optimizer(tiny_model(), replace(Optimizer(), lr=1.0), CPU)
    assert optimizer.defaults["betas"] == (Optimizer().beta1, Optimizer().beta2)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {
        Optimizer().weight_decay,
        0.0,
    }
