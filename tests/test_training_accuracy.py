"""metrics.accuracy: the share of labels that are the likeliest word, counted inside the loss, in steps and evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plans import HYBRID, PLANS, Plan, rows_of, state_of
from test_checkpoint_best import RECIPE
from worlds import in_processes

from longfire.cli import main
from longfire.config import settings
from longfire.data.pack import NO_LABEL
from longfire.device import Clock
from longfire.evaluation.evaluate import measure
from longfire.mixers.mixer import Sequence
from longfire.ops.cross_entropy import (
    CorrectLabels,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from longfire.parallel.axes import DATA
from longfire.parallel.mesh import ALONE, Mesh
from longfire.training.step import train_step

CPU = torch.device("cpu")
COUNTED = settings.Metrics(accuracy=True)


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_it_is_that_of_all_logits(chunk_tokens, softcap):
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(300, 8, generator=draw)
    weight_WD = torch.randn(11, 8, generator=draw)
    labels_N = torch.randint(11, (300,), generator=draw)
    labels_N[::3] = NO_LABEL
    logits_NW = hidden_ND @ weight_WD.T
    wanted = ((logits_NW.argmax(1) == labels_N) & (labels_N != NO_LABEL)).sum()
    counts = []
    for loss in (linear_cross_entropy, linear_cross_entropy_reference):
        correct = CorrectLabels()
        given = {"softcap": softcap, "chunk_tokens": chunk_tokens}
        counted = loss(hidden_ND, weight_WD, labels_N, correct=correct, **given)
        assert counted.equal(loss(hidden_ND, weight_WD, labels_N, **given)), "the loss is the same"
        counts.append(correct.count)
    assert counts == [wanted, wanted] and 0 < wanted < 200


def test_of_equally_likely_words_the_first_counts():
    correct = CorrectLabels()
    labels_N = torch.tensor([0, 1, 2])
    linear_cross_entropy(torch.zeros(3, 4), torch.ones(5, 4), labels_N, correct=correct)
    linear_cross_entropy(torch.zeros(3, 4), torch.ones(5, 4), labels_N, correct=correct)
    assert correct.count == 2


def accuracies(rank: int, plan: Plan) -> tuple[float, int]:
    """Of a step, and of an evaluation after it."""
    mesh = Mesh.of_degrees(plan.degrees, "cpu") if plan.processes > 1 else ALONE
    state = state_of(HYBRID, plan, mesh, torch.float64)
    each = 16 // mesh.size(*DATA)
    batch = rows_of(mesh.rank(*DATA) * each, each)
    numbers = train_step(
        state, batch.split(2), 0.05, settings.Training(), Clock(CPU), metrics=COUNTED
    )
    found = measure(state.model, [rows_of(80, 4)], np.ones(97, np.int64), 64, mesh)
    return numbers["accuracy"], found.correct


def test_of_a_step_it_is_the_share_of_its_labels():
    state = state_of(HYBRID, PLANS["one"], ALONE, torch.float64)
    batch = rows_of(0, 16)
    seq = Sequence(batch.positions_BT, batch.documents)
    with torch.no_grad():
        logits_BTW = state.model(batch.ids_BT, seq) @ state.model.head.weight.T
    real_BT = batch.labels_BT != NO_LABEL
    correct = ((logits_BTW.argmax(-1) == batch.labels_BT) & real_BT).sum()
    assert accuracies(0, PLANS["one"])[0] == correct / real_BT.sum()


PLANS_OF_ACCURACY = [
    pytest.param("tp 2, sequence", id="tp 2, sequence"),
    *(
        pytest.param(plan, marks=pytest.mark.slow)
        for plan in ("fsdp 2", "pp 2", "pp 2 x tp 2", "fsdp 2 x cp 2")
    ),
]


@pytest.mark.parametrize("plan", PLANS_OF_ACCURACY)
def test_a_plan_changes_no_accuracy(plan):
    """tp 2 shards the vocabulary: the likeliest word may be that of another process."""
    wanted = accuracies(0, PLANS["one"])
    answers = in_processes(PLANS[plan].processes, accuracies, PLANS[plan])
    assert answers == [pytest.approx(wanted)] * PLANS[plan].processes


@pytest.mark.parametrize("exact", [False, True])
def test_segments_count_each_label_once(exact):
    found = []
    for segments in (1, 4):
        state = state_of(("gla",), PLANS["one"], ALONE, torch.float64)
        training = settings.Training(tbptt_segments=segments, tbptt_exact=exact)
        batch = rows_of(0, 16).split(2)
        numbers = train_step(state, batch, 1e-3, training, Clock(CPU), metrics=COUNTED)
        found.append(numbers["accuracy"])
    assert found[0] == found[1]


def test_a_run_records_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(RECIPE)
    Path("text.txt").write_text("\n".join(f"number {i} is {i * i}. " * 3 for i in range(200)))
    Path("other.txt").write_text("OTHER LETTERS " * 100)
    train = ["train", "recipe.toml", "--training.steps", "4", "--metrics.accuracy"]
    assert main([*train, "--job.dump_folder", "run"]) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = [record["accuracy"] for record in records if "loss" in record]
    evaluations = [r["eval/other.txt/accuracy"] for r in records if "loss" not in r]
    assert len(steps) == 4 and all(0 <= share <= 1 for share in steps) and evaluations
    assert main([*train, "--distillation.teacher", "run"]) == 2
    assert "metrics.accuracy = true counts labels" in capsys.readouterr().err
