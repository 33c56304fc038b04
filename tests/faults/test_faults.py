"""Real runs of two processes, hurt in every way we know: what is said, the exit code, the time until it ends, and that the next
start goes on to the bit."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from real_runs import Running, make
from worlds import free_port

from longfire.checkpoint import saving
from longfire.checkpoint.folder import write_manifest
from longfire.checkpoint.restoring import load_model_weights, newest
from longfire.checkpoint.weights import open_model
from longfire.data.batches import Batches, WaitStopped
from longfire.errors import DataError
from longfire.ops import cross_entropy

TRAIN_SH = Path(__file__).parents[2] / "scripts/train.sh"
SOON_SECONDS = 40  # far below the time-outs of the runs: nobody waits for them


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with recipe and token store, and the weights of a run that nothing hurt."""
    folder = make(tmp_path_factory.mktemp("whole"))
    os.chdir(folder)
    assert Running(folder, 2).end().codes == [0, 0]
    weights = load_model_weights(folder / "run/checkpoints/step-12")
    shutil.rmtree(folder / "run")
    return folder, weights


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared[0], tmp_path / "run", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def slow(rank: int) -> None:
    """Steps that a test can hit: a quarter of a second each."""
    at = Batches.at

    def later(self, first, rows, step_rows=0):
        time.sleep(0.25)
        return at(self, first, rows, step_rows)

    Batches.at = later


def begun(folder, *words: str) -> Running:
    """A run in its first steps."""
    running = Running(folder, 2, *words, patch=slow)
    running.until(0, "loss 5.")
    return running


def assert_goes_on_to_the_bit(folder, prepared, *words: str) -> None:
    ended = Running(folder, 2, *words).end()
    assert ended.codes == [0, 0], ended.said
    weights = load_model_weights(folder / "run/checkpoints/step-12")
    assert all(torch.equal(weights[name], tensor) for name, tensor in prepared[1].items())


def test_a_killed_process_ends_the_run_and_it_goes_on(folder, prepared):
    running = begun(folder)
    running.kill(1)
    ended = running.end(SOON_SECONDS)
    assert ended.codes == [5, -9]
    assert (
        "process 0 lost the others" in ended.said[0] and "the same command resumes" in ended.said[0]
    )
    assert_goes_on_to_the_bit(folder, prepared)


@pytest.mark.parametrize(
    "wanted", [pytest.param(20, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.matrix)]
)
def test_random_kills(folder, prepared, wanted):
    """Any process, at any moment from the start to the end, saves included; killed again while it goes on."""
    chance, kills = random.Random(0), 0
    words = [
        "--checkpoint.interval",
        "1",
        "--comm.init_timeout_seconds",
        "5",
    ]  # that long one waits for who died before they met
    while kills < wanted:
        running = Running(folder, 2, *words)
        time.sleep(chance.uniform(0.05, 1.0) if kills % 5 == 0 else chance.uniform(0.5, 2.5))
        victim = chance.randrange(2)
        if running.processes[victim].is_alive():
            running.kill(victim)
            kills += 1
        ended = running.end(SOON_SECONDS)
        assert ended.codes[victim] in (-9, 0, 5) and ended.codes[1 - victim] in (0, 4, 5), (
            ended.said
        )
        if ended.codes == [0, 0]:
            shutil.rmtree(folder / "run")
    assert_goes_on_to_the_bit(folder, prepared, "--checkpoint.interval", "1")


@pytest.mark.slow
def test_sigterm_to_all_saves_and_goes_on(folder, prepared):
    running = begun(folder)
    for rank in (0, 1):
        running.kill(rank, signal.SIGTERM)
    ended = running.end(SOON_SECONDS)
    assert ended.codes == [143, 143] and "SIGTERM: stopped after step" in ended.said[0], ended.said
    assert newest(folder / "run/checkpoints") is not None
    assert_goes_on_to_the_bit(folder, prepared)


@pytest.mark.slow
def test_sigterm_twice_still_saves(folder, prepared):
    """A launcher and the one that started it may both pass it on."""
    running = begun(folder)
    for rank in (0, 1, 0, 1):
        running.kill(rank, signal.SIGTERM)
    assert running.end(SOON_SECONDS).codes == [143, 143]
    assert_goes_on_to_the_bit(folder, prepared)


def test_sigterm_to_one_stops_all(folder, prepared):
    running = begun(folder)
    running.kill(1, signal.SIGTERM)
    assert running.end(SOON_SECONDS).codes == [143, 143]
    assert_goes_on_to_the_bit(folder, prepared)


