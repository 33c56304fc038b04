"""SGD, LAMB, Adafactor and Adam with a mean in bfloat16, against torch, transformers and numpy in float64."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from plans import CPU, PLANS, state_of, steps
from torch import nn
from worlds import in_processes

from longfire.checkpoint.saving import Checkpoints
from longfire.config import settings
from longfire.errors import CheckpointError, SettingsError
from longfire.optim import OPTIMIZERS, make_optimizer, parameter_groups, roles, rule_of
from longfire.optim.adafactor import Adafactor
from longfire.optim.contract import OptimizerRule
from longfire.parallel.mesh import ALONE, Mesh

LR, STEPS = 1e-2, 4


def drawn(model: nn.Module, step: int) -> None:
    """Gradients of this step, the same for any model of this shape."""
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    for step in range(STEPS):
        drawn(model, step)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def by_ours(model: nn.Module, chosen: settings.Optimizer) -> dict[str, torch.Tensor]:
    return moved(model, make_optimizer(model, chosen, CPU))


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, numbers in ours.items():
        torch.testing.assert_close(numbers, theirs[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.fixture
def model(tiny_model):
    """A matrix, a short convolution, vectors, an embedding; in float64."""

    def build() -> nn.Module:
        return tiny_model("gated_delta_net", seed=3).double()

    return build


def decayed_groups(model: nn.Module, decay: float) -> list[dict]:
    decays = {p: role in ("head", "matrix") for p, role in roles(model).items()}
    return [
        {"params": [p for p in decays if decays[p]], "weight_decay": decay},
        {"params": [p for p in decays if not decays[p]], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("options", [(), ("momentum=0.9",), ("momentum=0.9", "nesterov=true")])
def test_sgd_is_torchs(model, options):
    chosen = settings.Optimizer(name="SGD", lr=LR, weight_decay=0.1, options=options)
    theirs = model()
    given = {"momentum": 0.9 if options else 0.0, "nesterov": len(options) == 2}
    optimizer = torch.optim.SGD(decayed_groups(theirs, 0.1), lr=LR, **given)
    assert_same(by_ours(model(), chosen), moved(theirs, optimizer))


def test_nesterov_needs_a_momentum():
    with pytest.raises(SettingsError, match="nesterov=true looks ahead by the momentum"):
        rule_of(settings.Optimizer(name="SGD", options=("nesterov=true",)))


def lamb_in_numpy(x: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Algorithm 2 of You et al. 2020, line by line."""
    beta1, beta2, eps = 0.9, 0.95, 1e-6
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        u = r + decay * x
        norm_x, norm_u = np.sqrt((x**2).sum()), np.sqrt((u**2).sum())
        ratio = norm_x / norm_u if norm_x > 0 and norm_u > 0 else 1.0
        x = x - LR * ratio * u
    return x


def test_lamb_is_the_algorithm_of_its_paper(model):
    chosen = settings.Optimizer(name="LAMB", lr=LR, weight_decay=0.1, eps=1e-6)
    ours, reference = model(), model()
    for each in (ours, reference):
        nn.init.zeros_(each.norm.weight)  # of length 0: its ratio is 1
    first = {name: p.detach().numpy().copy() for name, p in ours.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in first}
    for step in range(STEPS):
        drawn(reference, step)
        for name, parameter in reference.named_parameters():
            gradients[name].append(parameter.grad.numpy().copy())
    decays = {
        p: group["weight_decay"]
        for group in parameter_groups(reference, chosen)
        for p in group["params"]
    }
    wanted = {
        name: torch.from_numpy(lamb_in_numpy(first[name], gradients[name], decays[p]))
        for name, p in reference.named_parameters()
    }
    assert_same(by_ours(ours, chosen), wanted)


class Unfactored(transformers.Adafactor):
    """Theirs with means of squares that are whole for all but matrices, as ours: theirs factors short convolutions too."""

    @staticmethod
    def _get_options(param_group, param_shape):
        return len(param_shape) == 2, param_group["beta1"] is not None


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ((), {}),
        (("momentum=0.9",), {"beta1": 0.9}),
        (("scale_parameter=false",), {"scale_parameter": False}),
        (("decay_exponent=0.5", "clip_threshold=0.3"), {"decay_rate": -0.5, "clip_threshold": 0.3}),
        (("eps_square=1e-3", "eps_scale=0.5"), {"eps": (1e-3, 0.5)}),
    ],
)
def test_adafactor_is_that_of_transformers(model, options, theirs):
    chosen = settings.Optimizer(name="Adafactor", lr=LR, weight_decay=0.1, options=options)
    reference = model()
    optimizer = Unfactored(decayed_groups(reference, 0.1), lr=LR, relative_step=False, **theirs)
    assert_same(by_ours(model(), chosen), moved(reference, optimizer))


