"""class_scores.py: `longfire eval` of classifiers of images and of texts, on runs and on exports; the classes of files; exports."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from worlds import free_port

pytest.importorskip("PIL")
from digit_images import write_digits
from PIL import Image
from small_runs import command_line, recorded

from longfire.cli import main
from longfire.config.settings import Images
from longfire.images.augmentation import View

SHAPE = {
    "hidden_size": "16",
    "num_hidden_layers": "1",
    "intermediate_size": "24",
    "image_size": "16",
    "patch_size": "8",
    "image_channels": "1",
    "direction": "both",
    "pool": "first",
    "norm": "layernorm",
    "norm_eps": "1e-12",
    "mlp": "gelu_exact",
    "mlp_bias": "true",
    "learned_positions": "true",
    "compute_dtype": "float32",
    "layer_types": "attention",
    "attention.num_heads": "2",
    "attention.rope": "none",
    "attention.qkv_bias": "true",
    "attention.o_bias": "true",
    "initializer_range": "0.2",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run on digits of two steps, its export, and the digits."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "train", each=4, seed=0)
    write_digits(root / "val", each=3, seed=1)
    settings = {
        "job.task": "image_classification",
        "job.dump_folder": str(root / "run"),
        **{f"model.{key}": value for key, value in SHAPE.items()},
        "data.dataset": str(root / "train"),
        "data.validation": str(root / "val"),
        "data.num_workers": "1",
        "images.mean": "0.3",
        "images.std": "0.4",
        "training.batch_size": "8",
        "training.steps": "2",
        "training.compile": "off",
        "training.threads": "1",
        "metrics.report": "false",
    }
    assert main(command_line(settings)) == 0
    assert main(["export", str(root / "run"), str(root / "hf")]) == 0
    return root


def scored(root, *words: str) -> dict:
    assert main(["eval", *words, "--json", str(root / "scores.json")]) == 0
    return json.loads((root / "scores.json").read_text())


def test_a_run_and_its_export_have_the_numbers_that_training_recorded(root, capsys):
    numbers = scored(root, str(root / "run"))["sources"]["val"]
    assert "accuracy@5" in capsys.readouterr().out
    last = recorded(root / "run")[-1]
    assert numbers == {name: last[f"eval/val/{name}"] for name in numbers}
    assert {"loss", "accuracy", "accuracy_5", "records"} == numbers.keys()
    of_export = scored(root, str(root / "hf"), "--data", str(root / "val"))
    assert of_export["sources"]["val"] == numbers
    assert of_export["weights"] == scored(root, str(root / "run"))["weights"]


def test_two_processes_give_the_numbers_of_one(root):
    alone = scored(root, str(root / "run"))["sources"]["val"]
    program = [sys.executable, "-m", "longfire", "eval", str(root / "run")]
    program += ["--json", str(root / "two.json")]
    port = str(free_port())
    processes = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            "WORLD_SIZE": "2",
            "RANK": rank,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(subprocess.Popen(program, env=environment, stdout=subprocess.PIPE))
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed[0] and not printed[1]
    together = json.loads((root / "two.json").read_text())["sources"]["val"]
    assert together == pytest.approx(alone, rel=1e-12)
    assert together["records"] == alone["records"]


def test_it_needs_no_training_data(root, tmp_path):
    """Only the validation records are read, and names of classes are those of the run."""
    shutil.copytree(root / "run", tmp_path / "run")
    shutil.copytree(root / "val" / "7", tmp_path / "sevens" / "7")
    saved = tmp_path / "run" / "run.toml"
    saved.write_text(saved.read_text().replace(str(root / "train"), str(tmp_path / "gone")))
    assert scored(root, str(tmp_path / "run")) == {
        **scored(root, str(root / "run")),
        "folder": str(tmp_path / "run"),
    }
    few = scored(root, str(tmp_path / "run"), "--data", str(tmp_path / "sevens"))
    assert few["sources"]["sevens"]["records"] == 3


def test_the_classes_of_files_are_those_of_transformers(root):
    from transformers import ViTForImageClassification

    files = [str(root / "val" / number / "0000.png") for number in ("3", "8")]
    found = scored(root, str(root / "hf"), "--predict", ",".join(files))["predictions"]
    assert found == scored(root, str(root / "run"), "--predict", ",".join(files))["predictions"]
    theirs = ViTForImageClassification.from_pretrained(root / "hf").eval()
    view = View(Images(mean=(0.3,), std=(0.4,)), 16, 1, 0)
    pixels_BCHW = np.stack([view.of_validation(Image.open(file)) for file in files])
    with torch.no_grad():
        logits_BN = theirs(torch.from_numpy(pixels_BCHW)).logits
    for file, probabilities_N in zip(files, logits_BN.softmax(-1).tolist()):
        order = sorted(range(10), key=lambda number: -probabilities_N[number])
        assert list(found[file]) == [str(number) for number in order[:5]]
        for name, probability in found[file].items():
            assert math.isclose(probability, probabilities_N[int(name)], rel_tol=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["eval", "run", "--needle"], "--needle is for language models, and this is a classifier"),
        (["eval", "run", "--predict", "val"], "val: Is a directory"),
        (["eval", "run", "--predict", "a", "--data", "val"], "ask for one of them"),
        (["eval", "run", "--step", "7"], "step-7"),
        (["eval", "hf"], "does not say which records were held out"),
        (["eval", "hf", "--step", "1", "--data", "val"], "leave --step out"),
        (["eval", "run/checkpoints/step-2", "--data", "val"], "name its run folder"),
        (["generate", "run", "--prompt", "a"], "--predict FILE` names the class of a file"),
        (["generate", "hf", "--prompt", "a"], "--predict FILE` names the class of a file"),
        (["export", "hf", "out"], "it holds Hugging Face weights already"),
        (["export", "run", "out", "--dtype", "bfloat16"], "are exported in float32"),
        (["export", "run", "out", "--compare", "bytes"], "are always compared: leave it out"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_way_out(root, monkeypatch, capsys, words, message):
    monkeypatch.chdir(root)
    assert main(words) != 0
    assert message in capsys.readouterr().err


def test_texts_and_their_files(tmp_path, capsys):
    """A classifier of texts: its run has the recorded numbers, and a file is one text."""
    lines = [{"text": f"{word} stone", "label": word} for word in ("fine", "grim") * 8]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {
        "job.task": "sequence_classification",
        "job.dump_folder": str(tmp_path / "run"),
        "model.hidden_size": "16",
        "model.num_hidden_layers": "1",
        "model.layer_types": "attention",
        "model.attention.num_heads": "2",
        "model.compute_dtype": "float32",
        "data.dataset": str(tmp_path / "a.jsonl"),
        "data.validation": str(tmp_path / "b.jsonl"),
        "training.seq_len": "16",
        "training.batch_size": "8",
        "training.steps": "2",
        "training.compile": "off",
        "training.threads": "1",
        "metrics.report": "false",
    }
    assert main(command_line(settings)) == 0
    (numbers,) = scored(tmp_path, str(tmp_path / "run"))["sources"].values()
    last = recorded(tmp_path / "run")[-1]
    assert numbers == {name: last[f"eval/b.jsonl/{name}"] for name in numbers}
    (tmp_path / "one.txt").write_text("fine stone")
    (tmp_path / "none.txt").write_text(" \n")
    found = scored(tmp_path, str(tmp_path / "run"), "--predict", str(tmp_path / "one.txt"))
    probabilities = found["predictions"][str(tmp_path / "one.txt")]
    assert probabilities.keys() == {"fine", "grim"}
    assert math.isclose(sum(probabilities.values()), 1, rel_tol=1e-6)
    assert main(["eval", str(tmp_path / "run"), "--predict", str(tmp_path / "none.txt")]) != 0
    assert "it holds no text" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) != 0
    assert "measures its accuracy" in capsys.readouterr().err
