"""The first hour on one's own data: what a newcomer types, in a new folder with one text file, and what is answered."""

import json
import random
from pathlib import Path

import pytest

from longfire.cli import main
from longfire.errors import CheckpointError, DataError, SettingsError

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SHAPES = {
    "gla": {"layer_types": ["gla"], "gla": {"num_heads": 2}},
    "hybrid": {
        "layer_types": ["mamba2", "gla"],
        "gla": {"num_heads": 2},
        "mamba2": {"head_dim": 16, "state_size": 8},
    },
}
QUICK = [
    "--training.seq_len=16",
    "--training.batch_size=2",
    "--training.compile=off",
    "--training.threads=1",
    "--model.compute_dtype=float32",
    "--data.num_workers=1",
    "--eval.tokens=512",
    "--metrics.report=false",
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """One text file, and a model to train."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    poems = [
        "\n".join(" ".join(draw.choices(["fire", "long", "gate"], k=6)) for _ in range(4))
        for _ in range(60)
    ]
    Path("input.txt").write_text("\n\n".join(poems))
    for name, shape in SHAPES.items():
        Path(f"{name}.json").write_text(json.dumps({"model_type": "longfire", **TINY, **shape}))
    return tmp_path


def train(*words: str, model: str = "gla", data: str = "input.txt", steps: int = 12) -> int:
    given = [
        "--model.config",
        f"{model}.json",
        "--data.dataset",
        data,
        "--training.steps",
        str(steps),
    ]
    return main(["train", *given, *QUICK, *words])


def before_the_first_step(out: str) -> str:
    assert "\nstep " in out
    return out.partition("\nstep ")[0]


def saved_steps() -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in Path("runs/longfire/checkpoints").glob("step-*")
    )


def test_just_try_12_steps_then_again_then_longer(folder, capsys):
    assert train("--checkpoint.interval", "2") == 0
    out = capsys.readouterr().out
    begun = before_the_first_step(out)
    assert "validation" in begun and "at the end of 1" in begun and "warning" not in begun
    assert (
        "warm-up 2 steps = 64 tokens (a fifth of the run, which is no longer than the 200 steps asked for)"
        in begun
    )
    assert "time: " in out and "the 8 steps that are left take" in out
    assert "validation of input.txt: loss" in out and "Outputs" in out
    assert saved_steps() == [4, 6, 8, 10, 12], "the default does not fill a disk"

    assert train() == 0
    assert (
        "this run is finished: its 12 steps are done. To go on, raise training.steps"
        in capsys.readouterr().out
    )

    assert train(steps=40) == 0
    out = capsys.readouterr().out
    assert (
        "the learning rate jumps: step 12 had" in before_the_first_step(out)
        and "finished" not in out
    )

    assert main(["eval", "runs/longfire"]) == 0
    assert "input.txt" in capsys.readouterr().out


def test_text_that_was_held_out_is_not_trained_on(folder, capsys):
    assert main(["prepare", "--data.dataset", "input.txt"]) == 0
    assert "validation" in capsys.readouterr().out
    (store,) = folder.glob("token-stores/*/manifest.json")
    streams = json.loads(store.read_text())["streams"]
    ends = 2  # a document in each part, each with its end of text
    assert (
        streams["train"]["tokens"] + streams["heldout"]["tokens"]
        == len(Path("input.txt").read_bytes()) + ends
    )


@pytest.mark.parametrize(
    "between, word", [("\n\n", "blank_lines"), ("<|endoftext|>", "<|endoftext|>"), ("\n", "lines")]
)
def test_a_file_of_many_documents_is_split(folder, capsys, between, word):
    Path("input.txt").write_text(
        between.join(f"document {number} of a file" for number in range(60))
    )
    assert main(["prepare", "--data.dataset", "input.txt", "--data.split_documents", word]) == 0
    out = capsys.readouterr().out
    assert "in 59 documents, validation" in out or "in 58 documents, validation" in out


def test_a_validation_file_of_ones_own(folder, capsys):
    Path("unseen.txt").write_text("long fire gate long fire gate")
    assert train("--data.validation", "unseen.txt", "--eval.interval", "6") == 0
    out = capsys.readouterr().out
    assert "data: validation: unseen.txt: 30 tokens in 1 document" in before_the_first_step(out)
    assert "step 6  validation  unseen.txt: loss" in out and "validation of unseen.txt: loss" in out
    assert main(["eval", "runs/longfire"]) == 0
    assert "unseen.txt" in capsys.readouterr().out


def test_too_little_text_to_hold_any_out_is_said_before_the_first_step(folder, capsys):
    Path("input.txt").write_text("a long fire and a long gate " * 5)
    assert train(steps=2) == 0
    warned = capsys.readouterr().err
    assert "warning: there is no validation text of input.txt" in warned
    assert "data.validation" in warned
    assert main(["eval", "runs/longfire"]) == DataError.exit_code
    assert "--data FILE" in capsys.readouterr().err


def test_an_empty_file(folder, capsys):
    Path("input.txt").write_text("")
    assert (
        train("--tokenizer.path", "train", "--tokenizer.train_vocab_size", "2048")
        == DataError.exit_code
    )
    said = capsys.readouterr()
    assert (
        "tokenizer: a vocabulary of 258 (2048 asked for: the text has no more) from 0 bytes"
        in said.out
    )
    assert "input.txt: no document with text is left" in said.err


def test_which_class_an_export_takes_is_printed_before_the_first_step(folder, capsys):
    hybrid = {
        "layer_types": ["gla", "kda"],
        "gla": {"num_heads": 2},
        "kda": {"num_heads": 2, "head_dim": 8},
    }
    Path("mixed.json").write_text(json.dumps({"model_type": "longfire", **TINY, **hybrid}))
    assert train("--checkpoint.export", model="mixed", steps=2) == 0
    out = capsys.readouterr().out
    begun = before_the_first_step(out)
    assert (
        "export: as LongfireForCausalLM of longfire, since no class of transformers or fla has"
        in begun
    )
    assert "LongfireForCausalLM of longfire: KL 0.0e+00" in out.partition("step ")[2]
    assert main(["export", "runs/longfire", "again"]) == 0
    assert "export: as LongfireForCausalLM" in capsys.readouterr().out
    assert main(["generate", "again", "--prompt", "a", "--max_new_tokens", "2"]) == 0
    assert train("--job.dump_folder", "runs/gla", "--checkpoint.export", steps=2) == 0
    assert "export: as GLAForCausalLM of fla" in before_the_first_step(capsys.readouterr().out)


def test_an_export_that_fails_late_does_not_hide_where_everything_lies(folder, capsys):
    Path("runs/longfire/hf").mkdir(parents=True)
    Path("runs/longfire/hf/thesis.txt").write_text("not to be replaced")
    assert train("--checkpoint.export", steps=2) in (
        SettingsError.exit_code,
        CheckpointError.exit_code,
    )
    said = capsys.readouterr()
    assert "Outputs" in said.out and "step-2" in said.out
    assert "hf" in said.err and Path("runs/longfire/hf/thesis.txt").exists()


def test_a_run_with_a_time_budget_is_repeated_from_its_own_recipe(folder, capsys):
    """Of a real clock nothing is asked but that 9 steps do not take an hour."""
    assert train("--training.max_seconds", "3600", steps=9) == 0
    assert (
        "3600 s of training are 9 steps = 288 tokens (the most that the settings allow)"
        in capsys.readouterr().out
    )
    again = ["--training.max_seconds", "0", "--job.dump_folder", "again"]
    assert main(["train", "runs/longfire/run.toml", *again]) == 0
    losses = [losses_of(Path(run, "metrics.jsonl")) for run in ("runs/longfire", "again")]
    assert losses[0] == losses[1] and len(losses[0]) == 9


def losses_of(metrics: Path) -> list[float]:
    records = map(json.loads, metrics.read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]
