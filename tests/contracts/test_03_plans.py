"""Promise 3: a plan never changes the gradients, nor the steps. Every mixer under every plan against one process.

Each pair runs three steps of the program's own step on the same rows: unclipped gradient norms, losses, and afterwards every
parameter and moment are those of one process. What passes is what docs/parallelism.md's table says.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from muon import Muon, MuonAndAdamW, orthogonal
from plans import ANY_MIXER, HYBRID, OPTIMIZER, PLANS, Plan, parts, rows_of, state_of, steps, whole
from sets import slow_unless
from torch.distributed.tensor import DTensor
from worlds import in_processes

from longfire.config import settings
from longfire.evaluation.evaluate import measure
from longfire.mixers import MIXERS
from longfire.optim import OPTIMIZERS, rule_of
from longfire.optim.contract import OptimizerRule
from longfire.parallel.axes import AXES
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.sharding import local, local_rows

# float64 tells a wrong plan from rounding: 1e-9 is far above what sums of some 1000 terms in another order make (1e-13), and
# far below what one token too many would. In float32 Adam moves a number by up to 1e-3 a step whatever its gradient's rounding.
WITHIN = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 5e-5),
}  # relative, and absolute of parameters

NO_CHANGES: Mapping[str, Any] = {}


def three_steps(
    mixers: tuple[str, ...],
    plan: Plan,
    dtype: torch.dtype,
    mesh: Mesh = ALONE,
    changes: Mapping[str, Any] = NO_CHANGES,
):
    state = state_of(mixers, plan, mesh, dtype, **changes)
    return steps(state, 3), parts(state)


def in_a_world(
    rank: int, mixers: tuple[str, ...], plan: Plan, dtype: torch.dtype, changes: Mapping[str, Any]
):
    return three_steps(mixers, plan, dtype, Mesh.of_degrees(plan.degrees, "cpu"), changes)


def assert_changes_nothing(
    mixers: tuple[str, ...],
    plan: Plan,
    dtype: torch.dtype = torch.float64,
    changes: Mapping[str, Any] = NO_CHANGES,
) -> None:
    """changes: of the tiny shape, and `optimizer`."""
    true_said, true = three_steps(mixers, PLANS["one"], dtype, changes=changes)
    answers = in_processes(plan.processes, in_a_world, mixers, plan, dtype, changes)
    relative, absolute = WITHIN[dtype]
    for said, _ in answers:
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=relative / 2), (
                "loss and gradient norm, as every process tells them"
            )
    for name, numbers in whole([held for _, held in answers], true).items():
        wanted = true[name][0][1]
        of_size = absolute if name.startswith("model/") else relative * wanted.abs().max().item()
        within = {"rtol": relative, "atol": of_size}
        torch.testing.assert_close(
            numbers, wanted, **within, msg=lambda m, name=name: f"{name}: {m}"
        )


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


AXIS_PLANS = {
    "dp_replicate": "ddp 2",
    "dp_shard": "fsdp 2",
    "cp": "cp 2",
    "tp": "tp 2, sequence",
    "pp": "pp 2",
}


def declared_pairs(optimizers: Mapping[str, type[OptimizerRule]]) -> list[tuple[str, str]]:
    """Each axis that a rule declares as proven."""
    return [(name, axis) for name, rule in optimizers.items() for axis in sorted(rule.proven_axes)]


class GatheringMuon(Muon):
    """Muon that gathers each matrix over the processes that share its rows (FSDP2)."""

    proven_axes = frozenset({"dp_replicate", "dp_shard", "cp"})

    def make(self, groups, device):
        return Gathering(groups, self.options, self.settings)


class Gathering(MuonAndAdamW):
    def direction(self, mean):
        if not isinstance(mean, DTensor):
            return super().direction(mean)
        first, last = local_rows(mean)
        return orthogonal(mean.full_tensor(), self.options.iterations)[first:last]


BUILT_IN = {name: type(rule_of(settings.Optimizer(name=name))) for name in OPTIMIZERS}
OF_TESTS = {"Muon": Muon, "GatheringMuon": GatheringMuon}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), declared_pairs({**BUILT_IN, **OF_TESTS}))
def test_every_optimizer_under_every_axis_that_it_declares(name, axis, monkeypatch):
    """What is not declared is refused (test_optim_contract.py). AdamW is that of all other tests here."""
    for known, rule in OF_TESTS.items():
        monkeypatch.setitem(OPTIMIZERS, known, rule)
    changes = {"optimizer": replace(OPTIMIZER, name=name)}
    assert_changes_nothing(HYBRID, PLANS[AXIS_PLANS[axis]], changes=changes)


def with_options(name: str, *options: str, **given: Any) -> dict[str, Any]:
    return {"optimizer": replace(OPTIMIZER, name=name, options=options, **given)}


# Rules that sum over the processes that share a parameter, and state that is not the parameter's type
OTHER_RULES = {
    "LAMB": with_options("LAMB"),
    "Adafactor, momentum": with_options("Adafactor", "momentum=0.9"),
    "Adafactor, whole": with_options("Adafactor", "factored=false"),
    "SGD, nesterov": with_options("SGD", "momentum=0.9", "nesterov=true"),
    "AdamW, bfloat16": with_options("AdamW", momentum_dtype="bfloat16"),
    "AdamW, averaged": with_options("AdamW", ema_decay=0.9),
}
QUICK_RULES = {
    ("LAMB", "pp 2 x fsdp 2"),
    ("Adafactor, momentum", "hsdp 2x2"),
    ("AdamW, averaged", "fsdp 2"),
}
MIXED_PLANS = ("fsdp 2", "hsdp 2x2", "pp 2 x fsdp 2", "fsdp 2 x cp 2")


@pytest.mark.parametrize(
    ("rule", "plan"),
    slow_unless(
        lambda rule, plan: (rule, plan) in QUICK_RULES,
        [(rule, plan) for rule in OTHER_RULES for plan in MIXED_PLANS],
    ),
)
def test_rules_under_plans_of_several_axes(rule, plan):
    changes = {**OTHER_RULES[rule], "tie_word_embeddings": True}
    assert_changes_nothing(HYBRID, PLANS[plan], changes=changes)


def test_an_optimizer_is_proven_for_axes_that_exist():
    assert set(AXIS_PLANS) == set(AXES)
    assert all(rule.proven_axes <= set(AXES) for rule in BUILT_IN.values())


# Every architectural setting that is not a mixer's, away from its default, and a learning rate for each role.
MODERN = {
    "mlp": "relu2",
    "embed_norm": True,
    "norm_affine": False,
    "final_logit_softcapping": 0.5,  # logits reach some 0.5: it bends them
    "use_l2warp": True,
    "dropout": 0.2,
    "embed_dropout": 0.3,
    "init_matrices": "fan_in_uniform",
    "init_outputs": 0.3,
    "init_embedding": 1.0,
    "mixers": {
        "gla": {"num_heads": 2, "qk_norm": True},
        "attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    },
    "optimizer": replace(
        OPTIMIZER,
        embedding_lr_scale=8.0,
        head_lr_scale=0.5,
        matrix_lr_scale=2.0,
        other_lr_scale=0.25,
    ),
}
WITH_PARAMETERS = {**MODERN, "norm_affine": True, "tie_word_embeddings": True, "mlp": "geglu"}


@pytest.mark.parametrize("plan", ["tp 2, sequence", "pp 2"])
def test_a_plan_changes_no_step_of_a_model_with_other_settings(plan):
    assert_changes_nothing(HYBRID, PLANS[plan], changes=MODERN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [MODERN, WITH_PARAMETERS], ids=["untied, norms without parameters", "tied"]
)
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "one"])
def test_no_plan_changes_a_step_of_a_model_with_other_settings(plan, changes):
    assert_changes_nothing(HYBRID, PLANS[plan], changes=changes)


ONE_KV_HEAD = {"mixers": {"attention": {"num_heads": 4, "num_kv_heads": 1, "qk_norm": True}}}
KV_HEAD_PLANS = ["fsdp 2 x tp 2", "tp 2", "pp 2 x fsdp 2 x tp 2", "cp 2 x tp 2"]


@pytest.mark.parametrize("plan", slow_unless(lambda plan: plan == "fsdp 2 x tp 2", KV_HEAD_PLANS))
def test_a_key_value_head_that_several_processes_make_changes_no_step(plan):
    assert_changes_nothing(("attention", "attention"), PLANS[plan], changes=ONE_KV_HEAD)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp 2, sequence", "fsdp 2 x tp 2", "cp 2"])
@pytest.mark.parametrize("mixer", ["gla", "gsa", "linear_attention", "retention"])
def test_qk_norm_of_linear_mixers_under_plans(mixer, plan):
    """fsdp 2 x tp 2: what the heads of one process make of a norm's gradient is a part."""
    given = {"num_heads": 2, "qk_norm": True}
    assert_changes_nothing((mixer, mixer), PLANS[plan], changes={"mixers": {mixer: given}})


