"""Promise 8: a checkpoint is complete or absent; a damaged one is named and the newest whole one taken; nothing in it runs code."""

import errno
import json
import os
import pickletools
import shutil
import time
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from logged import logged_to
from safetensors import safe_open

from longfire.checkpoint.folder import damage, steps, write_manifest
from longfire.checkpoint.restoring import load_model_weights, newest
from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.errors import CheckpointError
from longfire.optim import make_optimizer

SYNC = settings.Checkpoint(async_mode="disabled")


def trained(model, steps: int = 2) -> State:
    state = State(model, make_optimizer(model, settings.Optimizer(), torch.device("cpu")))
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        state.optimizer.step()
        state.step, state.rows_consumed, state.tokens = (
            state.step + 1,
            state.rows_consumed + 3,
            state.tokens + 48,
        )
    return state


@pytest.fixture
def saved(tmp_path, tiny_model) -> Path:
    """Steps 2 and 4, both whole."""
    state, checkpoints = trained(tiny_model()), Checkpoints(tmp_path, SYNC)
    checkpoints.save(state)
    state.step = 4
    checkpoints.save(state)
    return tmp_path


def restored(folder: Path, model, **changes) -> tuple[State, list[str]]:
    state, said = State(model, make_optimizer(model, settings.Optimizer(), torch.device("cpu"))), []
    with logged_to(said):
        Checkpoints(folder, settings.Checkpoint(**changes)).restore(state)
    return state, said


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back_to_the_bit(mode, tied, tmp_path, tiny_model):
    state = trained(tiny_model(seed=1, tie_word_embeddings=tied))
    rng = torch.get_rng_state()
    checkpoints = Checkpoints(tmp_path, settings.Checkpoint(async_mode=mode))
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    checkpoints.save(state)
    state.wait_for_snapshot()
    for parameter in state.model.parameters():  # training goes on while the checkpoint is written
        parameter.data.zero_()
    torch.rand(5)
    checkpoints.wait()
    back, _ = restored(tmp_path, tiny_model(seed=2, tie_word_embeddings=tied))
    after = back.tensors()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype
        for name in before
    )
    assert back.counters() == state.counters()
    assert torch.equal(torch.get_rng_state(), rng)


def files_of(step: Path) -> list[str]:
    return sorted(path.name for path in step.iterdir())


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_any_damaged_file_is_named_and_the_older_checkpoint_taken(how, saved, tiny_model):
    for name in files_of(saved / "step-4"):
        damaged = saved.parent / f"{saved.name}-{how}-{name}"
        shutil.copytree(saved, damaged)
        file = damaged / "step-4" / name
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        elif how == "truncated":
            file.write_bytes(content[:-1])
        else:
            file.write_bytes(
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 4])
                + content[len(content) // 2 + 1 :]
            )
        if how == "flipped" and name == "manifest.json" and damage(damaged / "step-4") is None:
            continue  # the bit was in white space
        state, said = restored(damaged, tiny_model())
        assert state.step == 2
        assert any(name in line for line in said), said
        with pytest.raises(CheckpointError, match="damaged"):
            restored(damaged, tiny_model(), load_step=4)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("call", ["os.open", "os.stat"])
def test_a_file_that_cannot_be_read_now_may_be_whole(call, number, saved, tiny_model, monkeypatch):
    """An older checkpoint in its place would be trained on, and the newer one written over."""
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    for name in files_of(saved / "step-4"):
        with monkeypatch.context() as patched:
            real = attrgetter(call.removeprefix("os."))(os)
            patched.setattr(call, fails_for(real, saved / "step-4" / name, number))
            with pytest.raises(CheckpointError, match=f"{name} cannot be read.*may be whole"):
                restored(saved, tiny_model())
    after = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    assert after == before
    assert restored(saved, tiny_model())[0].step == 4


def test_whether_a_run_has_gone_back_is_not_guessed(saved, tiny_model, monkeypatch):
    """One that cannot be read may be what the run has saved since."""
    fails = fails_for(os.open, saved / "step-4" / "state.json", errno.EACCES)
    monkeypatch.setattr("os.open", fails)
    with pytest.raises(CheckpointError, match="state.json: cannot be read: Permission denied"):
        restored(saved, tiny_model(), load_step=2)
    assert steps(saved) == [2, 4]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_read_now_is_no_new_start(number, saved, tiny_model, monkeypatch):
    monkeypatch.setattr("os.listdir", fails_for(os.listdir, saved, number))
    with pytest.raises(CheckpointError, match="there may be checkpoints in it"):
        restored(saved, tiny_model())


