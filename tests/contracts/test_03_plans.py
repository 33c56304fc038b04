"""Promise 3: a plan never changes the gradients, nor the steps. Every mixer under every plan against one process.

Each pair runs three steps of the program's own step on the same rows: unclipped gradient norms, losses, and afterwards every
parameter and moment are those of one process. What passes is what docs/parallelism.md's table says.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from plans import ANY_MIXER, HYBRID, PLANS, Plan, parts, rows_of, state_of, steps, whole
from sets import slow_unless
from worlds import in_processes

from longfire.evaluate import measure
from longfire.mixers import MIXERS
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.pieces import local

# float64 tells a wrong plan from rounding: 1e-9 is far above what sums of some 1000 terms in another order make (1e-13), and
# far below what one token too many would. In float32 Adam moves a number by up to 1e-3 a step whatever its gradient's rounding.
WITHIN = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 5e-5)}  # relative, and absolute of parameters


def three_steps(mixers: tuple[str, ...], plan: Plan, dtype: torch.dtype, mesh: Mesh = ALONE):
    state = state_of(mixers, plan, mesh, dtype)
    return steps(state, 3), parts(state)


def in_a_world(rank: int, mixers: tuple[str, ...], plan: Plan, dtype: torch.dtype):
    return three_steps(mixers, plan, dtype, Mesh.of_degrees(plan.degrees, "cpu"))


def assert_changes_nothing(mixers: tuple[str, ...], plan: Plan, dtype: torch.dtype = torch.float64) -> None:
    true_said, true = three_steps(mixers, PLANS["one"], dtype)
    answers = in_processes(plan.processes, in_a_world, mixers, plan, dtype)
    relative, absolute = WITHIN[dtype]
    for said, _ in answers:
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=relative / 2), "loss and gradient norm, as every process tells them"
    for name, numbers in whole([held for _, held in answers], true).items():
        wanted = true[name][0][1]
        of_size = absolute if name.startswith("model/") else relative * wanted.abs().max().item()
        within = {"rtol": relative, "atol": of_size}
        torch.testing.assert_close(numbers, wanted, **within, msg=lambda m, name=name: f"{name}: {m}")


QUICK_PLANS = {"hsdp 2x2", "fsdp 2 x tp 2", "pp 2 x fsdp 2", "fsdp 2 x cp 2"}
MATRIX_PLANS = {"cp 8", "hsdp 2x1 x cp 2", "cp 2 x tp 2, not sequence", "pp 2 x cp 2 x tp 2"}


def marks_of(plan: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """`make test` runs one plan of each pair of axes, in float64; the slow set one plan of each kind."""
    if plan in MATRIX_PLANS or ("cp" in PLANS[plan].degrees and dtype == torch.float32):
        return [pytest.mark.matrix]
    if plan in QUICK_PLANS and dtype == torch.float64:
        return []
    return [pytest.mark.slow]


PAIRS = [(plan, dtype) for plan in PLANS if plan != "one" for dtype in WITHIN]


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}", marks=marks_of(*pair)) for pair in PAIRS],
)
def test_a_plan_changes_no_step_of_a_hybrid(plan, dtype):
    assert_changes_nothing(HYBRID, PLANS[plan], dtype)


def takes_its_turn(mixer: str, plan: str) -> bool:
    """In `make test` each mixer has one kind of plan, and each kind of plan some mixers."""
    plans = list(ANY_MIXER.values())
    return plans[list(MIXERS).index(mixer) % len(plans)] == plan


@pytest.mark.parametrize(
    ("mixer", "plan"),
    slow_unless(takes_its_turn, [(mixer, plan) for mixer in MIXERS for plan in ANY_MIXER.values()]),
)
def test_every_mixer_under_every_kind_of_plan(mixer, plan):
    assert_changes_nothing((mixer, mixer), PLANS[plan])


def clipped_and_evaluated(rank: int, plan: Plan):
    """Two clipped steps of a tied model, an evaluation of rows that do not divide, and one more step."""
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(HYBRID, plan, mesh, torch.float64, tie_word_embeddings=True)
    said = steps(state, 2, max_norm=0.05)
    found = measure(state.model, [rows_of(80, 3), rows_of(83, 8)], np.ones(97, np.int64), 64, mesh)
    embedded = [p for name, p in state.model.named_parameters() if name == "embed.weight"]
    last = steps(state, 1, max_norm=0.05)
    return [*said, *last], found.numbers(), [local(p.detach()).clone() for p in embedded]


EVALUATED_PLANS = [
    "fsdp 4",
    "hsdp 2x2",
    "fsdp 2 x tp 2",
    "pp 2",
    "pp 2 x fsdp 2",
    "pp 2 x fsdp 2 x tp 2",
    "fsdp 2 x cp 2",
    "pp 2 x cp 2",
]


@pytest.mark.parametrize("plan", slow_unless(lambda plan: plan in ("fsdp 2 x tp 2", "pp 2"), EVALUATED_PLANS))
def test_clipping_and_evaluation_under_plans(plan):
    """Every copy of a shared parameter is clipped alike: the next steps show it."""
    true_said, true_found, _ = clipped_and_evaluated(0, PLANS["one"])
    given = {"reshard_after_forward": "always"} if plan == "pp 2 x fsdp 2" else {}
    answers = in_processes(PLANS[plan].processes, clipped_and_evaluated, replace(PLANS[plan], given=given))
    for said, found, _ in answers:
        assert found == pytest.approx(true_found, rel=1e-9)
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=1e-9)
    if plan == "pp 2":
        (_, _, (first,)), (_, _, (last,)) = answers
        assert torch.equal(first, last), "both stages have the same embedding"


RECOMPUTED = [(remat, plan) for remat in ("block", "mlp", "attention") for plan in ("fsdp 2 x tp 2", "pp 2", "cp 2")]
QUICK_RECOMPUTED = {("block", "cp 2"), ("mlp", "pp 2"), ("attention", "fsdp 2 x tp 2")}


@pytest.mark.parametrize(
    ("remat", "plan"), slow_unless(lambda remat, plan: (remat, plan) in QUICK_RECOMPUTED, RECOMPUTED)
)
def test_recomputation_under_plans(remat, plan):
    assert_changes_nothing(HYBRID, replace(PLANS[plan], remat=remat))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("fsdp 2", marks=pytest.mark.slow),
        *(pytest.param(plan, marks=pytest.mark.matrix) for plan in ("fsdp 2 x tp 2", "pp 2", "cp 2")),
    ],
)
def test_compilation_under_plans(plan):
    assert_changes_nothing(HYBRID, replace(PLANS[plan], compiled=True), torch.float32)
