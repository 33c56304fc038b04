"""optim/average.py: the average by its formula, under FSDP, in checkpoints, in evaluations and exports."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plans import HYBRID, OPTIMIZER, PLANS, Plan, rows_of, state_of, steps
from safetensors.torch import load_file
from small_runs import ONE_LAYER
from worlds import in_processes

from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.weights import open_model
from longfire.cli import main
from longfire.config import settings
from longfire.errors import CheckpointError
from longfire.evaluation.evaluate import measure
from longfire.optim import averages_in_place
from longfire.parallel.apply import reshard
from longfire.parallel.mesh import ALONE, Mesh

AVERAGED = replace(OPTIMIZER, ema_decay=0.9)
RECIPE = f"""
{ONE_LAYER}
[data]
dataset = ["text.txt"]
folder = "stores"
validation_fraction = 0.2
split_documents = "lines"
[tokenizer]
path = "bytes"
[training]
seq_len = 32
batch_size = 2
steps = 6
compile = "off"
threads = 1
[optimizer]
lr = 1e-2
ema_decay = 0.8
[lr_scheduler]
name = "constant"
[checkpoint]
interval = 3
export = true
[eval]
interval = 3
tokens = 512
[metrics]
report = false
"""


def test_it_is_the_average_of_its_formula():
    state = state_of(HYBRID, PLANS["one"], ALONE, torch.float64, AVERAGED)
    wanted: dict[str, torch.Tensor] = {}
    for _ in range(4):
        steps(state, 1)
        for name, parameter in state.model.named_parameters():
            now = parameter.detach()
            wanted[name] = 0.9 * wanted[name] + 0.1 * now if name in wanted else now.clone()
    for name, parameter in state.model.named_parameters():
        average = state.optimizer.state[parameter]["ema"]
        torch.testing.assert_close(average, wanted[name], rtol=1e-12, atol=1e-15)


def test_weights_come_back_to_the_bit():
    state = state_of(HYBRID, PLANS["one"], ALONE, optimizer=AVERAGED)
    steps(state, 2)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with averages_in_place(state.optimizer):
        now = state.tensors()
        assert now["model/norm.weight"].equal(before["optimizer/ema/norm.weight"])
    assert all(tensor.equal(before[name]) for name, tensor in state.tensors().items())


def evaluated(rank: int, plan: Plan):
    """Two steps, an evaluation of the average, one more step."""
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(HYBRID, plan, mesh, torch.float64, AVERAGED)
    steps(state, 2)
    reshard(state.model)
    with averages_in_place(state.optimizer):
        found = measure(state.model, [rows_of(80, 4)], np.ones(97, np.int64), 64, mesh).numbers()
    return found, steps(state, 1)


@pytest.mark.parametrize("plan", ["fsdp 2, never resharded"])
def test_an_evaluation_of_the_average_under_fsdp(plan):
    found, said = evaluated(0, PLANS["one"])
    for answer in in_processes(2, evaluated, PLANS[plan]):
        assert answer[0] == pytest.approx(found, rel=1e-9)
        assert answer[1][0] == pytest.approx(said[0], rel=1e-9)


def evaluations_of(run: str) -> list[dict]:
    records = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" not in record]


def test_a_run_resumes_to_the_bit_and_exports_its_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(RECIPE)
    Path("text.txt").write_text("\n".join(f"number {i} is {i * i}. " * 3 for i in range(200)))
    train = ["train", "recipe.toml", "--job.dump_folder"]
    assert main([*train, "whole"]) == 0
    assert main([*train, "parts", "--training.steps", "3"]) == main([*train, "parts"]) == 0
    last = "checkpoints/step-6/shard-00000-optimizer.safetensors"
    ours, theirs = load_file(Path("parts", last)), load_file(Path("whole", last))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    evaluations = evaluations_of("whole")
    assert evaluations and evaluations == evaluations_of("parts")
    average = ours["optimizer/ema/embed.weight"]
    assert open_model(Path("whole")).model.embed.weight.equal(average)
    exported = load_file(next(Path("whole/hf").glob("*.safetensors")))
    assert exported["model.embed_tokens.weight"].equal(average)

    assert main([*train, "plain", "--eval.ema", "false"]) == 0
    weights = load_file(Path("whole/checkpoints/step-6/shard-00000-model.safetensors"))
    assert open_model(Path("plain")).model.embed.weight.equal(weights["model/embed.weight"])
    assert not weights["model/embed.weight"].equal(average)


def test_a_checkpoint_of_weights_alone_has_the_average_too(tmp_path):
    chosen = settings.Checkpoint(async_mode="disabled", model_weights_only=True)
    state = state_of(("attention",), PLANS["one"], ALONE, optimizer=AVERAGED)
    steps(state, 2)
    Checkpoints(tmp_path, chosen, uses_average=True).save(state, last=True)
    read = load_model_weights(tmp_path / "step-2")
    for name, parameter in state.model.named_parameters():
        assert read[name].equal(state.optimizer.state[parameter]["ema"])


@pytest.mark.parametrize(("saved", "resumed"), [(0.9, 0.0), (0.0, 0.9)])
def test_a_run_that_begins_or_ends_its_average_is_refused(tmp_path, saved, resumed):
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode="disabled"))
    first, second = (replace(OPTIMIZER, ema_decay=decay) for decay in (saved, resumed))
    state = state_of(("attention",), PLANS["one"], ALONE, optimizer=first)
    steps(state, 1)
    checkpoints.save(state)
    other = state_of(("attention",), PLANS["one"], ALONE, optimizer=second)
    with pytest.raises(CheckpointError, match="set optimizer.ema_decay as the run was begun with"):
        checkpoints.restore(other)


def test_a_finished_run_gives_its_weights_when_it_is_started_with_another_choice(
    tmp_path, monkeypatch
):
    """The last checkpoint is saved anew, for those who read it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    Path("text.txt").write_text("\n".join(f"number {i} is {i * i}. " * 3 for i in range(200)))
    train = ["train", "recipe.toml", "--job.dump_folder", "run"]
    place = tmp_path / "run/checkpoints/step-6"
    assert main(train) == 0
    averages = load_model_weights(place)
    assert main([*train, "--eval.ema", "false"]) == 0
    weights = load_model_weights(place)
    assert any(not weights[name].equal(averages[name]) for name in weights)
    assert main(train) == 0
    again = load_model_weights(place)
    assert all(again[name].equal(averages[name]) for name in averages)