def waits_for_rows(rank: int) -> None:
    """Process 1 waits for streamed rows that do not come."""
    slow(rank)
    at = Batches.at

    def waited_for(self, first, rows, step_rows=0):
        if rank and first >= 8:
            while not self.stopped():
                time.sleep(0.01)
            raise WaitStopped
        return at(self, first, rows, step_rows)

    Batches.at = waited_for


def test_sigterm_while_one_process_waits_for_rows(folder, prepared):
    running = Running(folder, 2, patch=waits_for_rows)
    running.until(0, "loss 5.")
    time.sleep(1)
    for rank in (0, 1):
        running.kill(rank, signal.SIGTERM)
    ended = running.end(SOON_SECONDS)
    assert ended.codes == [143, 143] and "saved; the same command resumes" in ended.said[0]
    assert_goes_on_to_the_bit(folder, prepared)


def test_a_process_that_hangs_ends_the_run_in_the_time_allowed(folder, prepared):
    running = begun(folder, "--comm.train_timeout_seconds", "4")
    running.kill(1, signal.SIGSTOP)
    running.processes[0].join(SOON_SECONDS)
    stopped, code = running.processes[0].exitcode is not None, running.processes[0].exitcode
    running.kill(1)
    ended = running.end()
    assert stopped and code == 5, ended.said
    assert "comm.train_timeout_seconds" in ended.said[0] or "lost the others" in ended.said[0]
    assert_goes_on_to_the_bit(folder, prepared)


def starved(rank: int) -> None:
    """The rows of process 1 end in the third step."""
    at = Batches.at

    def until_the_third(self, first, rows, step_rows=0):
        if rank == 1 and first >= 2 * step_rows:
            raise DataError("web row 17: the file ended early; restore it from its source")
        return at(self, first, rows, step_rows)

    Batches.at = until_the_third


@pytest.mark.slow
def test_data_that_end_early_in_one_process(folder, prepared):
    ended = Running(folder, 2, patch=starved).end(SOON_SECONDS)
    assert ended.codes == [5, 3]
    assert "the file ended early" in ended.said[1] and "process 0 lost the others" in ended.said[0]
    assert_goes_on_to_the_bit(folder, prepared)


def full_disk(rank: int) -> None:
    """Process 1 has no room for its part of the second checkpoint."""
    write, saved = saving.write_tensors, []

    def no_room(held, folder, rank):
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        return write(held, folder, rank)

    if rank == 1:
        saving.write_tensors = no_room


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_full_disk_of_one_process(folder, prepared, mode):
    ended = Running(folder, 2, "--checkpoint.async_mode", mode, patch=full_disk).end(SOON_SECONDS)
    assert ended.codes == [4, 4], ended.said
    assert "step-4 could not be written" in "".join(
        ended.said
    ) and "Complete checkpoints: step-2" in "".join(ended.said)
    assert_goes_on_to_the_bit(folder, prepared)


def not_a_number(rank: int) -> None:
    """The loss of process 1 is NaN in the third step."""
    loss, calls = cross_entropy.linear_cross_entropy, []

    def broken(*arguments, **more):
        calls.append(0)
        return loss(*arguments, **more) * (float("nan") if rank == 1 and len(calls) == 3 else 1.0)

    from longfire import loss as room

    room.linear_cross_entropy = broken


@pytest.mark.slow
def test_nan_in_one_process(folder, prepared):
    ended = Running(folder, 2, patch=not_a_number).end(SOON_SECONDS)
    assert ended.codes == [5, 5]
    assert (
        "loss nan" in ended.said[0]
        and "the last batch was sequences" in ended.said[0]
        and not ended.said[1]
    )
    assert_goes_on_to_the_bit(folder, prepared)


def test_a_corrupt_shard_is_named_and_the_one_before_taken(folder, prepared):
    assert Running(folder, 2).end().codes == [0, 0]
    shard = folder / "run/checkpoints/step-12/shard-00001-model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8] + b"somebody")
    ended = Running(folder, 2).end()
    assert ended.codes == [0, 0]
    assert "the bytes of shard-00001-model.safetensors are not those" in ended.said[0]
    assert "resuming from" in ended.said[0] and "step-10" in ended.said[0]
    assert_goes_on_to_the_bit(folder, prepared)


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_version(folder):
    assert Running(folder, 2).end().codes == [0, 0]
    place = folder / "run/checkpoints/step-12"
    facts = json.loads((place / "state.json").read_text())
    files = json.loads((place / "manifest.json").read_text())["files"]
    write_manifest(place, {**facts, "format": 99}, files)
    ended = Running(folder, 2).end(SOON_SECONDS)
    assert (
        ended.codes == [4, 4]
        and "format 99" in ended.said[0]
        and "install a newer one" in ended.said[0]
    )


