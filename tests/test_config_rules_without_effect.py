"""Each setting has an effect in every run, or a message where it has none."""

from dataclasses import fields

import pytest
import torch
from logged import logged_to

from longfire.config.recipe import SETTINGS
from longfire.config.rules.without_effect import IDLE, messages
from longfire.config.run import Run
from longfire.config.settings import SECTIONS
from longfire.launch import World

MODEL = {"model.hidden_size": "32", "model.num_hidden_layers": "1", "model.layer_types": "gla"}
GLA = {"model.gla.num_heads": "2"}
# A second value for settings that say nothing in a run with every other setting at its default
SECOND = {
    "checkpoint.export_dtype": "bfloat16",
    "profiling.save_traces_folder": "traces",
    "profiling.profile_freq": "7",
    "profiling.enable_memory_snapshot": "true",
    "profiling.save_memory_snapshot_folder": "memory",
    "lr_scheduler.decay_ratio": "0.3",
    "lr_scheduler.decay_shape": "sqrt",
    "lr_scheduler.power": "2",
    "lr_scheduler.timescale_steps": "7",
    "lr_scheduler.gamma": "0.5",
    "lr_scheduler.step_size": "7",
    "lr_scheduler.milestones": "3,7",
    "lr_scheduler.patience": "7",
    "lr_scheduler.threshold": "0.5",
    "distillation.kind": "hidden",
    "distillation.temperature": "2",
    "distillation.ce_weight": "0.5",
    "data.context_len": "4096",
    "data.shuffle_window_sequences": "64",
    "data.validation_split": "test",
    "tokenizer.train_vocab_size": "5000",
    "tokenizer.train_bytes": "1000",
    "training.max_skips_in_a_row": "3",
    "parallelism.sequence_parallel": "false",
    "parallelism.reshard_after_forward": "never",
    "parallelism.pipeline_parallel_schedule": "GPipe",
    "parallelism.pipeline_parallel_split_points": "layers.1",
    "parallelism.pipeline_parallel_microbatches": "2",
    "metrics.save_tb_folder": "events",
    "metrics.wandb_project": "mine",
    "metrics.wandb_mode": "offline",
    "eval.sample_tokens": "5",
    "images.image_field": "picture",
    "images.resize": "256",
    "images.crop": "random",
    "images.crop_padding": "4",
    "images.min_crop_area": "0.5",
    "images.flip": "true",
    "images.mixup_alpha": "0.8",
    "images.cutmix_alpha": "0.8",
    "images.mean": "0.4",
    "images.std": "0.4",
    "images.max_pixels": "1000",
    "classification.label_field": "class",
    "classification.label_smoothing": "0.1",
    "eval.ema": "false",
    "float8.recipe_name": "rowwise",
    "float8.filter_fqns": "o_proj",
    "float8.enable_fsdp_float8_all_gather": "true",
    "float8.emulate": "true",
    "activation_checkpoint.layers": "0",
    "activation_checkpoint.layer_interval": "2",
}
# With another setting beside it
WITH_OTHERS = [
    ("optimizer.weight_decay", "0.2", {"optimizer.name": "Adam"}),
    ("optimizer.beta1", "0.8", {"optimizer.name": "SGD"}),
    ("optimizer.beta2", "0.8", {"optimizer.name": "Adafactor"}),
    ("optimizer.eps", "1e-4", {"optimizer.name": "SGD"}),
    ("optimizer.momentum_dtype", "bfloat16", {"optimizer.name": "SGD"}),
    ("optimizer.fused", "false", {"optimizer.name": "LAMB"}),
    ("lr_scheduler.decay_end_step", "700", {"lr_scheduler.name": "inverse_sqrt"}),
    ("lr_scheduler.min_lr_ratio", "0.5", {"lr_scheduler.name": "constant"}),
    ("lr_scheduler.warmup_steps", "7", {"lr_scheduler.warmup_tokens": "4096"}),
    ("lr_scheduler.warmup_shape", "constant", {"lr_scheduler.warmup_steps": "0"}),
    ("comm.trace_buf_size", "7", {"training.device": "cpu"}),
    ("training.keep_rounded_weights", "on", {"model.compute_dtype": "float32"}),
    ("training.keep_rounded_weights", "on", {"parallelism.cpu_offload": "true"}),
    ("training.steps", "7", {"training.tokens": "1000000"}),
    ("checkpoint.interval", "7", {"checkpoint.enable_checkpoint": "false"}),
    (
        "checkpoint.keep_best_k",
        "2",
        {"checkpoint.enable_checkpoint": "false", "eval.interval": "10"},
    ),
    ("eval.tokens", "7", {"eval.at_end": "false"}),
    ("data.validation_fraction", "0.1", {"data.validation": "other.txt"}),
    ("data.folder", "stores", {"job.task": "sequence_classification"}),
    ("data.validation_seed", "2357", {"data.validation": "other.txt"}),
]
# Reviewed: they decide something in every run, or are refused where they cannot. (Names of folders, seeds, sizes, switches.)
ALWAYS = {
    *(f"job.{field.name}" for field in fields(SECTIONS["job"])),
    *(f"model.{field.name}" for field in fields(SECTIONS["model"])),
}


