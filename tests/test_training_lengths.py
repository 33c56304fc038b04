"""Rows that grow with the steps: what the schedule says, what it refuses, and runs through a change of length and RoPE base."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from logged import logged_to

from longfire.checkpoint.weights import open_model
from longfire.config.options import Scoring
from longfire.config.run import Run
from longfire.config.settings import Training
from longfire.errors import SettingsError
from longfire.evaluation.scores import measure_run, sequence_length
from longfire.huggingface.export import export_run
from longfire.mixers.mixer import Sequence
from longfire.training.lengths import Stage, stage_at, stage_of_model, stages
from longfire.training.loop import train

pytestmark = pytest.mark.dtype

SCHEDULE = "0:8,3:16,5:32:500000"


def folder_with(tmp_path: Path, *layer_types: str, **changes) -> Path:
    """A model config and some text."""
    shape = tiny_config(*layer_types, vocab_size=0, max_position_embeddings=16, **changes)
    (tmp_path / "shape.json").write_text(json.dumps(shape.to_dict()))
    lines = [json.dumps({"text": f"{i}: " + "the ring of fire " * (i % 7 + 3)}) for i in range(80)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path


def run_in(folder: Path, name: str, **changes: str) -> Run:
    given = {
        "model.config": folder / "shape.json",
        "data.dataset": folder / "text.jsonl",
        "data.folder": folder / "stores",
        "data.validation_fraction": 0.1,
        "data.prefetch_factor": 0,
        "job.dump_folder": folder / name,
        "training.seq_len": 32,
        "training.batch_size": 2,
        "training.steps": 7,
        "training.compile": "off",
        "lr_scheduler.warmup_steps": 1,
        "lr_scheduler.name": "constant",
        "eval.tokens": 128,
        "metrics.report": "false",
        "checkpoint.async_mode": "disabled",
        "model.compute_dtype": "float32",
    }
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return Run.compose(None, {key: str(value) for key, value in given.items()})


def trained(folder: Path, name: str, notes: list[str] | None = None, **changes: str) -> list[dict]:
    """Train, and what metrics.jsonl then says of each step."""
    with logged_to(notes if notes is not None else []):
        assert train(run_in(folder, name, **changes)) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_stages_of_a_schedule():
    training = Training(seq_len=32, seq_len_schedule=("0:8", "3:16:1000", "5:32"))
    assert stages(training) == (Stage(0, 8), Stage(3, 16, 1000.0), Stage(5, 32, 1000.0)), (
        "a base holds until another one"
    )
    assert [stage_at(training, step).seq_len for step in range(7)] == [8, 8, 8, 16, 16, 32, 32]
    assert [stage_of_model(training, step).seq_len for step in (0, 3, 4, 6)] == [8, 8, 16, 32]
    assert stages(Training(seq_len=32)) == (Stage(0, 32),)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"training.seq_len_schedule": "1:8,3:32"}, "begins at step 0"),
        ({"training.seq_len_schedule": "0:8,0:32"}, "after the one before"),
        ({"training.seq_len_schedule": "0:8,x:32"}, "STEP:LENGTH"),
        ({"training.seq_len_schedule": "0:8,3:32:0"}, "above 0"),
        ({"training.seq_len_schedule": "0:8,3:64"}, "training.seq_len = 32: set that to 64"),
        ({"training.seq_len_schedule": "0:12,3:32"}, "take 8"),
        ({"training.seq_len_schedule": "0:32"}, "max_position_embeddings = 16"),
        ({"model.rope_theta": "5e5", "model.config": "bare"}, "no layer"),
        ({"training.tbptt_segments": "40", "model.rope_theta": "5e5"}, "at most that"),
        ({"training.tbptt_exact": "true", "model.rope_theta": "5e5"}, "tbptt_segments = 1"),
        (
            {"training.tbptt_segments": "2", "model.rope_theta": "5e5", "training.compile": "on"},
            "compiled anew",
        ),
        ({"training.tbptt_segments": "2", "model.config": "dynamic"}, "dynamic"),
        ({"training.tbptt_segments": "2", "model.config": "drops"}, "dropout = 0.1"),
        ({"training.tbptt_segments": "2", "distillation.teacher": "."}, "whole sequences"),
    ],
)
def test_what_cannot_be_is_refused_with_its_mend(tmp_path, changes, said):
    own = {"num_heads": 4, "rope": "dynamic", "rope_original_length": 16}
    shapes = {
        "bare": tiny_config("gla", vocab_size=0),
        "dynamic": tiny_config(
            "gla", "attention", vocab_size=0, mixers={"gla": {"num_heads": 2}, "attention": own}
        ),
        "drops": tiny_config(
            "attention", vocab_size=0, mixers={"attention": {"num_heads": 4, "dropout": 0.1}}
        ),
    }
    for name, shape in shapes.items():
        (tmp_path / name).write_text(json.dumps(shape.to_dict()))
    if name := changes.get("model.config"):
        changes = changes | {"model.config": str(tmp_path / name)}
    with pytest.raises(SettingsError, match=said):
        run_in(
            folder_with(tmp_path),
            "run",
            **{key.replace(".", "__"): value for key, value in changes.items()},
        )


def test_a_change_of_length_resumes_to_the_bit_and_counts_the_same_tokens(tmp_path, capsys):
    """2N = N + N, stopped before, at and behind each change; tokens a step are those of rows that have one length."""
    folder, notes = folder_with(tmp_path), []
    straight = trained(folder, "straight", notes, training__seq_len_schedule=SCHEDULE)
    for steps in (2, 3, 4, 6, 7):
        parts = trained(
            folder, "parts", training__seq_len_schedule=SCHEDULE, training__steps=str(steps)
        )
    message = ("step", "loss", "grad_norm", "lr", "tokens", "eval/text.jsonl/loss")
    steps_of = [
        [{key: r[key] for key in message if key in r} for r in records if "loss" in r]
        for records in (straight, parts)
    ]
    assert steps_of[0] == steps_of[1] and len(steps_of[0]) == 7
    weights = [open_model(folder / name, 7).model.state_dict() for name in ("straight", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    plain = trained(folder, "plain", model__rope_theta="10000")
    assert [r["tokens"] for r in straight if "loss" in r] == [
        r["tokens"] for r in plain if "loss" in r
    ]
    assert (
        "step 5: sequences of 32 tokens from here on, RoPE base 500000" in capsys.readouterr().out
    )
    assert any("from step 0: 8 sequences of 8 tokens" in note for note in notes)


def test_checkpoints_and_exports_carry_the_base_that_was_last_trained_with(tmp_path):
    folder = folder_with(tmp_path, "attention")
    trained(
        folder,
        "run",
        training__seq_len_schedule=SCHEDULE,
        checkpoint__interval="1",
        checkpoint__export="true",
    )
    for step, theta in ((5, 10000.0), (6, 500000.0), (7, 500000.0)):
        mixer = open_model(folder / "run", step).model.layers[0].mixer
        assert mixer.rotary.theta == mixer.config.rope_theta == theta
    config = json.loads((folder / "run" / "hf" / "config.json").read_text())
    assert (
        config["rope_parameters"]["rope_theta"] == 500000
        and config["max_position_embeddings"] == 32
    )
    export_run(folder / "run", 5, folder / "early")
    assert (
        json.loads((folder / "early" / "config.json").read_text())["rope_parameters"]["rope_theta"]
        == 10000
    )


def test_evaluation_afterwards_takes_the_rows_of_the_step_as_training_does(tmp_path):
    folder = folder_with(tmp_path)
    trained(
        folder,
        "run",
        training__seq_len_schedule=SCHEDULE,
        checkpoint__interval="1",
        checkpoint__keep_latest_k="0",
    )
    for step in (1, 7):
        opened = open_model(folder / "run", step)
        wanted = stage_of_model(opened.run.training, step).seq_len
        assert (
            sequence_length(opened, Scoring()) == wanted
            and sequence_length(opened, Scoring(seq_len=5)) == 5
        )
        assert len(measure_run(opened, Scoring())["text.jsonl"].count_C) == wanted
    assert wanted == 32


def test_a_schedule_goes_on_with_the_batch_that_it_was_begun_with(tmp_path):
    folder = folder_with(tmp_path)
    trained(folder, "run", training__seq_len_schedule=SCHEDULE, training__steps="4")
    with pytest.raises(SettingsError, match="batch"):
        trained(folder, "run", training__seq_len_schedule=SCHEDULE, training__batch_size="4")


@pytest.mark.parametrize("kind", ["a run", "an export"])
def test_a_short_checkpoint_goes_on_at_a_longer_context(tmp_path, kind, in_fp32):
    """Where the base stays, short positions begin where they were; with another one the new run's model and config have it."""
    folder = folder_with(tmp_path, "attention")
    trained(folder, "short", training__seq_len="16", checkpoint__export="true")
    weights = folder / "short" / ("hf" if kind == "an export" else "")
    there = open_model(weights).model
    ids_BT = torch.arange(16)[None]
    for name, theta in (("same", 10000.0), ("larger", 500000.0)):
        trained(
            folder,
            name,
            model__config=str(weights),
            model__weights=str(weights),
            model__rope_theta=str(theta),
            training__steps="1",
            optimizer__lr="1e-30",
            checkpoint__export="true",
        )
        here = open_model(folder / name).model
        moved = (here.logits(here(ids_BT)) - there.logits(there(ids_BT))).abs().max()
        assert moved < 1e-5 if name == "same" else moved > 1e-4
        assert here.config.max_position_embeddings == 32
        config = json.loads((folder / name / "hf" / "config.json").read_text())
        assert (
            config["rope_parameters"]["rope_theta"] == theta
            and config["max_position_embeddings"] == 32
        )
    assert (
        here.layers[0].mixer.rotary.theta == 500000
        and here(ids_BT, Sequence(torch.arange(16)[None])).shape[1] == 16
    )


