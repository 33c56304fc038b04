"""planner/teacher.py: a plan counts the teacher's shards, what it gathers, computes and gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longfire.config import settings
from longfire.config.run import Run
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import SettingsError
from longfire.huggingface.export import export
from longfire.initialise import build
from longfire.launch import World
from longfire.parallel import cost
from longfire.planner.planner import Planner

H100 = cost.DEVICES["h100-80gb"]
SHAPE = {"vocab_size": 258, "intermediate_size": 64}


@pytest.fixture
def plan_of(tmp_path, tiny_config, monkeypatch):
    """A planner of a run with so many processes along each axis, and a teacher of its own shape."""
    monkeypatch.chdir(tmp_path)
    teacher = build(tiny_config("attention", "gla", **SHAPE), 0)
    export(teacher, bytes_tokenizer(), Path("teacher"))

    def planner(shards: int, tp: int = 1, **given: str) -> Planner:
        words = {
            "model.config": "teacher",
            "training.seq_len": "64",
            "training.batch_size": "2",
            "training.loss_chunk_tokens": "32",
            "distillation.teacher": "teacher",
            "parallelism.data_parallel_shard_degree": str(shards),
            "parallelism.tensor_parallel_degree": str(tp),
            **given,
        }
        return Planner(Run.compose(None, words, world=World(shards * tp)), H100, "float32")

    return planner


def without_teacher(planner: Planner) -> Planner:
    run = replace(planner.run, distillation=settings.Distillation())
    return Planner(run, H100, "float32")


@pytest.mark.parametrize(("shards", "tp"), [(1, 1), (4, 1), (2, 2)])
def test_the_teacher_is_held_in_the_shards_of_the_student(plan_of, shards, tp):
    """The teacher has the student's shape here, so its parameters take as much again."""
    planner = plan_of(shards, tp)
    own = planner.forecast(planner.of_recipe())
    plain = without_teacher(planner)
    bare = plain.forecast(plain.of_recipe())
    assert own.peak.parameters == 2 * bare.peak.parameters
    assert own.peak.total > bare.peak.total + bare.peak.parameters
    of_forward = bare.flops / 3
    assert own.parts["compute"] / bare.parts["compute"] == pytest.approx(
        1 + of_forward / bare.flops
    )
    sent = {one.what: one.bytes for one in own.collectives}
    if shards > 1:
        one_gathering = sum(p.numel() for p in planner.model.parameters()) * 4 / tp
        assert sent["teacher: all-gather"] == pytest.approx(
            one_gathering * (shards - 1) / shards, rel=0.02
        )
    else:
        assert "teacher: all-gather" not in sent


def test_the_divergence_holds_more_logits_than_the_loss(plan_of):
    planner = plan_of(1)
    cost_ = planner.teacher_cost(planner.of_recipe())
    assert cost_.logits == 5 * 4 * 32 * 258
    hidden = plan_of(1, **{"distillation.kind": "hidden"})
    assert hidden.teacher_cost(hidden.of_recipe()).logits == 0


def test_no_plan_with_a_pipeline_or_heads_that_do_not_divide(plan_of):
    planner = plan_of(4)
    assert {plan.pp for plan in planner.candidates()} == {1}
    assert planner.teacher is not None
    planner.teacher.layers[0].mixer.heads = 3
    with pytest.raises(SettingsError, match="distillation.teacher: .* must divide the 3 heads"):
        raise SettingsError("; ".join(planner.refusals(2, 64)))
    assert torch.float32 == planner.teacher.compute_dtype
