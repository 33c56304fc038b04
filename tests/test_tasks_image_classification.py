"""Image classification: a Vision Transformer learns digits, resumes to the bit after kill -9, and no plan changes its gradients."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from plans import PLANS, parts, state_of, steps, whole
from safetensors.torch import load_file
from worlds import in_processes

pytest.importorskip("PIL")
from digit_images import SIZE, write_digits
from small_runs import command_line, recorded

from longfire.cli import main
from longfire.config.run import Run
from longfire.errors import DataError, SettingsError
from longfire.images.batch import ImageBatch
from longfire.initialise import build
from longfire.launch import World
from longfire.model import on_meta
from longfire.parallel.mesh import ALONE, Mesh
from longfire.tasks.class_losses import image_logits, image_losses
from longfire.training.compiling import eager_rate, sample_of

MODEL = {
    "hidden_size": "64",
    "num_hidden_layers": "2",
    "intermediate_size": "128",
    "image_size": str(SIZE),
    "patch_size": "4",
    "image_channels": "1",
    "direction": "both",
    "pool": "mean",
    "norm": "layernorm",
    "mlp": "gelu_exact",
    "mlp_bias": "true",
    "learned_positions": "true",
    "init_matrices": "fan_in",
    "init_embedding": "0.2",
}
MIXERS = {
    "attention": {"attention.num_heads": "4", "attention.rope": "none"},
    "gla": {"gla.num_heads": "4"},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "train", each=200, seed=0)
    write_digits(root / "val", each=20, seed=1)
    return root


def words(digits: Path, run: Path, mixer: str = "attention", **changes: str) -> dict[str, str]:
    """The settings of a run on the digits."""
    model = {"layer_types": mixer, **MODEL, **MIXERS[mixer]}
    return {
        "job.task": "image_classification",
        "job.dump_folder": str(run),
        **{f"model.{key}": value for key, value in model.items()},
        "model.compute_dtype": "float32",
        "data.dataset": str(digits / "train"),
        "data.validation": str(digits / "val"),
        "data.num_workers": "1",
        "training.batch_size": "64",
        "training.compile": "off",
        "training.threads": "1",
        "optimizer.lr": "4e-3",
        "lr_scheduler.warmup_steps": "20",
        "metrics.report": "false",
        **changes,
    }


@pytest.mark.parametrize("mixer", ["attention", pytest.param("gla", marks=pytest.mark.slow)])
def test_a_vision_transformer_learns_digits(digits, tmp_path, mixer):
    """Softmax attention, and GLA from both ends of the patches: in 200 steps 19 of 20 unseen digits (10 would be 2)."""
    settings = words(digits, tmp_path / "run", mixer, **{"training.steps": "200"})
    assert main(command_line(settings)) == 0
    last = recorded(tmp_path / "run")[-1]
    assert last["eval/val/accuracy"] >= 0.95
    assert last["eval/val/accuracy"] <= last["eval/val/accuracy_5"] and last["eval/val/loss"] < 0.5
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == list("0123456789")


AUGMENTED = {
    "training.steps": "8",
    "training.batch_size": "6",
    "training.gradient_accumulation_steps": "2",
    "images.crop": "resized",
    "images.flip": "true",
    "images.mixup_alpha": "0.4",
    "images.cutmix_alpha": "1.0",
    "classification.label_smoothing": "0.1",
    "model.dropout": "0.1",
    "model.attention.dropout": "0.1",
    "eval.interval": "4",
    "checkpoint.interval": "1",
}


def test_kill_9_and_resume_equal_one_run_to_the_bit(digits, tmp_path):
    """With everything that is drawn: order, crops, flips, mixup, CutMix, dropout."""
    assert main(command_line(words(digits, tmp_path / "whole", **AUGMENTED))) == 0
    settings = words(digits, tmp_path / "killed", **AUGMENTED)
    killed = subprocess.Popen(
        [sys.executable, "-m", "longfire", *command_line(settings)], stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "step-3").exists():
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert main(["train", str(tmp_path / "killed" / "run.toml")]) == 0
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "whole")
    ours, theirs = (
        {
            name: tensor
            for file in (tmp_path / run / "checkpoints" / "step-8").rglob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for run in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert all(ours[name].equal(theirs[name]) for name in ours)


IMAGE = {
    "vocab_size": 1,
    "image_size": 8,
    "patch_size": 4,
    "image_channels": 3,
    "num_classes": 7,
    "direction": "both",
    "pool": "mean",
    "learned_positions": True,
}


def images_of(first: int, count: int) -> ImageBatch:
    """Images of the run by their number, mixed, some of them without a label."""
    chance = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randn(96, 3, 8, 8, generator=chance)
    labels_B, partner_labels_B = torch.randint(7, (2, 96), generator=chance)
    labels_B[::5] = partner_labels_B[::5] = -100
    share_B = torch.rand(96, generator=chance)
    every = ImageBatch(pixels_BCHW, labels_B, 5, partner_labels_B, share_B)
    return every.select(slice(first, first + count))


def loss_sum(model, batch, noise_BT=None, cache=None):
    return image_losses(image_logits(model, batch.pixels_BCHW, noise_BT), batch, 0.1).sum()


def trained(rank: int, name: str):
    """Two steps under a plan, with everything in float64."""
    return trained_on(Mesh.of_degrees(PLANS[name].degrees, "cpu"), name)


def trained_on(mesh, name: str):
    changes = {**IMAGE, "dropout": 0.1}
    state = state_of(("gla", "attention"), PLANS[name], mesh, torch.float64, **changes)
    numbers = steps(state, 2, rows=images_of, loss_function=loss_sum)
    return numbers, parts(state)


@cache
def of_one_process():
    return trained_on(ALONE, "one")


@pytest.mark.parametrize(
    "name", ["fsdp 2", "ddp 2", "tp 2", pytest.param("hsdp 2x2", marks=pytest.mark.slow)]
)
def test_no_plan_changes_the_steps(name):
    """Loss, gradient norm and parameters after two steps, with mixup, padding and dropout, are those of one process."""
    true_numbers, true_parts = of_one_process()
    answers = in_processes(PLANS[name].processes, trained, name)
    for numbers, _ in answers:
        for ours, theirs in zip(numbers, true_numbers):
            assert ours == pytest.approx(theirs, rel=1e-9)
    found = whole([held for _, held in answers], true_parts)
    for tensor, numbers in whole([true_parts], true_parts).items():
        torch.testing.assert_close(found[tensor], numbers, rtol=1e-9, atol=1e-12, msg=tensor)


def test_the_loss_is_that_of_soft_targets():
    """Mixup and smoothing as one distribution over classes, by torch in float64."""
    batch = images_of(0, 24)
    logits_BN = torch.randn(24, 7, generator=torch.Generator().manual_seed(1)).double()
    real_B = batch.labels_B != -100
    first, other = (
        F.one_hot(labels.clamp_min(0), 7).double()
        for labels in (batch.labels_B, batch.partner_labels_B)
    )
    share_B1 = batch.share_B[:, None].double()
    targets = 0.9 * (share_B1 * first + (1 - share_B1) * other) + 0.1 / 7
    true_B = F.cross_entropy(logits_BN, targets, reduction="none") * real_B
    torch.testing.assert_close(image_losses(logits_BN, batch, 0.1), true_B)


def test_each_pool_is_what_it_says():
    pixels_BCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = {}
    for pool in ("first", "mean", "last"):
        model = build(tiny_config("attention", **{**IMAGE, "pool": pool}), 0)
        logits[pool] = image_logits(model, pixels_BCHW)
        assert logits[pool].shape == (2, 7)
    assert not torch.allclose(logits["first"], logits["mean"])
    assert not torch.allclose(logits["last"], logits["mean"])


def test_a_step_counts_the_flops_of_attention_to_all_tokens():
    """Twice the scores and weighted sums of a causal model, which leaves out half of them."""
    both = on_meta(tiny_config("attention", **IMAGE))
    causal = on_meta(tiny_config("attention", **{**IMAGE, "direction": "causal"}))
    T, layers = 5, 2
    per_key = 4 * both.config.hidden_size * layers
    difference = both.flops_per_token(T) - causal.flops_per_token(T)
    assert difference == pytest.approx(per_key * (T - (T + 1) / 2))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.varlen": "true"}, "data.varlen = True is not read by job.task"),
        ({"tokenizer.path": "train"}, "tokenizer.path = 'train' is not read by job.task"),
        ({"data.dataset": "embedded"}, "data.dataset = embedded has no classes"),
        ({"training.seq_len": "64"}, "training.seq_len = 64, but an image has 17 tokens"),
        ({"images.resize": "8"}, "images.resize = 8 is smaller than image_size = 16"),
        ({"images.mean": "0.1,0.2"}, "images.mean has 2 numbers for 1 channels"),
        ({"images.crop_padding": "2"}, "images.crop_padding = 2 is for images.crop = 'random'"),
        ({"model.image_size": "15"}, "image_size = 15 must be a positive multiple of patch_size"),
        ({"job.task": "language_modeling"}, "a language model would see the tokens"),
        ({"job.task": "image_clasification"}, "image_clasification' must be one of image_class"),
        ({"job.task_options": "a=1"}, "'a=1' is no option of job.task = 'image_classification'"),
        ({"attention.kind": "blockwise"}, "attention.kind = 'blockwise' computes causal attention"),
    ],
)
def test_what_the_task_cannot_do_is_refused_before_a_device_is_touched(
    digits, tmp_path, changes, message
):
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        Run.compose(None, words(digits, tmp_path / "run", **changes))


def test_processes_that_share_matrices_have_whole_sequences(digits, tmp_path):
    changes = {"parallelism.tensor_parallel_degree": "2"}
    world = World(size=2)
    with pytest.raises(SettingsError, match="set parallelism.sequence_parallel to false"):
        Run.compose(None, words(digits, tmp_path / "run", **changes), world=world)
    changes["parallelism.sequence_parallel"] = "false"
    run = Run.compose(None, words(digits, tmp_path / "run", **changes), world=world)
    assert run.degrees["tp"] == 2


@pytest.mark.parametrize("axis", ["context", "pipeline"])
def test_plans_that_are_not_proven_are_refused(digits, tmp_path, axis):
    degree = f"parallelism.{axis}_parallel_degree"
    with pytest.raises(SettingsError, match=f"{degree} = 2: no test has compared the gradients"):
        settings = words(digits, tmp_path / "run", **{degree: "2"})
        Run.compose(None, settings, world=World(size=2))


@pytest.mark.parametrize("command", ["prepare", "bench"])
def test_commands_of_language_models_say_so(digits, tmp_path, capsys, command):
    assert main([command, *command_line(words(digits, tmp_path / "run"))[1:]]) != 0
    assert f"longfire {command} is for language models" in capsys.readouterr().err


def test_an_export_is_loaded_by_transformers(digits, tmp_path):
    """A whole run with checkpoint.export, from which another one starts."""
    from transformers import ViTForImageClassification

    changes = {
        "training.steps": "2",
        "model.pool": "first",
        "model.norm_eps": "1e-12",
        "model.attention.qkv_bias": "true",
        "model.attention.o_bias": "true",
        "checkpoint.export": "true",
    }
    assert main(command_line(words(digits, tmp_path / "run", **changes))) == 0
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "run" / "hf")
    assert list(theirs.config.id2label.values()) == list("0123456789")
    start = {**changes, "model.weights": str(tmp_path / "run" / "hf")}
    assert main(command_line(words(digits, tmp_path / "again", **start))) == 0


@pytest.fixture(scope="module")
def learned(digits, tmp_path_factory) -> Path:
    """A run on ten digits whose model transformers can express, and its export."""
    root = tmp_path_factory.mktemp("learned")
    changes = {
        "training.steps": "1",
        "model.pool": "first",
        "model.norm_eps": "1e-12",
        "model.attention.qkv_bias": "true",
        "model.attention.o_bias": "true",
        "checkpoint.export": "true",
    }
    assert main(command_line(words(digits, root / "run", **changes))) == 0
    return root / "run"


@pytest.mark.parametrize("source", ["run", "export"])
@pytest.mark.parametrize("numbers", ["123", "0123456789"])
def test_a_model_of_images_starts_with_a_fresh_head_for_other_classes(
    digits, learned, tmp_path, capsys, source, numbers
):
    """The body is that of the weights; the head too where there are as many classes."""
    for number in numbers:
        shutil.copytree(digits / "val" / number, tmp_path / "few" / number)
    folder = {"run": learned, "export": learned / "hf"}[source]
    settings = words(digits, tmp_path / "run")
    for key in [key for key in settings if key.startswith("model.") and "dtype" not in key]:
        del settings[key]
    settings |= {"model.config": str(folder), "model.weights": str(folder)}
    settings |= {"data.dataset": str(tmp_path / "few"), "data.validation": ""}
    settings |= {"optimizer.lr": "1e-12", "training.steps": "1", "training.batch_size": "8"}
    assert main(command_line(settings)) == 0
    is_fresh = "with a fresh head over 3 classes, since theirs has 10" in capsys.readouterr().out
    assert is_fresh == (numbers == "123")
    theirs, ours = (
        load_file(next((run / "checkpoints" / "step-1").rglob("*.safetensors")))
        for run in (learned, tmp_path / "run")
    )
    assert ours["model/head.weight"].shape == (len(numbers), 64)
    names = [name for name in theirs if name.startswith("model/")]
    if is_fresh:
        names = [name for name in names if "head" not in name]
        assert ours["model/head.weight"].std() > 0.01
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)
    assert main(command_line(settings | {"training.steps": "2"})) == 0  # resumes its own head


def test_an_import_names_what_trains_and_evaluates_it(learned, tmp_path, capsys):
    assert main(["import", str(learned / "hf"), str(tmp_path / "run")]) != 0
    message = capsys.readouterr().err
    assert "a model of images needs no import" in message and "--model.weights" in message
    assert not (tmp_path / "run").exists()


def test_an_export_that_their_class_cannot_express_is_refused(digits, tmp_path):
    with pytest.raises(SettingsError, match="cannot express pool = 'mean'"):
        Run.compose(None, words(digits, tmp_path / "run", **{"checkpoint.export": "true"}))


def test_images_of_one_class_are_refused(digits, tmp_path, capsys):
    shutil.copytree(digits / "val" / "0", tmp_path / "train" / "0")
    changes = {"data.dataset": str(tmp_path / "train"), "data.validation": ""}
    assert main(command_line(words(digits, tmp_path / "run", **changes))) == DataError.exit_code
    assert "every record has the class '0'" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_classes(digits, tmp_path, capsys):
    few = tmp_path / "train"
    for name in ("0", "1"):
        shutil.copytree(digits / "val" / name, few / name)
    changes = {"data.dataset": str(few), "data.validation": "", "training.steps": "1"}
    assert main(command_line(words(digits, tmp_path / "run", **changes))) == 0
    (few / "1").rename(few / "one")
    more = {**changes, "training.steps": "2"}
    assert main(command_line(words(digits, tmp_path / "run", **more))) != 0
    message = capsys.readouterr().err
    assert "has the classes 0, one (2), but the run in" in message and "with 0, 1 (2)" in message


@pytest.mark.parametrize("mode", ["block", "attention+mlp"])
def test_recomputed_blocks_and_reference_kernels_change_no_step(digits, tmp_path, mode):
    """The same losses to the rounding of sums in float32."""
    few = {"training.steps": "2", "training.batch_size": "8", "eval.at_end": "false"}
    other = {"activation_checkpoint.mode": mode, "model.kernels": "reference"}
    losses = []
    for name, changes in (("plain", few), ("other", {**few, **other})):
        assert main(command_line(words(digits, tmp_path / name, "gla", **changes))) == 0
        losses.append([record["loss"] for record in recorded(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "gla"])
def test_the_speed_of_its_layers_is_measured_where_compiling_may_pay(digits, tmp_path, mixer):
    run = Run.compose(None, words(digits, tmp_path / "run", mixer))
    config = run.known_model_config.with_classes(10)
    sample = sample_of(config, 0, torch.float32, torch.device("cpu"))
    assert len(sample.layers) == 1 and eager_rate(run, sample) > 0