@pytest.mark.slow
def test_processes_that_start_late_are_waited_for(folder, prepared):
    assert Running(folder, 2, late={1: 3.0}).end().codes == [0, 0]
    weights = load_model_weights(folder / "run/checkpoints/step-12")
    assert all(torch.equal(weights[name], tensor) for name, tensor in prepared[1].items())


@pytest.mark.slow
def test_a_port_that_is_taken(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = Running(
            folder,
            2,
            "--comm.init_timeout_seconds",
            "3",
            "--comm.train_timeout_seconds",
            "3",
            port=taken.getsockname()[1],
        ).end(SOON_SECONDS)
    assert ended.codes == [5, 5]
    assert (
        "could not join the others at 127.0.0.1:" in ended.said[0]
        and "set MASTER_ADDR and MASTER_PORT" in ended.said[0]
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--parallelism.pipeline_parallel_degree", "2"],
        ["--parallelism.tensor_parallel_degree", "2"],
        [
            "--parallelism.cpu_offload",
            "true",
            "--checkpoint.export",
            "true",
            "--eval.sample_prompt",
            "sheep",
        ],
        [
            "--parallelism.mesh_dim",
            "2,1,1,1",
            "--training.gradient_accumulation_steps",
            "1",
            "--training.global_batch_size",
            "4",
        ],
    ],
    ids=["pipeline", "tensor", "offloaded, exported", "replicas"],
)
def test_a_run_of_every_kind_ends_and_is_read_by_one_process(folder, words):
    ended = Running(folder, 2, *words).end()
    assert ended.codes == [0, 0], ended.said
    assert open_model(folder / "run").step == 12
    assert ("export: reloaded and compared" in ended.said[0]) == ("--checkpoint.export" in words)


def test_a_step_that_is_not_there_is_reported_once(folder):
    ended = Running(folder, 2, "--checkpoint.load_step", "99").end(SOON_SECONDS)
    assert ended.codes == [4, 4] and "no such checkpoint" in ended.said[0] and not ended.said[1]


def test_wrong_settings_are_reported_once(folder):
    ended = Running(folder, 2, "--parallelism.tensor_parallel_degree", "3").end(SOON_SECONDS)
    assert (
        ended.codes == [2, 2]
        and "do not make up the 2 process(es)" in ended.said[0]
        and not ended.said[1]
    )


@pytest.mark.slow
def test_two_runs_in_one_folder_are_reported_once(folder):
    running = begun(folder, "--training.steps", "1000")
    second = folder / "second"
    second.mkdir()
    for name in ("recipe.toml", "shape.json", "text.txt"):
        shutil.copy(folder / name, second / name)
    ended = Running(
        second,
        2,
        "--job.dump_folder",
        str(folder / "run"),
        "--data.folder",
        str(folder / "token-stores"),
    )
    ended = ended.end(SOON_SECONDS)
    assert (
        ended.codes == [2, 2]
        and "is being trained into by process" in ended.said[0]
        and not ended.said[1]
    )
    running.kill(0)
    running.kill(1)
    running.end()


DIES_ONCE = """
import os, pathlib, threading, time
MIXERS = {}  # a plugin is code of the user's own: this one kills process 1 when there is something to resume from
def die():
    while not pathlib.Path("run/checkpoints/step-2").exists():
        time.sleep(0.005)
    pathlib.Path("died").touch()
    os.kill(os.getpid(), 9)
if os.environ.get("RANK") == "1" and not pathlib.Path("died").exists():
    threading.Thread(target=die, daemon=True).start()
"""


@pytest.mark.slow
def test_torchrun_starts_all_again_from_the_newest_checkpoint(folder, prepared):
    """scripts/train.sh with a real torchrun: one process dies, all start again, and the end is to the bit the same."""
    (folder / "dies.py").write_text(DIES_ONCE)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NGPU": "2",
        "MAX_RESTARTS": "1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    words = ["recipe.toml", "--model.plugins", "dies.py", "--training.steps", "12"]
    done = subprocess.run(
        ["bash", str(TRAIN_SH), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "died").exists() and "resuming from" in done.stdout
    weights = load_model_weights(folder / "run/checkpoints/step-12")
    assert all(torch.equal(weights[name], tensor) for name, tensor in prepared[1].items())
