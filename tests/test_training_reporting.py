"""Where a run tells how it goes: the file, the console, TensorBoard, W&B; resumed, killed, with full disks and wrong numbers."""

import errno
import json
import logging
import sys
import types

import pytest

from longfire.config import settings
from longfire.errors import CheckpointError, SettingsError
from longfire.training import records as record_file
from longfire.training import reporting, trackers
from longfire.training.console import duration
from longfire.training.reporting import Report

STEP = {
    "loss": 4.0,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "tokens_per_second": 1000.0,
    "seconds": 0.1,
    "mfu": 0.4,
}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_steps(folder, first, last, **values):
    with Report(folder, settings.Metrics(), 100, first - 1) as opened:
        for step in range(first, last + 1):
            opened.record(step, {**STEP, **values})


def test_one_line_a_step_with_every_field(tmp_path):
    write_steps(tmp_path, 1, 3)
    assert records(tmp_path) == [{"step": step, **STEP} for step in (1, 2, 3)]


def test_resumed_earlier_than_it_stopped_each_step_stands_once(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 9, loss=3.0)
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [
        *((s, 4.0) for s in (1, 2, 3, 4)),
        *((s, 3.0) for s in range(5, 10)),
    ]


def test_started_anew_nothing_of_before_remains(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 1, 2)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "loss"', b'{"step": 4, "loss": 1.0', b"\x00\x00\x00"]
)
def test_a_line_that_a_kill_broke_goes(tmp_path, torn):
    write_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write_steps(tmp_path, 4, 5)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]


DAMAGED = [
    b"[4]\n",
    b'{"step": 2, "loss"\n',
    b"\x00" * 5000 + b"\n",
    b"\xff\xfe\n",
    b'{"loss": 1.0}\n',
    b"\n",
]


@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_damaged_line_costs_no_other_line(tmp_path, capsys, damaged, place):
    """What is cut goes by the step alone; what cannot be read is kept, and counted."""
    write_steps(tmp_path, 1, 5)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:place], damaged, *lines[place:]]))
    capsys.readouterr()
    write_steps(tmp_path, 4, 6, loss=3.0)
    assert "metrics.jsonl: 1 line cannot be read" in capsys.readouterr().err
    after = list(record_file.records(file))
    assert [record["step"] for record in after if record] == [1, 2, 3, 4, 5, 6]
    assert after.count(None) == 1 and damaged in file.read_bytes()
    assert [record["loss"] for record in after if record] == [4.0] * 3 + [3.0] * 3


def test_the_last_records_come_first_without_reading_the_rest(tmp_path, monkeypatch):
    write_steps(tmp_path, 1, 40)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00broken\n")
    for block_bytes in (1, 7, 100, 1 << 16):
        monkeypatch.setattr(record_file, "BLOCK_BYTES", block_bytes)
        assert [
            record["step"] for record in record_file.last_records(tmp_path / "metrics.jsonl")
        ] == list(range(40, 0, -1))


