"""training/norms.py: norms of parameters, gradients and updates, under a plan as on one process."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import HYBRID, PLANS, Plan, rows_of, state_of
from test_checkpoint_best import RECIPE
from worlds import in_processes

from longfire.cli import main
from longfire.config import settings
from longfire.device import Clock
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import ALONE, Mesh
from longfire.training.step import train_step

CPU = torch.device("cpu")
EVERY_SECOND = settings.Metrics(norms_freq=2)


def numbers_of(rank: int, plan: Plan) -> list[dict[str, float]]:
    """Of two steps, clipped."""
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(HYBRID, plan, mesh, torch.float64, tie_word_embeddings=True)
    each = 16 // mesh.size(*DATA)
    found = []
    for _ in range(2):
        batch = rows_of(state.rows_consumed + mesh.rank(*DATA) * each, each)
        training = settings.Training(max_norm=0.05)
        numbers = train_step(
            state, batch.split(2), 1e-3, training, Clock(CPU), metrics=EVERY_SECOND
        )
        found.append(numbers)
    return found


def test_they_are_those_of_the_tensors():
    state = state_of(HYBRID, PLANS["one"], ALONE, torch.float64)
    plain = state_of(HYBRID, PLANS["one"], ALONE, torch.float64)
    before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    batch = rows_of(0, 16).split(2)
    measured = settings.Metrics(norms_freq=1)
    training = settings.Training(max_norm=0)
    numbers = train_step(state, batch, 1e-3, training, Clock(CPU), metrics=measured)
    assert train_step(plain, batch, 1e-3, training, Clock(CPU)).keys() < numbers.keys()
    squares = {"param": 0.0, "grad": 0.0, "update": 0.0}
    for name, parameter in plain.model.named_parameters():
        update = parameter.detach() - before[name]
        assert numbers[f"norms/param/{name}"] == pytest.approx(before[name].norm().item())
        assert numbers[f"norms/update/{name}"] == pytest.approx(update.norm().item())
        for what in squares:
            squares[what] += numbers[f"norms/{what}/{name}"] ** 2
    assert numbers["grad_norm"] == pytest.approx(squares["grad"] ** 0.5)
    assert numbers["param_norm"] == pytest.approx(squares["param"] ** 0.5)
    assert numbers["update_norm"] == pytest.approx(squares["update"] ** 0.5)


PLANS_OF_NORMS = [
    pytest.param("fsdp 2 x tp 2", id="fsdp 2 x tp 2"),
    *(
        pytest.param(plan, marks=pytest.mark.slow)
        for plan in ("fsdp 2", "hsdp 2x2", "pp 2 x fsdp 2", "cp 2", "pp 2 x tp 2")
    ),
]


@pytest.mark.parametrize("plan", PLANS_OF_NORMS)
def test_a_plan_changes_no_norm(plan):
    first, second = numbers_of(0, PLANS["one"])
    assert "param_norm" not in first and "loss_max" not in first
    for answer in in_processes(PLANS[plan].processes, numbers_of, PLANS[plan]):
        got = answer[1]
        assert got.keys() - {"loss_max"} == second.keys()
        for name, wanted in second.items():
            assert got[name] == pytest.approx(wanted, rel=1e-9, abs=1e-15), name
        if "dp_shard" in PLANS[plan].degrees:
            assert got["loss_max"] >= got["loss"]


def test_the_highest_loss_is_that_of_the_process_with_the_highest():
    parts = [part["loss_max"] for part, _ in in_processes(2, numbers_of, PLANS["fsdp 2"])]
    state = state_of(HYBRID, PLANS["one"], ALONE, torch.float64, tie_word_embeddings=True)
    halves = []
    for first in (0, 8):
        unmoved = replace(state, step=0, rows_consumed=0)
        numbers = train_step(
            unmoved, rows_of(first, 8).split(2), 0.0, settings.Training(), Clock(CPU)
        )
        halves.append(numbers["loss"])
    assert parts == [pytest.approx(max(halves), rel=1e-9)] * 2


def test_a_run_records_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(RECIPE)
    Path("text.txt").write_text("\n".join(f"number {i} is {i * i}. " * 3 for i in range(200)))
    Path("other.txt").write_text("OTHER LETTERS " * 100)
    words = ["--metrics.norms_freq", "2", "--training.steps", "4", "--job.dump_folder", "run"]
    assert main(["train", "recipe.toml", *words]) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    with_norms = {record["step"] for record in records if "norms/grad/embed.weight" in record}
    assert with_norms == {2, 4}
