"""Promise 13: the exit code tells the reference: bad input, a hang, a NaN, a full disk: one clear message, non-zero,
in bounded time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longfire.cli import main
from longfire.errors import CheckpointError, DataError, SettingsError, TrainingError

SHAPE = {
    "model_type": "longfire",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "layer_types": ["attention"],
    "intermediate_size": 16,
    "attention": {"num_heads": 2},
}


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A run of five steps that works."""
    texts = [{"text": f"document {i}: " + "fire " * (i % 7 + 1)} for i in range(200)]
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    (tmp_path / "recipe.toml").write_text(f"""
[job]
dump_folder = "{tmp_path}/run"
[model]
config = "shape.json"
[data]
dataset = ["good.jsonl"]
folder = "{tmp_path}/stores"
validation_fraction = 0.1
num_workers = 1
[training]
seq_len = 16
batch_size = 2
steps = 5
compile = "off"
[lr_scheduler]
warmup_steps = 1
[eval]
tokens = 64
[metrics]
disable_color_printing = true
""")
    return tmp_path / "recipe.toml"


def describe(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_run_that_ends_well_is_zero(recipe):
    assert main(["train", str(recipe)]) == 0
    assert (recipe.parent / "run" / "report.html").exists()


BAD_DATA = {
    "missing file": ("none.jsonl", None, "none.jsonl"),
    "empty corpus": ("empty.jsonl", b"", "empty.jsonl"),
    "broken json line": ("bad.jsonl", b'{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2"),
    "field missing": ("field.jsonl", b'{"body": "a", "title": "b"}\n', "body"),
    "invalid utf-8": ("bytes.txt", b"good \xff\xfe bad", "bytes.txt"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_names_the_file_and_the_row(name, recipe, capsys):
    file, content, expected = BAD_DATA[name]
    if content is not None:
        (recipe.parent / file).write_bytes(content)
    code = main(["train", str(recipe), "--data.dataset", str(recipe.parent / file)])
    assert expected in describe(capsys)
    assert code in (DataError.exit_code, SettingsError.exit_code)


def test_a_parquet_file_without_the_field_lists_those_it_has(recipe, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"], "number": [1]}), recipe.parent / "x.parquet")
    assert (
        main(["train", str(recipe), "--data.dataset", str(recipe.parent / "x.parquet")])
        == DataError.exit_code
    )
    message = describe(capsys)
    assert "x.parquet" in message and "body" in message and "text_field" in message


def test_bad_documents_can_be_skipped_and_are_counted(recipe, capsys):
    good = (recipe.parent / "good.jsonl").read_bytes()
    (recipe.parent / "mixed.jsonl").write_bytes(good + b"\n{broken\n")
    assert (
        main(
            [
                "train",
                str(recipe),
                "--data.dataset",
                str(recipe.parent / "mixed.jsonl"),
                "--data.skip_bad_documents",
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "mixed.jsonl:201" in said.out + said.err


def test_a_document_of_50_mb_is_a_document(recipe):
    text = "the quick brown fire jumps over the lazy row\n" * (50_000_000 // 45)
    (recipe.parent / "big.jsonl").write_text(json.dumps({"text": text}))
    assert (
        main(
            [
                "prepare",
                str(recipe),
                "--data.dataset",
                str(recipe.parent / "big.jsonl"),
                "--data.validation_fraction",
                "0",
                "--eval.at_end",
                "false",
            ]
        )
        == 0
    )


def test_a_nan_is_an_error_that_names_the_batch_and_the_fix(recipe, capsys):
    code = main(
        [
            "train",
            str(recipe),
            "--optimizer.lr",
            "1e30",
            "--training.max_norm",
            "0",
            "--training.steps",
            "30",
        ]
    )
    message = describe(capsys)
    assert code == TrainingError.exit_code
    assert "good.jsonl sequence" in message and "skip_nan_inf" in message


def test_a_flipped_byte_in_the_only_checkpoint_is_named(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    file = next((recipe.parent / "run" / "checkpoints" / "step-5").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["train", str(recipe), "--checkpoint.load_step", "5"]) == CheckpointError.exit_code
    assert file.name in describe(capsys)


def test_a_run_folder_of_another_model_is_refused_and_kept(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    (recipe.parent / "shape.json").write_text(json.dumps({**SHAPE, "hidden_size": 32}))
    assert main(["train", str(recipe)]) == SettingsError.exit_code
    assert "hidden_size is 16 there and 32 here" in describe(capsys)
    assert (recipe.parent / "run" / "checkpoints" / "step-5").is_dir()


def test_another_tokenizer_than_the_run_began_with_is_refused(recipe, capsys):
    """Of as many words: the shapes fit, and only the fingerprint tells."""
    train = [
        "train",
        str(recipe),
        "--tokenizer.path",
        "train",
        "--tokenizer.train_vocab_size",
        "258",
    ]
    assert main([*train, "--training.steps", "3", "--checkpoint.interval", "3"]) == 0
    other = json.loads((recipe.parent / "run" / "tokenizer" / "tokenizer.json").read_text())
    words = other["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (recipe.parent / "other").mkdir()
    (recipe.parent / "other" / "tokenizer.json").write_text(json.dumps(other))
    shutil.copy(
        recipe.parent / "run" / "tokenizer" / "tokenizer_config.json", recipe.parent / "other"
    )
    assert (
        main(["train", str(recipe), "--tokenizer.path", str(recipe.parent / "other")])
        == SettingsError.exit_code
    )
    assert "is not the tokenizer that the run" in describe(capsys)
    assert main(train) == 0, "with its own it goes on"


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs a small file system that a test may fill"
)
def test_a_full_disk_while_saving_is_named_and_loses_nothing_whole(recipe, capsys, monkeypatch):
    assert main(["train", str(recipe), "--training.steps", "3"]) == 0
    monkeypatch.setattr(os, "fsync", full_disk)
    assert (
        main(["train", str(recipe), "--lr_scheduler.name", "constant"]) == CheckpointError.exit_code
    )
    monkeypatch.undo()
    assert "No space left" in describe(capsys)
    assert (recipe.parent / "run" / "checkpoints" / "step-3").is_dir()
    assert main(["train", str(recipe)]) == 0


def full_disk(_) -> None:
    raise OSError(28, "No space left on device")


def test_a_hang_ends_in_bounded_time_with_the_stack(recipe):
    hang = (
        "import time, longfire.training.loop as t; t.train_step = lambda *_: time.sleep(600); "
        "from longfire.cli import main; main({})"
    )
    words = ["train", str(recipe), "--comm.init_timeout_seconds", "2"]
    done = subprocess.run(
        [sys.executable, "-c", hang.format(words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == TrainingError.exit_code
    assert "comm.init_timeout_seconds" in done.stderr and "Thread" in done.stderr


def test_the_page_lists_them():
    page = (Path(__file__).parents[2] / "docs/flow.md").read_text()
    for code in (
        0,
        *(error.exit_code for error in (SettingsError, DataError, CheckpointError, TrainingError)),
    ):
        assert f"\n| {code} | " in page


def test_an_unknown_command_and_an_unknown_key_are_two(capsys):
    assert main(["trian"]) == SettingsError.exit_code
    assert "did you mean 'train'" in describe(capsys)
    assert main(["train", "--training.stesp", "3"]) == SettingsError.exit_code
    assert "training.steps" in describe(capsys)