@pytest.fixture
def compose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("a long fire " * 100)
    (tmp_path / "other.txt").write_text("another fire " * 100)

    def composed(**changes: str) -> list[str]:
        messages: list[str] = []
        with logged_to(messages):
            Run.compose(None, {**MODEL, **GLA, "data.dataset": "input.txt", **changes})
        return [message for message in messages if "changes nothing in this run" in message]

    return composed


@pytest.mark.parametrize("key", SECOND)
def test_a_setting_without_an_effect_is_named(compose, key):
    (message,) = compose(**{key: SECOND[key]})
    assert message.startswith(f"{key} = ")


@pytest.mark.parametrize(("key", "value", "others"), WITH_OTHERS)
def test_another_setting_takes_the_effect_away(compose, key, value, others):
    (message,) = compose(**{key: value, **others})
    assert message.startswith(f"{key} = ") and next(iter(others)) in message


@pytest.mark.parametrize(
    ("has_cuda", "processes", "reason"),
    [
        (False, 2, "torch sees no CUDA device here"),
        (True, 1, "the run has one process"),
        (True, 2, ""),
    ],
)
def test_the_flight_recorder_needs_nccl_and_several_processes(
    has_cuda, processes, reason, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    named = {**MODEL, **GLA, "comm.trace_buf_size": "7"}
    run = Run.compose(None, named, world=World(processes), planned=True)
    lines = list(messages(run, ["comm.trace_buf_size"]))
    assert (reason in lines[0]) if reason else not lines


def test_a_memory_snapshot_needs_cuda(compose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = {"profiling.enable_profiling": "true", "profiling.enable_memory_snapshot": "true"}
    (message,) = compose(**asked)
    assert "torch sees no CUDA device here" in message


def test_what_has_an_effect_says_nothing(compose):
    assert compose(**{"optimizer.weight_decay": "0.2", "lr_scheduler.min_lr_ratio": "0"}) == []
    wsd = {"lr_scheduler.name": "wsd", "lr_scheduler.decay_ratio": "0.3"}
    assert compose(**wsd) == []


def test_a_default_that_is_written_out_says_nothing(compose):
    assert compose(**{"distillation.temperature": "1.0", "eval.sample_tokens": "128"}) == []


def test_every_key_is_a_setting_and_is_tried_here():
    keys = {key for idle in IDLE for key in idle.keys}
    assert keys <= SETTINGS.keys() and not keys & ALWAYS
    tried = {*SECOND, *(key for key, _, _ in WITH_OTHERS)}
    of_checkpoints = {key for key in keys if key.startswith("checkpoint.")}
    assert tried <= keys
    assert keys - tried <= of_checkpoints | {
        "parallelism.pipeline_parallel_schedule_csv",
    }
