"""hub_models.py: a name of the hub wherever a model is named, from the hub's own cache."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import pytest
import transformers

from longfire.cli import main
from longfire.config.aliases.flame_accelerate import scratch_or_weights
from longfire.config.paths import may_be_on_hub
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import SettingsError
from longfire.huggingface.hub_models import config_folder, model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 64,
}
TINY = [
    "--training.seq_len=16",
    "--training.batch_size=2",
    "--training.steps=1",
    "--training.threads=1",
    "--training.compile=off",
    "--data.dataset=text.txt",
    "--data.num_workers=1",
    "--eval.at_end=false",
    "--metrics.report=false",
]


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory) -> Path:
    """The hub's cache after a download of a small Llama: snapshots of links to blobs."""
    cache = tmp_path_factory.mktemp("hf_home") / "hub"
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    made = tmp_path_factory.mktemp("made")
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    bytes_tokenizer().save(made)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(made.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    return cache


@pytest.fixture
def offline(downloaded, tmp_path, monkeypatch) -> Path:
    """A working folder on a machine without a network that has this cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(downloaded))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be\n" * 400)
    return tmp_path


def test_what_may_be_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    assert may_be_on_hub("someone/tiny")
    for name in (
        "",
        "tiny",
        "runs/a",
        "runs/typo",
        "./runs/b",
        "/runs/b",
        "~/b",
        "models/b.json",
        "a/b/c",
    ):
        assert not may_be_on_hub(name), name


def test_a_model_and_a_config_come_from_the_cache(offline, downloaded):
    folder = model_folder(NAME)
    assert folder.is_relative_to(downloaded) and (folder / "model.safetensors").is_file()
    assert config_folder(NAME) == folder
    assert model_folder(str(folder)) == folder, "a folder is itself"


@pytest.mark.parametrize("setting", ["model.config", "model.weights", "distillation.teacher"])
def test_a_name_that_cannot_be_had_is_named_with_its_setting(setting, offline, capsys):
    words = [f"--{setting}=no-such/model", *TINY]
    if setting != "model.config":
        words.append("--model.config=llama-debug")
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert f"{setting} = 'no-such/model' is no folder here" in error
    assert "check the name and the network" in error and "hf download" in error


def test_a_run_starts_from_names(offline, capsys):
    names = [f"--model.config={NAME}", f"--model.weights={NAME}"]
    assert main(["train", *names, *TINY, "--job.dump_folder=run"]) == 0
    saved = tomllib.loads(Path("run/run.toml").read_text())
    assert COMMIT in saved["model"]["weights"], "run.toml names the revision that was taken"
    assert main(["train", "run/run.toml", "--training.steps=2"]) == 0
    assert "resuming from" in capsys.readouterr().out


def test_flame_takes_a_name_as_weights(offline):
    assert scratch_or_weights(NAME) == {"model.config": NAME, "model.weights": NAME}
    assert scratch_or_weights("gla-340m") == {"model.config": "gla-340m"}
    assert scratch_or_weights("models/gla-340m") == {"model.config": "models/gla-340m"}


def test_convert_takes_names(offline, capsys):
    target = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    target |= {"layer_types": ["gla"] * 2, "gla": {"num_heads": 2}}
    Path("gla.json").write_text(json.dumps(target))
    words = ["convert", "--model", NAME, "--config", "gla.json", "--output", "converted"]
    assert main(words) == 0
    assert Path("converted/config.json").is_file()
    same = ["convert", "--model", NAME, "--config", NAME, "--output", "same"]
    assert main(same) == 0
    assert main(["convert", "--model", "no-such/model", *words[3:5], "--output", "other"]) == 2
    assert "--model = 'no-such/model' is no folder here" in capsys.readouterr().err


def test_generate_takes_a_name(offline, capsys):
    assert main(["generate", NAME, "--prompt", "to be", "--max_new_tokens", "4"]) == 0


def test_a_repository_without_a_config_is_named(offline, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *names, **rest: str(tmp_path))
    with pytest.raises(SettingsError, match=r"model\.config = 'a/b': .* has no config\.json"):
        config_folder("a/b", "model.config")


def test_a_tokenizer_of_the_hub_decides_about_bos_by_its_files(offline, downloaded):
    """In a process of its own: transformers reads where the cache is when it is imported."""
    repository = downloaded / "models--someone--words"
    bytes_tokenizer().save(repository / "snapshots" / COMMIT, adds_bos=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text(COMMIT)
    command = [sys.executable, "-m", "longfire", "prepare", "--data.dataset=text.txt"]
    result = subprocess.run(
        [*command, "--tokenizer.path=someone/words"],
        env={**os.environ, "HF_HOME": str(downloaded.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "BOS <bos> before each document" in result.stdout