def fails_for(real, file: Path, number: int):
    """The same call, which fails for one file."""

    def call(place, *arguments, **options):
        if isinstance(place, Path) and place == file:
            raise OSError(number, os.strerror(number), str(place))
        return real(place, *arguments, **options)

    return call


def test_only_damaged_ones_is_an_error_not_a_new_start(saved, tiny_model):
    for step in ("step-2", "step-4"):
        (saved / step / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        restored(saved, tiny_model())


def test_a_save_that_fails_at_any_sync_leaves_the_whole_ones_and_no_rest(
    saved, tiny_model, monkeypatch
):
    state, real, calls = trained(tiny_model()), os.fsync, []

    def fails_at(count):
        def fsync(descriptor):
            calls.append(descriptor)
            if len(calls) == count:
                raise OSError(28, "No space left on device")
            real(descriptor)

        return fsync

    state.step = 6
    failures = 0
    for count in range(1, 50):
        calls.clear()
        monkeypatch.setattr(os, "fsync", fails_at(count))
        checkpoints = Checkpoints(saved, settings.Checkpoint(async_mode="async"))
        checkpoints.save(state)
        try:
            checkpoints.wait()
        except CheckpointError as error:
            failures += 1
            assert "No space left" in str(error) and "step-2, step-4" in str(error)
            assert steps(saved)[:2] == [2, 4]
            assert not list(saved.glob("*.writing-*"))
        else:
            break
    assert failures >= 4  # shards, state, manifest, folder
    assert newest(saved) == 6


def test_a_kill_between_the_two_renames_loses_nothing(saved, tiny_model):
    (saved / "step-4").rename(saved / "step-4.before")
    assert restored(saved, tiny_model())[0].step == 4


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned(saved, tiny_model):
    (saved / "step-9.writing-123").mkdir()
    assert newest(saved) == 4
    state = trained(tiny_model())
    state.step = 5
    Checkpoints(saved, SYNC).save(state)
    assert not (saved / "step-9.writing-123").exists()


def test_another_model_is_named(saved, tiny_model):
    with pytest.raises(
        CheckpointError,
        match=r"another model.*embed\.weight is \(97, 32\) there and \(101, 32\) here",
    ):
        restored(saved, tiny_model(vocab_size=101))
    with pytest.raises(CheckpointError, match="layers.2.*is missing"):
        restored(saved, tiny_model("gla", "attention", num_hidden_layers=4))


def test_a_newer_format_is_refused(saved, tiny_model):
    facts = json.loads((saved / "step-4" / "state.json").read_text())
    files = json.loads((saved / "step-4" / "manifest.json").read_text())["files"]
    write_manifest(saved / "step-4", {**facts, "format": 99}, files)
    with pytest.raises(CheckpointError, match="format 99"):
        restored(saved, tiny_model())


def test_nothing_in_it_is_a_pickle(saved):
    for path in (saved / "step-4").iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert list(file.keys())
        else:
            json.loads(path.read_text())
        with pytest.raises((ValueError, IndexError, KeyError)):
            list(pickletools.genops(path.read_bytes()))


def test_old_ones_go_and_milestones_stay(tmp_path, tiny_model):
    state = trained(tiny_model())
    checkpoints = Checkpoints(
        tmp_path, settings.Checkpoint(async_mode="disabled", keep_latest_k=2, milestone_interval=4)
    )
    for step in range(1, 12):
        state.step = step
        checkpoints.save(state)
    assert steps(tmp_path) == [4, 8, 10, 11]


def test_weights_alone_are_exported_but_not_resumed(tmp_path, tiny_model):
    state = trained(tiny_model())
    checkpoints = Checkpoints(
        tmp_path, settings.Checkpoint(model_weights_only=True, async_mode="disabled")
    )
    checkpoints.save(state, last=True)
    weights = load_model_weights(tmp_path / "step-2")
    assert all(
        torch.equal(weights[name], parameter) for name, parameter in state.model.named_parameters()
    )
    with pytest.raises(CheckpointError, match="model_weights_only"):
        restored(tmp_path, tiny_model())


def test_due_by_steps_and_by_seconds(tmp_path, tiny_model, monkeypatch):
    state = trained(tiny_model(), 4)
    by_steps = Checkpoints(tmp_path, settings.Checkpoint(interval=2))
    assert by_steps.due(state) and not Checkpoints(tmp_path, settings.Checkpoint(interval=3)).due(
        state
    )
    assert not Checkpoints(tmp_path, settings.Checkpoint(enable_checkpoint=False, interval=2)).due(
        state
    )
    by_seconds = Checkpoints(tmp_path, settings.Checkpoint(interval_type="seconds", interval=60))
    assert not by_seconds.due(state)
    now = by_seconds.saved_at
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    assert by_seconds.due(state)