def test_adafactor_without_factors_keeps_all_squares(model):
    class Whole(transformers.Adafactor):
        @staticmethod
        def _get_options(param_group, param_shape):
            return False, False

    options = ("factored=false", "clip_threshold=0")
    chosen = settings.Optimizer(name="Adafactor", lr=LR, weight_decay=0.0, options=options)
    reference = model()
    optimizer = Whole(reference.parameters(), lr=LR, relative_step=False, clip_threshold=1e9)
    assert_same(by_ours(model(), chosen), moved(reference, optimizer))


def optax_adafactor(
    start: np.ndarray, gradients: list[np.ndarray], decay: float, decay_scale: str
) -> np.ndarray:
    """optax.adafactor(LR, factored=False, clipping_threshold=None, momentum=0.9, decay_rate=0.99)
    and scheduled weight decay, as RingAttention chains them, in float64."""
    x, mean, squares = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step, gradient in enumerate(gradients):
        beta = 1 - (step + 1.0) ** -0.99
        squares = beta * squares + (1 - beta) * (gradient**2 + 1e-30)
        scale = max(np.sqrt(np.mean(x**2)), 1e-3)
        mean = 0.9 * mean + 0.1 * (LR * scale * gradient / np.sqrt(squares))
        x = x - mean - decay * (LR**2 if decay_scale == "rate_squared" else LR) * x
    return x


@pytest.mark.parametrize("decay_scale", ["rate", "rate_squared"])
def test_adafactor_of_ring_attention_s_optimizers(model, decay_scale):
    options = ("factored=false", "clip_threshold=0", "momentum=0.9", "decay_exponent=0.99")
    options = (*options, f"decay_scale={decay_scale}")
    chosen = settings.Optimizer(name="Adafactor", lr=LR, weight_decay=2.0, options=options)
    ours = model()
    decays = {p: 2.0 if role in ("head", "matrix") else 0.0 for p, role in roles(ours).items()}
    first = {name: p.detach().numpy().copy() for name, p in ours.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in first}
    for step in range(STEPS):
        drawn(ours, step)
        for name, parameter in ours.named_parameters():
            gradients[name].append(parameter.grad.numpy().copy())
    wanted = {}
    for name, parameter in ours.named_parameters():
        end = optax_adafactor(first[name], gradients[name], decays[parameter], decay_scale)
        wanted[name] = torch.from_numpy(end)
    assert_same(by_ours(ours, chosen), wanted)


def test_a_factored_matrix_keeps_its_rows_and_columns_only(model):
    chosen = settings.Optimizer(name="Adafactor")
    ours = model()
    optimizer = make_optimizer(ours, chosen, CPU)
    moved(ours, optimizer)
    rule = rule_of(chosen)
    assert isinstance(rule, Adafactor)
    for parameter, role in roles(ours).items():
        kept = {name for name in optimizer.state[parameter] if name != "step"}
        assert kept | {"step"} == {t.name for t in rule.update_of(role, parameter).state}
        if parameter.dim() == 2:
            sizes = [len(optimizer.state[parameter][f"exp_avg_sq_{n}"]) for n in ("row", "col")]
            assert sizes == list(parameter.shape)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_mean_in_bfloat16_is_rounded_where_it_is_stored(model, name):
    """An independent Adam that rounds at the same place, in float64."""
    chosen = settings.Optimizer(name=name, lr=LR, weight_decay=0.1, momentum_dtype="bfloat16")
    ours = model()
    optimizer = make_optimizer(ours, chosen, CPU)
    reference = model()
    decays = {
        p: g["weight_decay"] for g in parameter_groups(reference, chosen) for p in g["params"]
    }
    m = {p: torch.zeros_like(p) for p in reference.parameters()}
    v = {p: torch.zeros_like(p) for p in reference.parameters()}
    for step in range(STEPS):
        drawn(reference, step)
        with torch.no_grad():
            for p in reference.parameters():
                mean = 0.9 * m[p] + 0.1 * p.grad
                v[p] = 0.95 * v[p] + 0.05 * p.grad**2
                m[p] = mean.bfloat16().double()
                hat, square = mean / (1 - 0.9 ** (step + 1)), v[p] / (1 - 0.95 ** (step + 1))
                p -= LR * (hat / (square.sqrt() + 1e-8) + decays[p] * p)
    found = moved(ours, optimizer)
    assert_same(found, {name: p.detach() for name, p in reference.named_parameters()})
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizer.state.values())
    exact = by_ours(model(), replace(chosen, momentum_dtype="float32"))
    assert not all(found[name].equal(exact[name]) for name in found)


