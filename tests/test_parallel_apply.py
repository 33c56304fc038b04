"""parallel/apply.py: one process that keeps its parameters on the host."""

import json
from pathlib import Path

import pytest
import torch
from plans import HYBRID, PLANS, parts, state_of, steps
from safetensors.torch import load_file
from worlds import in_processes

from longfire.cli import main
from longfire.config import settings
from longfire.parallel import mesh as meshes
from longfire.parallel.mesh import ALONE, Mesh

RECIPE = """
[model]
config = "shape.json"
compute_dtype = "float32"
[tokenizer]
path = "bytes"
[data]
dataset = ["text.txt"]
[training]
seq_len = 32
batch_size = 2
gradient_accumulation_steps = 2
steps = 4
compile = "off"
threads = 1
[lr_scheduler]
name = "constant"
warmup_steps = 1
[checkpoint]
interval = 2
export = true
[metrics]
report = false
"""
SHAPE = {
    "model_type": "longfire",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["gla", "attention"],
    "intermediate_size": 48,
    "gla": {"num_heads": 2},
    "attention": {"num_heads": 2},
}


def three_steps(rank: int, plan: str):
    mesh = Mesh.of_degrees(PLANS[plan].degrees, "cpu")
    state = state_of(HYBRID, PLANS[plan], mesh)
    return steps(state, 3), parts(state), mesh.has_whole_parameters


def test_one_process_that_offloads_takes_the_steps_of_one_that_does_not():
    """To the bit: FSDP2 copies parameters there and back."""
    (found,) = in_processes(1, three_steps, "one, offloaded")
    state = state_of(HYBRID, PLANS["one"], ALONE)
    assert found[0] == steps(state, 3)
    for name, boxes in parts(state).items():
        for (_, wanted), (_, got) in zip(boxes, found[1][name], strict=True):
            assert torch.equal(got, wanted), name
    assert not found[2]


def typed(rank: int, folder: Path, out: str, *words: str) -> int:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # that of in_processes
    dump = ["--job.dump_folder", str(folder / out)]
    return main(["train", str(folder / "recipe.toml"), *dump, *words])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    (tmp_path / "text.txt").write_text("a few words of text\n" * 100)
    return tmp_path


def test_a_run_that_offloads_resumes_and_exports_what_a_plain_one_does(folder):
    offloaded = ["--parallelism.cpu_offload"]
    assert typed(0, folder, "plain") == 0
    assert in_processes(1, typed, folder, "other", *offloaded, "--training.steps", "2") == [0]
    assert in_processes(1, typed, folder, "other", *offloaded) == [0]
    weights = [load_file(folder / name / "hf/model.safetensors") for name in ("plain", "other")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def joined_alone(rank: int, folder: Path) -> bool:
    from longfire.launch import World

    torch.distributed.destroy_process_group()
    degrees = {"dp_shard": 1}
    device = torch.device("cpu")
    with meshes.joined(World(1), degrees, settings.Comm(), device, offloads=True) as mesh:
        had_group = mesh.device_mesh is not None
    return had_group and not torch.distributed.is_initialized()


def test_the_group_of_one_process_ends_with_the_run(tmp_path):
    assert in_processes(1, joined_alone, tmp_path) == [True]


def test_an_export_without_a_checkpoint_is_refused(folder, capsys):
    words = ["--parallelism.cpu_offload", "--checkpoint.enable_checkpoint", "false"]
    assert typed(0, folder, "refused", *words) == 2
    assert "parallelism.cpu_offload" in capsys.readouterr().err
