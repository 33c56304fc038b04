"""Promise 14: each record splits the step and counts recompilations; waiting for data and late recompiles are warned about."""

import json

import pytest
import torch

from longfire.config import settings
from longfire.config.run import Run
from longfire.device import Clock
from longfire.launch import cxx_compiler
from longfire.parallel.apply import recompilations
from longfire.training.loop import train
from longfire.training.reporting import Report
from longfire.training.slowness import DATA_WAIT_LIMIT, QUIET_STEPS, WARMUP_STEPS, WINDOW_STEPS

PARTS = (
    "data_seconds",
    "forward_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "other_seconds",
)
FIELDS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "mfu",
    "data_wait_fraction",
    "seconds",
    "memory_bytes",
    "skipped_steps",
    "recompiles",
    *PARTS,
)


def test_the_records_of_a_run_split_each_step(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(
            f"document {number}: " + "the quick brown fox jumps over the lazy dog. " * 20
        )
    recipe = tmp_path / "run.toml"
    recipe.write_text(f"""
[job]
dump_folder = "{tmp_path}/run"
[model]
config = "model.json"
[data]
dataset = ["{text}"]
folder = "{tmp_path}/stores"
num_workers = 1
validation_fraction = 0.2
[tokenizer]
path = "bytes"
[training]
seq_len = 64
batch_size = 2
global_batch_size = 4
steps = 6
[lr_scheduler]
warmup_steps = 2
[eval]
tokens = 512
interval = 3
[checkpoint]
interval = 2
[metrics]
report = false
""")
    (tmp_path / "model.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 260,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
            }
        )
    )
    assert train(Run.compose(recipe, {})) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [s["step"] for s in steps] == list(range(1, 7))
    for s in steps:
        assert set(FIELDS) <= set(s)
        assert s["seconds"] == pytest.approx(sum(s[part] for part in PARTS), rel=1e-6), (
            "the parts are the whole step"
        )
        assert (
            all(s[part] >= 0 for part in PARTS)
            and s["forward_seconds"] > 0
            and s["backward_seconds"] > 0
        )
        assert s["data_wait_fraction"] == pytest.approx(s["data_seconds"] / s["seconds"])
        assert s["tokens_per_second"] == pytest.approx(4 * 64 / s["seconds"]) and 0 < s["mfu"] < 1.5
        assert s["memory_bytes"] > 2**20 and s["tokens"] == s["step"] * 4 * 64
    evaluations = [line for line in lines if "loss" not in line]
    assert [e["step"] for e in evaluations] == [3, 6]
    assert all(any(key.endswith("/bits_per_byte") for key in e) for e in evaluations)


def test_the_clock_gives_each_part_its_time_and_the_rest_to_other():
    clock = Clock(torch.device("cpu"))
    clock.read()
    for part in ("forward", "backward", "forward"):
        with clock(part):
            torch.randn(200, 200) @ torch.randn(200, 200)
    parts = clock.read()
    assert set(parts) >= {"seconds", "forward", "backward", "other"}
    assert parts["seconds"] == pytest.approx(
        sum(v for k, v in parts.items() if k != "seconds"), rel=1e-6
    )
    assert clock.read().get("forward", 0.0) == 0.0, "reading starts a new step"


def warnings_of(tmp_path, capsys, steps, values_of):
    with Report(tmp_path, settings.Metrics(log_freq=10**6), steps) as report:
        for step in range(1, steps + 1):
            report.record(
                step, {"loss": 1.0, "seconds": 1.0, "tokens_per_second": 1.0, **values_of(step)}
            )
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_waiting_for_data_is_warned_about_and_not_at_every_step(tmp_path, capsys):
    above = warnings_of(
        tmp_path,
        capsys,
        2 * QUIET_STEPS,
        lambda step: {"data_wait_fraction": DATA_WAIT_LIMIT + 0.01},
    )
    assert (
        len(above) == 2
        and f"step {WINDOW_STEPS}: 6% of the last" in above[0]
        and "data.num_workers" in above[0]
    )
    below = warnings_of(
        tmp_path,
        capsys,
        2 * QUIET_STEPS,
        lambda step: {"data_wait_fraction": DATA_WAIT_LIMIT - 0.01},
    )
    assert not below


def test_one_slow_batch_is_no_warning(tmp_path, capsys):
    assert not warnings_of(
        tmp_path, capsys, 300, lambda step: {"data_wait_fraction": 0.9 if step == 1 else 0.0}
    )


def test_recompiles_after_warm_up_are_warned_about_those_before_are_not(tmp_path, capsys):
    assert not warnings_of(
        tmp_path, capsys, 100, lambda step: {"recompiles": min(step, WARMUP_STEPS)}
    )
    late = warnings_of(tmp_path, capsys, 100, lambda step: {"recompiles": 3 if step < 60 else 5})
    assert len(late) == 1 and "step 60: torch.compile made 2 more graph(s), 5 in all" in late[0]


@pytest.mark.skipif(cxx_compiler() is None, reason="torch.compile needs a C++ compiler here")
def test_recompilations_are_counted():
    """A function that is made anew for each number of dimensions: one graph each. Graphs are counted before any kernel is made of
    them, so a backend that makes none will do."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
    before = recompilations()
    compiled(torch.ones(3))
    first = recompilations()
    compiled(torch.ones(3))
    assert recompilations() == first > before, "the same shape needs no new graph"
    compiled(torch.ones(3, 3))
    assert recompilations() > first
