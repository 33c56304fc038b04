"""Promise 2: 2N steps equal N + N steps to the bit: metrics, parameters, optimizer; resumed twice, and after kill -9 at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from longfire.cli import main

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["gla", "gated_delta_net", "attention"],
    "intermediate_size": 48,
    "gla": {"num_heads": 2},
    "gated_delta_net": {"num_heads": 2, "head_dim": 8},
    "attention": {"num_heads": 2},
}
RECIPE = """
[model]
config = "shape.json"
compute_dtype = "float32"
[data]
dataset = ["one.jsonl", "two.jsonl"]
data_probs = [0.7, 0.3]
folder = "{folder}/stores"
varlen = true
validation_fraction = 0.1
[training]
seq_len = 48
batch_size = 2
gradient_accumulation_steps = 2
compile = "off"
threads = 1
[lr_scheduler]
warmup_steps = 3
[checkpoint]
interval = 1
keep_latest_k = 3
[eval]
interval = 7
tokens = 256
[metrics]
report = false
"""
# What may differ between two runs of the same steps: seconds and memory.
OF_THE_MACHINE = ("seconds", "tokens_per_second", "mfu", "data_wait_fraction", "memory_bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    words = ["fire", "long", "state", "gate", "delta", "ring", "chunk", "token", "row", "segment"]
    draw = random.Random(0)
    for name in ("one", "two"):
        lines = [
            json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(1, 60)))})
            for _ in range(200)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder


def start(folder: Path, run: str, steps: int, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "longfire",
        "train",
        "recipe.toml",
        "--job.dump_folder",
        str(folder / run),
    ]
    command += ["--training.steps", str(steps), *more]
    log = (folder / f"{run}.log").open("ab")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def finish(folder: Path, run: str, steps: int, *more: str) -> None:
    assert start(folder, run, steps, *more).wait(timeout=240) == 0, (
        folder / f"{run}.log"
    ).read_text()[-3000:]


def in_this_process(folder: Path, run: str, steps: int, *more: str) -> None:
    """Without the seconds that a new process takes to start: those who hurt a process start one."""
    words = ["--job.dump_folder", str(folder / run), "--training.steps", str(steps), *more]
    assert main(["train", str(folder / "recipe.toml"), *words]) == 0


def records(folder: Path, run: str) -> list[dict]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.endswith(OF_THE_MACHINE)} for r in kept]


def parameters(folder: Path, run: str, step: int) -> dict:
    files = sorted((folder / run / "checkpoints" / f"step-{step}").rglob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_run(folder: Path, a: str, b: str, steps: int) -> None:
    ours, theirs = records(folder, a), records(folder, b)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for x, y in zip(ours, theirs):
        assert x == y
    one, two = parameters(folder, a, steps), parameters(folder, b, steps)
    assert one.keys() == two.keys()
    assert any("exp_avg_sq" in name for name in one), "the optimizer is part of the comparison"
    for name in one:
        assert one[name].equal(two[name]), name


def steps_done(folder: Path, run: str) -> int:
    path = folder / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_twice_resumed_equals_straight(folder):
    constant = (
        "--lr_scheduler.name",
        "constant",
    )  # the one schedule that does not look at the run's length
    in_this_process(folder, "straight", 12, *constant)
    for steps in (5, 8, 12):
        in_this_process(folder, "in-three", steps, *constant)
    finals = [r["step"] for r in records(folder, "in-three") if "eval/one.jsonl/loss" in r]
    assert finals, "evaluations are in the records"
    ours, theirs = (
        [r for r in records(folder, run) if "loss" in r] for run in ("straight", "in-three")
    )
    assert ours == theirs
    one, two = parameters(folder, "straight", 12), parameters(folder, "in-three", 12)
    assert all(one[name].equal(two[name]) for name in one) and one.keys() == two.keys()


def test_sigterm_finishes_the_step_saves_and_resumes(folder):
    in_this_process(folder, "whole", 40)
    process = start(folder, "stopped", 40)
    while steps_done(folder, "stopped") < 4:
        assert process.poll() is None, (folder / "stopped.log").read_text()[-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "SIGTERM" in (folder / "stopped.log").read_text()
    in_this_process(folder, "stopped", 40)
    assert_same_run(folder, "whole", "stopped", 40)


@pytest.mark.parametrize(
    ("kills", "steps"),
    [pytest.param(7, 60, marks=pytest.mark.slow), pytest.param(22, 160, marks=pytest.mark.matrix)],
)
@pytest.mark.timeout(1500)
def test_killed_at_random_moments_and_resumed_each_time(folder, kills, steps):
    """SIGKILLs while steps run and checkpoints (one a step) are written; then the run is compared with an unbroken one. (Fifty kills
    of two processes: tests/faults.)"""
    finish(folder, "unbroken", steps)
    draw = random.Random(7)
    for kill in range(kills):
        before, process = steps_done(folder, "killed"), start(folder, "killed", steps)
        target, deadline = before + draw.randint(1, 6), time.monotonic() + 60
        while steps_done(folder, "killed") < target and time.monotonic() < deadline:
            assert process.poll() is None, (kill, (folder / "killed.log").read_text()[-3000:])
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finish(folder, "killed", steps)
    assert_same_run(folder, "unbroken", "killed", steps)