def test_a_tracker_that_is_broken_is_reported(tmp_path, monkeypatch):
    """Installed, but something that it needs is not."""
    for package, key in (
        ("wandb", "enable_wandb"),
        ("torch.utils.tensorboard", "enable_tensorboard"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                SettingsError, match=f"metrics.{key} = true, but the package .* cannot be imported"
            ):
                write_steps_with(tmp_path, settings.Metrics(**{key: True}))


def write_steps_with(folder, metrics):
    with Report(folder, metrics, 10):
        pass


def test_a_whole_record_without_its_line_end_goes_too(tmp_path):
    """Killed between the record and its newline: kept, it and the next record would share a line."""
    write_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss": 1.0}')
    write_steps(tmp_path, 5, 5)
    assert [r["step"] for r in records(tmp_path)][:3] == [1, 2, 3] and records(tmp_path)[-1][
        "step"
    ] == 5


def test_the_evaluation_of_the_step_it_resumes_from_is_kept(tmp_path):
    with Report(tmp_path, settings.Metrics(), 10) as opened:
        for step in (1, 2, 3):
            opened.record(step, STEP)
            opened.record(step, {"eval/wiki/loss": 5.0 - step})
    write_steps(tmp_path, 3, 3)
    assert [(r["step"], r.get("eval/wiki/loss")) for r in records(tmp_path)] == [
        (1, None),
        (1, 4.0),
        (2, None),
        (2, 3.0),
        (3, None),
    ]


def test_the_last_evaluation_of_a_finished_run_stands_once_however_often_it_is_started(tmp_path):
    write_steps(tmp_path, 1, 2)
    for loss in (3.0, 3.0, 2.5):
        with Report(tmp_path, settings.Metrics(), 2, 2) as opened:
            opened.record(2, {"eval/wiki/loss": loss})
    assert records(tmp_path)[2:] == [{"step": 2, "eval/wiki/loss": 2.5}]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has no NaN: a file with one is refused by jq, pandas and browsers."""
    write_steps(tmp_path, 1, 1, loss=float("nan"), grad_norm=float("inf"))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert records(tmp_path)[0]["loss"] is None and records(tmp_path)[0]["grad_norm"] is None


def test_what_a_killed_run_reported_is_on_disk(tmp_path):
    """Every record is readable while the run goes on: nothing waits in a buffer."""
    with Report(tmp_path, settings.Metrics(), 10) as opened:
        opened.record(1, STEP)
        assert records(tmp_path)[0]["step"] == 1


def test_a_full_disk_is_one_clear_message(tmp_path, monkeypatch):
    with Report(tmp_path, settings.Metrics(), 10) as opened:

        class Full:
            def __getattr__(self, name):
                return lambda *_: 0

            def write(self, _):
                raise OSError(errno.ENOSPC, "No space left on device")

        real, opened.file.file = opened.file.file, Full()
        with pytest.raises(
            CheckpointError,
            match=r"metrics.jsonl cannot be written: No space left.*resumes from the newest",
        ):
            opened.record(1, STEP)
        opened.file.file = real


def test_the_console_shows_first_last_and_every_log_freq(tmp_path, capsys):
    with Report(tmp_path, settings.Metrics(log_freq=5), 12) as opened:
        for step in range(1, 13):
            opened.record(step, STEP)
        opened.record(12, {"eval/wiki/loss": 2.5, "eval/code/loss": 1.5})
        logging.getLogger("longfire.test").info("a note")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["1/12", "5/12", "10/12", "12/12"]
    assert (
        "loss 4.0000" in lines[1]
        and "1,000 tokens/s" in lines[1]
        and "mfu 40%" in lines[1]
        and "left" in lines[1]
    )
    assert lines[4:] == ["step 12  validation  wiki: loss 2.5000; code: loss 1.5000", "a note"]


def test_the_console_shows_an_end_as_soon_as_there_is_one(tmp_path, capsys):
    """Of a run with a time budget the number of steps is not known at first."""
    with Report(tmp_path, settings.Metrics(log_freq=1), 0) as opened:
        opened.record(1, STEP)
        opened.expect(40)
        opened.record(2, STEP)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1  loss") and "left" not in first
    assert second.startswith("step  2/40  loss") and second.endswith("left")


@pytest.mark.parametrize(
    "seconds, message",
    [
        (0, "0 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3 * 3600 + 61, "3 h 1 min"),
        (2 * 86400 + 7200, "2 d 2 h"),
    ],
)
def test_durations(seconds, message):
    assert duration(seconds) == message


def test_tensorboard_has_every_number_and_hides_what_was_cut(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = settings.Metrics(enable_tensorboard=True)
    for first, last, loss in ((1, 5, 4.0), (4, 6, 3.0)):
        with Report(tmp_path, metrics, 10, first - 1) as opened:
            for step in range(first, last + 1):
                opened.record(step, {**STEP, "loss": loss})
    events = EventAccumulator(str(tmp_path / metrics.save_tb_folder))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *((s, 4.0) for s in (1, 2, 3)),
        *((s, 3.0) for s in (4, 5, 6)),
    ]
    assert set(events.Tags()["scalars"]) == set(STEP)


@pytest.mark.parametrize(
    "package, key", [("wandb", "enable_wandb"), ("tensorboard", "enable_tensorboard")]
)
def test_a_tracker_that_is_not_installed_is_reported_before_anything_starts(
    tmp_path, monkeypatch, package, key
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else types)
    with pytest.raises(
        SettingsError,
        match=rf"metrics.{key} = true, but the package {package} is not installed: pip install",
    ):
        Report(tmp_path, settings.Metrics(**{key: True}), 10)


class FakeWandB(types.ModuleType):
    """What the run calls of W&B; the real package asks for an account or starts a server process."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_settings_and_records_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(reporting, "check_trackers", lambda metrics: None)
    (tmp_path / "run.toml").write_text("[optimizer]\nlr = 0.001\n")
    metrics = settings.Metrics(enable_wandb=True, wandb_project="p", wandb_mode="offline")
    for first in (1, 3):
        with Report(tmp_path, metrics, 10, first - 1) as opened:
            opened.record(first, STEP)
    assert [o["id"] for o in fake.started] == [fake.started[0]["id"]] * 2
    assert fake.started[0]["mode"] == "offline" and fake.started[0]["project"] == "p"
    assert fake.started[0]["config"] == {"optimizer": {"lr": 0.001}}
    assert (
        [v["step"] for v in fake.logged] == [1, 3]
        and fake.logged[0]["loss"] == 4.0
        and fake.finished == 2
    )


def test_the_environment_is_written_and_a_resumed_run_keeps_the_earlier_one(tmp_path):
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 3, 4)
    message = json.loads((tmp_path / "environment.json").read_text())
    assert message["start_step"] == 2 and [e["start_step"] for e in message["earlier"]] == [0]
    assert message["versions"]["torch"] and message["python"] and message["cpu_cores"] >= 1
