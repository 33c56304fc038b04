"""start.py, and how a run goes on: what it begins with, asked to stop, gone back, finished, without anything to learn from."""

import json
import os
import shutil
import signal
import tomllib
from pathlib import Path

import pytest

from longfire.cli import main
from longfire.config.run import Run
from longfire.data import background
from longfire.data.tokens import TokenStore
from longfire.data.validation import is_validation
from longfire.evaluation import evaluate
from longfire.training.loop import train as train_run

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "layer_types": ["gla"],
    "intermediate_size": 16,
    "gla": {"num_heads": 2},
}
SETTINGS = {
    "model.config": "shape.json",
    "data.dataset": "texts.jsonl",
    "data.folder": "stores",
    "data.validation_fraction": 0.3,
    "data.num_workers": 1,
    "data.prefetch_factor": 0,
    "training.seq_len": 16,
    "training.batch_size": 1,
    "training.compile": "off",
    "training.threads": 1,
    "lr_scheduler.warmup_steps": 1,
    "checkpoint.interval": 2,
    "checkpoint.keep_latest_k": 0,
    "eval.at_end": "false",
    "eval.tokens": 256,
    "metrics.report": "false",
    "job.dump_folder": "run",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = [f"document {i} of the long fire" for i in range(60)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("letters.jsonl").write_text(
        "".join(json.dumps({"text": letter}) + "\n" for letter in "abcdefgh" * 9)
    )
    Path("shape.json").write_text(json.dumps(SHAPE))
    return tmp_path


def train(capsys, code: int = 0, **settings: object) -> str:
    """`longfire train`, what it said."""
    given = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    assert main(["train", *(f"--{key}={value}" for key, value in given.items())]) == code
    out, err = capsys.readouterr()
    return out + err


def records() -> list[dict]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def evaluations() -> list[int]:
    return [record["step"] for record in records() if "loss" not in record]


def checkpoints() -> list[int]:
    return sorted(int(path.name[5:]) for path in Path("run/checkpoints").glob("step-*"))


def test_a_start_says_where_weights_and_ids_come_from(folder, capsys):
    said = train(capsys, training__steps=1, training__seed=7)
    assert said.count("weights: ") == said.count("tokenizer: ") == 1
    assert "weights: fresh, initialised with training.seed = 7" in said
    assert "tokenizer: bytes, 258 entries, no BOS, EOS <eos> after each" in said
    said = train(capsys, training__steps=2, training__seed=7, tokenizer__add_bos="true")
    assert (
        said.count("weights: ") == 1 and "weights: resuming from run/checkpoints/step-1: " in said
    )
    assert "BOS <bos> before each document, EOS <eos> after each" in said


def test_load_step_is_done_once(folder, capsys):
    """It was kept in run.toml, and every start went back."""
    train(capsys, training__steps=6)
    assert "resuming from run/checkpoints/step-2" in train(
        capsys, training__steps=8, checkpoint__load_step=2
    )
    assert tomllib.loads(Path("run/run.toml").read_text())["checkpoint"]["load_step"] == -1
    said = train(capsys, training__steps=10, checkpoint__load_step=2)
    assert "resuming from run/checkpoints/step-8" in said
    assert "checkpoint.load_step = 2 was done before, and this run has continued to step 8" in said
    assert "add --checkpoint.load_step_again" in said
    said = train(
        capsys, training__steps=6, checkpoint__load_step=2, checkpoint__load_step_again="true"
    )
    assert "resuming from run/checkpoints/step-2" in said
    assert tomllib.loads(Path("run/run.toml").read_text())["checkpoint"]["load_step_again"] is False
    assert "resuming from run/checkpoints/step-4" in train(
        capsys, training__steps=6, checkpoint__load_step=4
    )


def test_a_restart_of_the_launcher_does_not_go_back_again(folder, capsys, monkeypatch):
    train(capsys, training__steps=6)
    train(capsys, training__steps=4, checkpoint__load_step=2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = {"checkpoint__load_step": 2, "checkpoint__load_step_again": "true"}
    assert "resuming from run/checkpoints/step-4" in train(capsys, training__steps=6, **again)


def test_a_load_step_that_an_older_run_toml_kept_is_no_request(folder, capsys):
    train(capsys, training__steps=6)
    file = Path("run/run.toml")
    file.write_text(file.read_text().replace("load_step = -1", "load_step = 2"))
    assert main(["train", "run/run.toml", "--training.steps=7"]) == 0
    assert "resuming from run/checkpoints/step-6" in capsys.readouterr().out


def stopped_in_evaluation(monkeypatch, at_batch: int) -> None:
    """SIGTERM comes while the so many-th batch of an evaluation is computed."""
    losses, seen = evaluate.losses, []

    def slow(*words):
        seen.append(1)
        if len(seen) == at_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*words)

    monkeypatch.setattr(evaluate, "losses", slow)


def test_sigterm_in_an_evaluation_is_heeded_and_the_step_was_saved_before(
    folder, capsys, monkeypatch
):
    train(
        capsys, training__steps=8, eval__interval=2, eval__at_end="true", job__dump_folder="whole"
    )
    with monkeypatch.context() as patch:
        stopped_in_evaluation(patch, at_batch=20)
        said = train(
            capsys, 128 + signal.SIGTERM, training__steps=8, eval__interval=2, eval__at_end="true"
        )
    assert "the evaluation of step 4 was stopped" in said
    assert "SIGTERM: stopped after step 4, saved" in said
    assert checkpoints() == [2, 4] and evaluations() == [2]
    train(capsys, training__steps=8, eval__interval=2, eval__at_end="true")
    assert evaluations() == [2, 4, 6, 8], "the one that was stopped is made up for"
    whole = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(records(), whole, strict=True):
        assert {k: v for k, v in ours.items() if k in ("step", "loss") or "eval" in k} == {
            k: v for k, v in theirs.items() if k in ("step", "loss") or "eval" in k
        }


def test_sigterm_in_the_last_evaluation_is_heeded(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_in_evaluation(patch, at_batch=3)
        train(capsys, 128 + signal.SIGTERM, training__steps=2, eval__at_end="true")
    assert evaluations() == [] and checkpoints() == [2]
    train(capsys, training__steps=2, eval__at_end="true")
    assert evaluations() == [2]


def test_sigterm_while_streamed_text_is_waited_for(folder, capsys, monkeypatch):
    """The store does not grow: nobody would come back."""
    looks = []

    def refresh(store):
        looks.append(store)
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(looks) < 1000, "the waiting does not end"

    monkeypatch.setattr(TokenStore, "refresh", refresh)
    monkeypatch.setattr(TokenStore, "complete", property(lambda store: False))
    monkeypatch.setattr(background.BackgroundPreparation, "check", lambda self, stores: None)
    for prefetched in (0, 2):
        looks.clear()
        said = train(
            capsys,
            128 + signal.SIGTERM,
            training__steps=1000,
            data__streaming="true",
            data__prefetch_factor=prefetched,
            job__dump_folder=f"run-{prefetched}",
            data__folder=f"stores-{prefetched}",
        )
        assert (
            "SIGTERM: stopped after step " in said and ", saved; the same command resumes" in said
        )


def test_a_finished_run_says_so_and_one_that_has_more_steps_than_it_should(folder, capsys):
    train(capsys, training__steps=4)
    said = train(capsys, training__steps=4)
    assert "this run is finished: its 4 steps are done. To go on, raise training.steps" in said
    said = train(capsys, training__steps=1)
    assert (
        "its 4 steps are done, more than training.steps = 1 asks for. To go on, raise training.steps"
        in said
    )
    said = train(capsys, training__steps=1000, training__tokens=48)
    assert (
        "its 4 steps are done, more than training.tokens = 48 asks for. To go on, raise training.tokens"
        in said
    )


def test_a_decayed_run_that_is_extended_says_that_the_rate_jumps(folder, capsys):
    wsd = {"lr_scheduler__name": "wsd", "lr_scheduler__decay_ratio": 0.4}
    train(capsys, training__steps=10, **wsd)
    said = train(capsys, training__steps=20, **wsd)
    assert (
        "the learning rate jumps: step 10 had" in said and "checkpoint.load_step goes back" in said
    )


def test_text_without_any_label_is_refused(folder, capsys):
    """It trained with a loss of 0.0000, and then said that there were too few documents."""
    alone = {
        "data__dataset": "letters.jsonl",
        "data__varlen": "true",
        "tokenizer__add_eos": "false",
    }
    said = train(capsys, 3, training__steps=2, **alone)
    assert (
        "letters.jsonl: no token of it can be predicted" in said
        and "tokenizer.add_eos = true" in said
    )
    train(capsys, 3, training__steps=2, **alone, data__streaming="true")
    train(capsys, 2, training__steps=2, data__varlen="true", data__context_len=1)
    train(capsys, training__steps=2, **{**alone, "data__varlen": "false"})


def test_held_out_text_without_any_label_is_reported(folder, capsys):
    said = train(
        capsys,
        training__steps=1,
        eval__at_end="true",
        data__varlen="true",
        tokenizer__add_eos="false",
        data__validation="letters.jsonl",
    )
    assert "warning: there is no validation text of letters.jsonl" in said


@pytest.mark.parametrize("steps", [1, 2])
def test_a_warm_up_as_long_as_a_run_with_decay_is_cut_like_a_longer_one(folder, capsys, steps):
    said = train(
        capsys, training__steps=steps, lr_scheduler__name="wsd", lr_scheduler__warmup_steps=steps
    )
    assert "warm-up 1 step = 16 tokens" in said


def test_a_last_step_that_was_evaluated_is_not_evaluated_again(folder, capsys):
    """An evaluation that takes the time that was left ends the run at its step."""
    ticks = iter(range(10**9))
    given = {
        **SETTINGS,
        "training.max_seconds": 60,
        "training.steps": 1000,
        "eval.interval": 2,
        "eval.at_end": "true",
    }
    run = Run.compose(None, {key: str(value) for key, value in given.items()})
    assert train_run(run, now=lambda: float(next(ticks))) == 0
    done = evaluations()
    assert done == sorted(set(done)) and capsys.readouterr().out.count("  validation  ") == len(
        done
    )


def test_a_clock_that_stands_still_or_runs_back_ends_no_run(folder, capsys):
    for clock, report in ((lambda: 5.0, "true"), (iter(range(10**6, 0, -1)).__next__, "false")):
        given = {**SETTINGS, "training.steps": 5, "eval.interval": 2, "metrics.report": report}
        run = Run.compose(None, {key: str(value) for key, value in given.items()})
        assert train_run(run, now=clock) == 0
        assert all(record["seconds"] > 0 for record in records() if "seconds" in record)


def masked_rows(in_loss: int) -> dict[str, object]:
    """Settings of a run on rows of ids, of which the last `in_loss` of 20 count in the loss."""
    mask = [0] * (20 - in_loss) + [1] * in_loss
    lines = []
    for number in range(60):
        row = {"input_ids": [number % 50 + 40] * 20, "loss_mask": mask}
        lines.append(json.dumps(row) + "\n")
    Path("rows.jsonl").write_text("".join(lines))
    return {"data__dataset": "rows.jsonl", "data__record_format": "tokens"}


def test_a_run_on_records_with_loss_masks_is_resumed(folder, capsys):
    """With the same losses; and it says what counts."""
    rows = {**masked_rows(5), "lr_scheduler__name": "constant"}
    said = train(capsys, training__steps=4, eval__at_end="true", **rows)
    assert "25.0% of the tokens count in the loss" in said
    whole = [record["loss"] for record in records() if "loss" in record]
    assert json.loads(Path("run/data.json").read_text())["loss_share"] == {"rows.jsonl": 0.25}
    shutil.rmtree("run")
    train(capsys, training__steps=2, **rows)
    said = train(capsys, training__steps=4, **rows)
    assert "resuming from run/checkpoints/step-2" in said
    assert "last started: data of" not in said
    assert [record["loss"] for record in records() if "loss" in record] == whole


def test_records_of_which_no_token_counts_are_refused(folder, capsys):
    said = train(capsys, 3, training__steps=1, **masked_rows(0))
    assert "rows.jsonl: none of its" in said
    assert "counts in the loss" in said


def test_validation_records_of_which_no_token_counts(folder, capsys):
    """The warning does not say that there are none."""
    rows = masked_rows(5)
    lines = Path("rows.jsonl").read_text().splitlines()
    kept = [number for number in range(1, 61) if is_validation(f"rows.jsonl:{number}", 0.3)]
    for number in kept:
        lines[number - 1] = json.dumps({"input_ids": [9] * 20, "loss_mask": [0] * 20})
    Path("rows.jsonl").write_text("\n".join(lines))
    said = train(capsys, training__steps=2, eval__at_end="true", **rows)
    tokens = 20 * len(kept)
    assert tokens
    assert f"none of the {tokens} validation tokens of rows.jsonl counts in the loss" in said
    assert "no BOS or EOS is added to records of tokens" in said


def test_steps_without_a_token_that_counts_go_on(folder, capsys):
    """One token of 20 counts, in sequences of 4 tokens: some steps have none."""
    rows = masked_rows(1)
    train(capsys, training__steps=30, training__seq_len=4, checkpoint__interval=30, **rows)
    losses = [record["loss"] for record in records() if "loss" in record]
    assert losses.count(0.0) > 5
    assert sum(loss > 0 for loss in losses) > 3
