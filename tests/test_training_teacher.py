"""training/teacher.py: each process holds its part of a teacher, read from any folder; one that cannot be shared is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import PLANS, whole
from sets import slow_unless
from small_runs import ONE_LAYER
from worlds import in_processes

from longfire.cli.entry import main
from longfire.config.run import Run
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.export import export
from longfire.launch import World
from longfire.model import on_meta
from longfire.parallel.mesh import Mesh
from longfire.parallel.sharding import placed_parameters, slices_of
from longfire.training.distillation import Distillation
from longfire.training.teacher import open_teacher, refuse_unshared, take

SETTINGS = {
    "model.config": "gla-340m",
    "training.device": "cpu",
    "training.seq_len": "16",
    "distillation.teacher": "teacher",
}


def run_of(plan: str, **given: str) -> Run:
    """A run under a plan, with a teacher in the folder `teacher`."""
    plan_ = PLANS[plan]
    degrees = {"dp_shard": 1, **plan_.degrees}
    keys = {"dp_shard": "data_parallel_shard", "tp": "tensor_parallel", "cp": "context_parallel"}
    settings = {f"parallelism.{keys[a]}_degree": str(n) for a, n in degrees.items()}
    return Run.compose(None, {**SETTINGS, **settings, **given}, world=World(plan_.processes))


def parts_here(rank: int, plan: str, folder: str):
    """By name, the slices of the teacher's parameters in this process."""
    run = run_of(plan, **{"distillation.teacher": folder})
    teacher = open_teacher(run, Mesh.of_degrees(PLANS[plan].degrees, "cpu"))
    found = {}
    for name, parameter, spec in placed_parameters(teacher):
        assert not parameter.requires_grad
        found[name] = [
            (one.begin, one.of_local(parameter.to_local()).clone())
            for one in slices_of(parameter, spec)
        ]
    return found


@pytest.mark.parametrize(
    ("plan", "kind"),
    slow_unless(
        lambda plan, kind: (plan, kind) in {("fsdp 2", "run"), ("fsdp 2 x tp 2", "weights")},
        [(plan, kind) for plan in ("fsdp 2", "fsdp 2 x tp 2") for kind in ("weights", "run")],
    ),
)
def test_the_parts_of_all_processes_are_the_teacher(plan, kind, tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "weights":
        teacher = tiny_model("attention", "gla", vocab_size=258, tie_word_embeddings=True)
        export(teacher, bytes_tokenizer(), Path("teacher"))
    else:
        Path("shape.toml").write_text(ONE_LAYER)
        Path("text.txt").write_text("a little text. " * 50)
        words = "train shape.toml --data.dataset text.txt --training.steps 1 --training.seq_len 16"
        assert main([*words.split(), "--job.dump_folder", "teacher"]) == 0
    one = Distillation.of_run(run_of("one"), Mesh())
    true = {name: p.detach() for name, p in one.teacher.named_parameters()}
    answers = in_processes(PLANS[plan].processes, parts_here, plan, "teacher")
    found = whole(answers, {name: [((), tensor)] for name, tensor in true.items()})
    for name, tensor in true.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("plan", "reason"),
    [("tp 2, sequence", "must divide the 3 heads"), ("cp 2", "does not divide its 3")],
)
def test_a_teacher_that_cannot_be_shared_is_refused(
    plan, reason, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()
    given = {"parallelism.context_parallel_strategy": "alltoall"} if plan == "cp 2" else {}
    run = run_of(plan, **given)
    shape = tiny_config("attention", hidden_size=48)
    mixers = {"attention": {"num_heads": 3, "num_kv_heads": 1}}
    with pytest.raises(SettingsError, match=reason) as caught:
        refuse_unshared(on_meta(replace(shape, mixers=mixers)), run)
    assert str(caught.value).startswith("distillation.teacher = '")


def test_a_part_that_is_missing_is_named(tiny_config, tiny_model):
    weights = dict(tiny_model("attention").named_parameters())
    del weights["layers.0.mlp.down_proj.weight"]
    teacher = on_meta(tiny_config("attention"))
    with pytest.raises(CheckpointError, match="there has no layers.0.mlp.down_proj.weight"):
        take(teacher, iter(weights.items()), torch.device("cpu"), "there")