def test_segments_are_a_setting_of_a_run(tmp_path):
    """Exact: the losses are those of whole rows. Truncated: the first is, since the forward is the same."""
    folder = folder_with(tmp_path, "gla", "gated_delta_net")
    whole, exact, truncated = (
        [
            r["loss"]
            for r in trained(folder, name, **settings, data__varlen="true", optimizer__lr="1e-2")
            if "loss" in r
        ]
        for name, settings in {
            "whole": {},
            "exact": {"training__tbptt_segments": "3", "training__tbptt_exact": "true"},
            "truncated": {"training__tbptt_segments": "3"},
        }.items()
    )
    assert exact == pytest.approx(whole, rel=1e-5)
    assert truncated[0] == pytest.approx(whole[0], rel=1e-6) and truncated[-1] != pytest.approx(
        whole[-1], rel=1e-5
    )


def test_a_run_goes_on_with_the_schedule_that_it_was_begun_with(tmp_path):
    folder, notes = folder_with(tmp_path, "gla"), []
    trained(folder, "run", notes, training__steps=2, training__seq_len_schedule="0:8,3:32")
    assert any("from step 3" in line and "this run ends before that" in line for line in notes)
    for other in ("0:8,4:32", ""):
        with pytest.raises(
            SettingsError, match=r"was begun with \['0:8', '3:32'\].*model.weights = "
        ):
            train(run_in(folder, "run", training__steps=3, training__seq_len_schedule=other))
    trained(folder, "run", training__steps=4, training__seq_len_schedule="0:8,3:32")