RULES = {
    "SGD": settings.Optimizer(name="SGD", lr=1e-3, options=("momentum=0.9",)),
    "LAMB": settings.Optimizer(name="LAMB", lr=1e-3),
    "Adafactor": settings.Optimizer(name="Adafactor", lr=1e-3, options=("momentum=0.9",)),
    "AdamW, bfloat16": settings.Optimizer(lr=1e-3, momentum_dtype="bfloat16"),
    "LAMB, bfloat16": settings.Optimizer(name="LAMB", lr=1e-3, momentum_dtype="bfloat16"),
}


@pytest.mark.parametrize("rule", RULES)
def test_it_resumes_to_the_bit(tmp_path, rule):
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    whole = state_of(("attention",), PLANS["one"], ALONE, optimizer=RULES[rule])
    steps(whole, 2)
    checkpoints.save(whole)
    said = steps(whole, 2)
    resumed = state_of(("attention",), PLANS["one"], ALONE, optimizer=RULES[rule])
    assert checkpoints.restore(resumed)
    assert steps(resumed, 2) == said
    ours, theirs = resumed.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize(("saved", "resumed"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_mean_of_another_type_is_refused(tmp_path, saved, resumed):
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    first, second = (settings.Optimizer(lr=1e-3, momentum_dtype=t) for t in (saved, resumed))
    state = state_of(("attention",), PLANS["one"], ALONE, optimizer=first)
    steps(state, 1)
    checkpoints.save(state)
    other = state_of(("attention",), PLANS["one"], ALONE, optimizer=second)
    with pytest.raises(CheckpointError, match="set optimizer.momentum_dtype as the run was begun"):
        checkpoints.restore(other)


@pytest.mark.parametrize("rule", RULES)
def test_the_bytes_that_it_declares_are_those_that_it_keeps(tiny_model, rule):
    model = tiny_model("attention")
    chosen: OptimizerRule = rule_of(RULES[rule])
    optimizer = make_optimizer(model, RULES[rule], CPU)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, role in roles(model).items():
        update = chosen.update_of(role, parameter)
        like_it = [t.name for t in update.state if t.like_parameter]
        kept = sum(optimizer.state[parameter][name].nbytes for name in like_it)
        assert kept == parameter.numel() * update.state_bytes(parameter.dtype)
        assert optimizer.state[parameter].keys() == {t.name for t in update.state}


def test_the_page_names_every_option():
    page = (Path(__file__).parents[1] / "docs/optimization.md").read_text()
    for name in OPTIMIZERS:
        assert f"`{name}`" in page
        for option in fields(type(rule_of(settings.Optimizer(name=name))).Options):
            assert f"`{option.name}" in page, (name, option.name)


SHARDED = {
    "Adafactor": replace(RULES["Adafactor"], ema_decay=0.9),
    "LAMB, bfloat16": RULES["LAMB, bfloat16"],
}


def saved_by_two(rank: int, folder: Path, chosen: settings.Optimizer) -> None:
    """Two steps of two processes that share the rows of parameters."""
    mesh = Mesh.of_degrees({"dp_shard": 2}, "cpu")
    state = state_of(("attention",), PLANS["fsdp 2"], mesh, torch.float64, chosen)
    steps(state, 2)
    Checkpoints(folder, settings.Checkpoint(async_mode="disabled"), mesh).save(state)


@pytest.mark.parametrize(
    "rule", ["Adafactor", pytest.param("LAMB, bfloat16", marks=pytest.mark.slow)]
)
def test_one_process_goes_on_where_two_have_stopped(tmp_path, rule):
    chosen = SHARDED[rule]
    in_processes(2, saved_by_two, tmp_path, chosen)
    resumed, alone = (
        state_of(("attention",), PLANS["one"], ALONE, torch.float64, chosen) for _ in range(2)
    )
    assert Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled")).restore(resumed)
    steps(alone, 2)
    assert steps(resumed, 1) == [pytest.approx(steps(alone, 1)[0], rel=1e-9)]
    theirs = alone.tensors()
    for name, tensor in resumed.tensors().items():
        if not name.startswith("rng/"):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12, msg=name)
