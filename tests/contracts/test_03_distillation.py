"""Promise 3 for distillation: student and teacher are shared by processes, and no plan changes the steps of one process."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from plans import CPU, PLANS, Plan, parts, state_of, steps, whole
from sets import slow_unless
from worlds import in_processes

from longfire.config import settings
from longfire.initialise import materialise
from longfire.model import on_meta
from longfire.parallel.apply import parallelize, reshard
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.sharding import local
from longfire.training.distillation import Distillation
from longfire.training.teacher import KEEPING

STUDENT = ("attention", "gla")
TEACHER = ("attention", "attention")
TIED = {"tie_word_embeddings": True}
WANTED = {
    "hidden": settings.Distillation("there", "hidden"),
    "logits": settings.Distillation("there", "logits", temperature=2.0, ce_weight=0.3),
}
# 97 words do not divide into two equal parts of the vocabulary
SHAPE = {"final_logit_softcapping": 3.0}


def teacher_of(plan: Plan, mesh: Mesh):
    """A teacher as `training.teacher.share` makes one, with the numbers of its seed."""
    shape = tiny_config(*TEACHER, **SHAPE, initializer_range=0.3)
    teacher = on_meta(shape, torch.float64).to(torch.float64).requires_grad_(False)
    parallelize(teacher, KEEPING, False, mesh, settings.Parallelism(**plan.given), 16)
    return materialise(teacher, 1, CPU)


def three_steps(plan: Plan, kind: str, mesh: Mesh = ALONE, remat: str = "none"):
    """Three steps of a student: their losses and gradient norms, and all numbers afterwards."""
    learn = Distillation(teacher_of(plan, mesh), WANTED[kind], chunk_tokens=7)
    student = state_of(STUDENT, replace(plan, remat=remat), mesh, torch.float64, **SHAPE, **TIED)
    learn.prepare(student.model)
    before = [local(p).clone() for p in learn.teacher.parameters()]
    numbers = steps(student, 3, loss_function=learn.loss_sum)
    reshard(learn.teacher)
    for parameter, was in zip(learn.teacher.parameters(), before):
        assert torch.equal(local(parameter), was) and parameter.grad is None
    return numbers, parts(student)


def in_a_world(rank: int, plan: Plan, kind: str, remat: str):
    return three_steps(plan, kind, Mesh.of_degrees(plan.degrees, "cpu"), remat)


QUICK = {("fsdp 2", "logits"), ("fsdp 2 x tp 2", "hidden"), ("fsdp 2 x tp 2", "logits")}
NAMES = [
    "ddp 2",
    "fsdp 2",
    "hsdp 2x2",
    "fsdp 2, offloaded",
    "fsdp 2, never resharded",
    "tp 2",
    "tp 2, sequence",
    "fsdp 2 x tp 2",
    "cp 2",
    "fsdp 2 x cp 2",
    "cp 2 x tp 2",
    "cp 2 x tp 2, not sequence",
]


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_unless(
        lambda name, kind: (name, kind) in QUICK,
        [(name, kind) for name in NAMES for kind in WANTED],
    ),
)
def test_a_plan_changes_no_step_of_a_student(name, kind):
    assert_changes_nothing(PLANS[name], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WANTED)
def test_a_plan_with_recomputation(kind):
    assert_changes_nothing(PLANS["fsdp 2 x tp 2"], kind, remat="attention")


def assert_changes_nothing(plan: Plan, kind: str, remat: str = "none") -> None:
    expected, true = three_steps(PLANS["one"], kind)
    answers = in_processes(plan.processes, in_a_world, plan, kind, remat)
    for numbers, _ in answers:
        for got, wanted in zip(numbers, expected):
            assert got == pytest.approx(wanted, rel=1e-9)
    for name, numbers in whole([held for _, held in answers], true).items():
        wanted = true[name][0][1]
        size = 1e-9 if name.startswith("model/") else 1e-9 * wanted.abs().max().item()
        torch.testing.assert_close(numbers, wanted, rtol=1e-9, atol=size)