def clipped_and_evaluated(rank: int, plan: Plan):
    """Two clipped steps of a tied model, an evaluation of rows that do not divide, and one more step."""
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(
        HYBRID, plan, mesh, torch.float64, tie_word_embeddings=True, final_logit_softcapping=0.3
    )
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


@pytest.mark.parametrize(
    "plan", slow_unless(lambda plan: plan in ("fsdp 2 x tp 2", "pp 2"), EVALUATED_PLANS)
)
def test_clipping_and_evaluation_under_plans(plan):
    """Every copy of a shared parameter is clipped alike: the next steps show it."""
    true_said, true_found, _ = clipped_and_evaluated(0, PLANS["one"])
    given = {"reshard_after_forward": "always"} if plan == "pp 2 x fsdp 2" else {}
    answers = in_processes(
        PLANS[plan].processes, clipped_and_evaluated, replace(PLANS[plan], given=given)
    )
    for said, found, _ in answers:
        assert found == pytest.approx(true_found, rel=1e-9)
        for got, wanted in zip(said, true_said):
            assert got == pytest.approx(wanted, rel=1e-9)
    if plan == "pp 2":
        (_, _, (first,)), (_, _, (last,)) = answers
        assert torch.equal(first, last), "both stages have the same embedding"


RECOMPUTED = [
    (remat, plan)
    for remat in ("block", "mlp", "attention")
    for plan in ("fsdp 2 x tp 2", "pp 2", "cp 2")
]
QUICK_RECOMPUTED = {("block", "cp 2"), ("mlp", "pp 2"), ("attention", "fsdp 2 x tp 2")}


@pytest.mark.parametrize(
    ("remat", "plan"),
    slow_unless(lambda remat, plan: (remat, plan) in QUICK_RECOMPUTED, RECOMPUTED),
)
def test_recomputation_under_plans(remat, plan):
    assert_changes_nothing(HYBRID, replace(PLANS[plan], remat=remat))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("fsdp 2", marks=pytest.mark.slow),
        *(
            pytest.param(plan, marks=pytest.mark.matrix)
            for plan in ("fsdp 2 x tp 2", "pp 2", "cp 2")
        ),
    ],
)
def test_compilation_under_plans(plan):
    assert_changes_nothing(HYBRID, replace(PLANS[plan], compiled=True), torch.float32)
