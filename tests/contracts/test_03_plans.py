"""Promise 3: a plan never changes the gradients, nor the steps. Every mixer under every plan against one process.

Each pair runs three steps of the program's own step on the same rows: unclipped gradient norms, losses, and afterwards every
parameter and moment are those of one process. What passes is what docs/parallelism.md's table says.
"""

from dataclasses import replace

import pytest
import torch
from plans import ANY_MIXER, HYBRID, PLANS, Plan, parts, state_of, steps, whole
from worlds import in_processes

from longfire.mixers import MIXERS
from longfire.parallel.mesh import ALONE, Mesh


def three_steps(mixers: tuple[str, ...], plan: Plan, mesh: Mesh = ALONE):
    state = state_of(mixers, plan, mesh)
    return steps(state, 3), parts(state)


def in_a_world(rank: int, mixers: tuple[str, ...], plan: Plan):
    return three_steps(mixers, plan, Mesh.of_degrees(plan.degrees, "cpu"))


def assert_changes_nothing(mixers: tuple[str, ...], plan: Plan) -> None:
    """Adam moves a number by up to 1e-3 a step whatever its gradient's rounding, hence the absolute part for parameters."""
    true_said, true = three_steps(mixers, PLANS["one"])
    answers = in_processes(plan.processes, in_a_world, mixers, plan)
    for said, _ in answers:
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=2e-5), "loss and gradient norm, as every process tells them"
    for name, numbers in whole([held for _, held in answers], true).items():
        wanted = true[name][0][1]
        within = {"rtol": 1e-4, "atol": 5e-5 if name.startswith("model/") else 2e-5 * wanted.abs().max().item()}
        torch.testing.assert_close(numbers, wanted, **within, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("plan", [name for name in PLANS if name != "one"])
def test_a_plan_changes_no_step_of_a_hybrid(plan):
    assert_changes_nothing(HYBRID, PLANS[plan])


@pytest.mark.parametrize("plan", ANY_MIXER.values())
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_under_every_kind_of_plan(mixer, plan):
    assert_changes_nothing((mixer, mixer), PLANS[plan])


@pytest.mark.parametrize("plan", ["fsdp 2 x tp 2", "pp 2"])
@pytest.mark.parametrize("remat", ["block", "mlp", "attention"])
def test_recomputation_under_plans(remat, plan):
    assert_changes_nothing(HYBRID, replace(PLANS[plan], remat=remat))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fsdp 2", "fsdp 2 x tp 2", "pp 2"])
def test_compilation_under_plans(plan):
    assert_changes_nothing(HYBRID, replace(PLANS[plan], compiled=True))
