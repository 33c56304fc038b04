"""One record a step: metrics.jsonl always, the console, TensorBoard and W&B where asked; and the
warnings of promise 14."""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longfire import launch
from longfire.config import settings
from longfire.disk import write_whole
from longfire.errors import CheckpointError, SettingsError
from longfire.plural import counted

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
RUN_TOML = "run.toml"
WANDB_ID = "wandb-id.txt"
WINDOW_STEPS = 50  # over which the console averages and data wait is judged
QUIET_STEPS = 500  # between two warnings of one kind
WARMUP_STEPS = 20  # of a process, in which graphs may be compiled without a warning
DATA_WAIT_LIMIT = 0.05
BLOCK_BYTES = 1 << 16  # of metrics.jsonl that are read at a time from its end

Values = Mapping[str, float]


def check_trackers(metrics: settings.Metrics) -> None:
    """Raises SettingsError if a tracker that the settings ask for is not installed, or not whole:
    before any data or device is touched."""
    asked = []
    if metrics.enable_wandb:
        asked.append(("metrics.enable_wandb", "wandb", "wandb", "pip install 'longfire[wandb]'"))
    if metrics.enable_tensorboard:
        asked.append(
            (
                "metrics.enable_tensorboard",
                "tensorboard",
                "torch.utils.tensorboard",
                "pip install tensorboard",
            )
        )
    for key, package, module, install in asked:
        if importlib.util.find_spec(package) is None:
            raise SettingsError(
                f"{key} = true, but the package {package} is not installed: {install}, or set {key} to false"
            )
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise SettingsError(
                f"{key} = true, but the package {package} cannot be imported ({error}): {install}, or set {key} to false"
            ) from error


class Report:
    """Where a run tells how it goes. A context manager, open while the run trains; `record` and
    `note` may then be called.

    Resumed at `start_step`, it cuts the records of later steps off metrics.jsonl, so that the file
    holds each step once. Raises SettingsError for a tracker that is not installed, CheckpointError
    if the run folder cannot be written.
    """

    def __init__(
        self, folder: Path, metrics: settings.Metrics, total_steps: int, start_step: int = 0
    ) -> None:
        check_trackers(metrics)
        self.folder = folder
        self.metrics = metrics
        self.start_step = start_step
        self.console = ConsoleLines(metrics, total_steps, start_step)
        self.file: RecordFile | None = None
        self.has_evaluation = False  # of start_step, among the records that were there before
        self.trackers: list[Any] = []
        self.watch = SlownessWatch(start_step)

    def __enter__(self) -> "Report":
        write_environment(self.folder, self.start_step)
        self.file = RecordFile(self.folder / METRICS, self.start_step)
        self.has_evaluation = self.file.has_evaluation
        if self.file.unreadable:
            print(unreadable_line(self.folder / METRICS, self.file.unreadable), flush=True)
        if self.metrics.enable_tensorboard:
            self.trackers.append(
                TensorBoard(self.folder / self.metrics.save_tb_folder, self.start_step)
            )
        if self.metrics.enable_wandb:
            self.trackers.append(WandB(self.folder, self.metrics))
        self.console.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.console.close()
        self.open_file().close()
        for tracker in self.trackers:
            tracker.close()

    def record(self, step: int, values: Values) -> None:
        """Tell one step's numbers, or one evaluation's (fields eval/<source>/<what>), everywhere.

        The console shows steps every log_freq and all evaluations. A number that is not finite is
        null in metrics.jsonl, since JSON has no word for it. Raises CheckpointError if the disk is
        full.
        """
        self.open_file().write(step, values)
        for tracker in self.trackers:
            tracker.write(step, values)
        self.console.write(step, values)
        for warning in self.watch.look(step, values):
            self.note(warning)

    def open_file(self) -> "RecordFile":
        """metrics.jsonl, which is open inside the context."""
        assert self.file is not None, "a report is used as a context manager"
        return self.file

    def note(self, text: str) -> None:
        """Print one line above the progress."""
        self.console.print(text)

    def expect(self, total_steps: int) -> None:
        """The run is now planned to end after so many steps: what the console shows as its end."""
        self.console.expect(total_steps)


class QuietReport:
    """That of every process but the first: it tells nothing."""

    has_evaluation = False

    def __enter__(self) -> "QuietReport":
        return self

    def __exit__(self, *_: object) -> None: ...

    def record(self, step: int, values: Values) -> None: ...

    def note(self, text: str) -> None: ...

    def expect(self, total_steps: int) -> None: ...


class RecordFile:
    """metrics.jsonl: one JSON object a line, flushed at once, in the order of steps, each step
    once.

    A step and its evaluation are two lines. A line of the same step and fields as the one before it
    replaces it: so the last evaluation of a finished run stands there once, however often the run
    is started again.

    unreadable: how many lines no record could be read from; they stay where they are.
    has_evaluation: whether there is one of start_step.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.last: tuple[int, frozenset[str]] | None = None
        self.last_at = 0
        self.unreadable = 0
        self.has_evaluation = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self.cut(start_step)
            self.file = path.open("a+b")
        except OSError as error:
            raise self.unwritable(error) from error

    def write(self, step: int, values: Values) -> None:
        record = {"step": step, **{key: plain(value) for key, value in values.items()}}
        fields = (step, frozenset(record))
        try:
            if fields == self.last:
                self.file.truncate(self.last_at)
            self.last = fields
            self.last_at = self.file.seek(0, 2)
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise self.unwritable(error) from error

    def cut(self, start_step: int) -> None:
        """Leave out the records of later steps, and an end that a kill broke off. What cannot be
        read says no step: it stays."""
        kept_from: int | None = None  # where the first line lies that is left out
        after: list[bytes] = []  # lines behind it that stay
        at = 0
        with self.path.open("r+b") as file:
            for line in file:
                record = parsed(line)
                is_kept = line.endswith(b"\n") and (record is None or record["step"] <= start_step)
                if is_kept:
                    self.look_at(record, at, start_step)
                    at += len(line)
                    if kept_from is not None:
                        after.append(line)
                elif kept_from is None:
                    kept_from = at
            if kept_from is None:
                return
            file.seek(kept_from)
            file.writelines(after)
            file.truncate()

    def look_at(self, record: dict[str, Any] | None, at: int, start_step: int) -> None:
        """Note what a line that stays tells; `at`: where it begins."""
        if record is None:
            self.unreadable += 1
            self.last = None
            return
        self.last = (record["step"], frozenset(record))
        self.last_at = at
        self.has_evaluation |= record["step"] == start_step and is_evaluation(record)

    def close(self) -> None:
        self.file.close()

    def unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be written: {error.strerror}. Free some space or name another job.dump_folder; "
            "the same command resumes from the newest whole checkpoint"
        )


def is_evaluation(record: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in record)


def records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a metrics.jsonl in its order; None for a line that none can be read from. A
    line that is being written right now is left out."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield parsed(line)


def last_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records that can be read, from the end of the file to its beginning; what is not asked
    for is not read."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            rest = lines.pop(0) if start else b""
            yield from filter(None, map(parsed, reversed(lines)))
            end = start


def unreadable_line(path: Path, count: int) -> str:
    return f"warning: {path}: {counted(count, 'line')} cannot be read; what they held is missing from curves and tables"


def parsed(line: bytes | str) -> dict[str, Any] | None:
    """The record in a whole line of metrics.jsonl, else None."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if isinstance(record, dict) and isinstance(record.get("step"), int):
        return record
    return None


def plain(value: float) -> float | None:
    if math.isfinite(value):
        return value
    return None


class ConsoleLines:
    """Progress, loss, speed and remaining time: one live line in a terminal, and a plain line every
    log_freq anywhere.

    total_steps: of the whole run; 0: not known yet.
    """

    def __init__(self, metrics: settings.Metrics, total_steps: int, start_step: int) -> None:
        self.log_freq = max(1, metrics.log_freq)
        self.total_steps = total_steps
        self.start_step = start_step
        self.rich = Console(highlight=False, soft_wrap=True)
        self.steps: deque[Values] = deque(maxlen=WINDOW_STEPS)
        self.times: deque[float] = deque(maxlen=WINDOW_STEPS + 1)
        self.progress: Progress | None = None
        if self.rich.is_terminal and not metrics.disable_color_printing:
            columns = [
                TextColumn("{task.fields[place]}"),
                BarColumn(None),
                TextColumn("{task.fields[numbers]}"),
            ]
            self.progress = Progress(*columns, console=self.rich, refresh_per_second=2)

    def open(self) -> None:
        self.times.append(time.monotonic())
        if self.progress:
            self.task = self.progress.add_task(
                "", total=self.total_steps or None, completed=self.start_step, place="", numbers=""
            )
            self.progress.start()

    def expect(self, total_steps: int) -> None:
        self.total_steps = total_steps
        if self.progress:
            self.progress.update(self.task, total=total_steps)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()

    def print(self, text: str) -> None:
        if self.progress:
            self.rich.print(text, markup=False)
        else:
            print(text, flush=True)

    def write(self, step: int, values: Values) -> None:
        if "loss" not in values:
            self.print(evaluation_line(step, values))
            return
        self.steps.append(values)
        self.times.append(time.monotonic())
        if self.total_steps:
            place = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        else:
            place = f"step {step}"
        numbers = self.numbers(step)
        if self.progress:
            self.progress.update(self.task, completed=step, place=place, numbers=numbers)
        if step % self.log_freq == 0 or step in (self.start_step + 1, self.total_steps):
            self.print(f"{place}  {numbers}")

    def numbers(self, step: int) -> str:
        """This step's loss, norm and rate; speed as the mean of the last steps; the time that
        remains at that speed."""
        now = self.steps[-1]
        parts = []
        for key, form in (
            ("loss", "loss {:.4f}"),
            ("grad_norm", "grad norm {:.3g}"),
            ("lr", "lr {:.3g}"),
        ):
            if key in now:
                parts.append(form.format(now[key]))
        timed = [v for v in self.steps if "seconds" in v and "tokens_per_second" in v]
        seconds = sum(v["seconds"] for v in timed)
        if seconds > 0:
            parts.append(
                f"{sum(v['tokens_per_second'] * v['seconds'] for v in timed) / seconds:,.0f} tokens/s"
            )
            if all("mfu" in v for v in timed):
                parts.append(f"mfu {sum(v['mfu'] * v['seconds'] for v in timed) / seconds:.0%}")
        if now.get("skipped_steps"):
            parts.append(f"{now['skipped_steps']:.0f} skipped")
        if self.total_steps:
            seconds_per_step = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            parts.append(f"{duration(seconds_per_step * max(0, self.total_steps - step))} left")
        return "  ".join(parts)


def evaluation_line(step: int, values: Values) -> str:
    """step 20  wiki: loss 5.1234, bits per byte 2.3100; code: ..."""
    sources: dict[str, list[str]] = {}
    for key, value in values.items():
        source, _, what = key.removeprefix("eval/").rpartition("/")
        sources.setdefault(source, []).append(
            f"{what} {value:,.0f}" if value == int_of(value) else f"{what} {value:.4f}"
        )
    told = "; ".join(
        (f"{source}: " if source else "") + ", ".join(numbers)
        for source, numbers in sources.items()
    )
    return f"step {step}  validation  {told}"


def int_of(value: float) -> int | None:
    if math.isfinite(value):
        return int(value)
    return None


def duration(seconds: float) -> str:
    """The two largest units: 42 s, 3 min 20 s, 5 h 12 min, 4 d 3 h."""
    whole = round(seconds)
    for large, small, size, ratio in (
        ("d", "h", 86400, 3600),
        ("h", "min", 3600, 60),
        ("min", "s", 60, 1),
    ):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // ratio} {small}"
    return f"{whole} s"


class SlownessWatch:
    """Promise 14: says so when training waits for data, or compiles again after its warm-up; not
    more than once in a while."""

    def __init__(self, start_step: int) -> None:
        self.start_step = start_step
        self.window: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self.recompiles: float | None = None
        self.quiet_until = {"data": 0, "recompiles": 0}

    def look(self, step: int, values: Values) -> list[str]:
        """The warnings that this step's record gives rise to."""
        if "seconds" not in values:
            return []
        warnings = []
        seconds = values["seconds"]
        self.window.append((values.get("data_wait_fraction", 0.0) * seconds, seconds))
        waited, whole = (sum(column) for column in zip(*self.window))
        if (
            len(self.window) == WINDOW_STEPS
            and waited > DATA_WAIT_LIMIT * whole
            and step >= self.quiet_until["data"]
        ):
            self.quiet_until["data"] = step + QUIET_STEPS
            warnings.append(
                f"warning: step {step}: {waited / whole:.0%} of the last {WINDOW_STEPS} steps went into waiting for data. A larger "
                "data.prefetch_factor evens out slow batches; with data.streaming more data.num_workers tokenize, or prepare "
                "the data first (longfire prepare)"
            )
        graphs = values.get("recompiles", 0)
        more = 0 if self.recompiles is None else graphs - self.recompiles
        self.recompiles = graphs
        if (
            more > 0
            and step > self.start_step + WARMUP_STEPS
            and step >= self.quiet_until["recompiles"]
        ):
            self.quiet_until["recompiles"] = step + QUIET_STEPS
            warnings.append(
                f"warning: step {step}: torch.compile made {more:.0f} more graph(s), {graphs:.0f} in all, after the warm-up: shapes "
                "or settings of the model change from step to step; training.compile = off avoids the wait"
            )
        return warnings


class TensorBoard:
    """Every number of a record as a scalar of the same name; of a resumed run, what lay beyond its
    start is hidden."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: Values) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """The same on Weights & Biases; a resumed run goes on as the same run there (its id is kept in
    the run folder)."""

    def __init__(self, folder: Path, metrics: settings.Metrics) -> None:
        import wandb

        kept = folder / WANDB_ID
        if not kept.exists():
            kept.write_text(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        options = {
            "project": metrics.wandb_project,
            "mode": metrics.wandb_mode,
            "id": kept.read_text(),
            "name": folder.name,
        }
        self.run = wandb.init(
            dir=str(folder),
            config=settings_of(folder),
            resume="allow",
            **{**options, **launch.wandb_run()},
        )
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


def settings_of(folder: Path) -> dict[str, Any]:
    """The resolved settings of a run folder; empty if it has none."""
    path = folder / RUN_TOML
    if path.exists():
        return tomllib.loads(path.read_text(encoding="utf-8"))
    return {}


def write_environment(folder: Path, start_step: int) -> None:
    """environment.json: what this run runs on. A resumed run keeps what it ran on before, under
    `earlier`."""
    path = folder / ENVIRONMENT
    now = {"start_step": start_step, **environment()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if start_step and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            now["earlier"] = [*before.pop("earlier", []), before]
        write_whole(path, json.dumps(now, indent=1))
    except OSError as error:
        fix = "free some space or name another job.dump_folder"
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; {fix}") from error


def environment() -> dict[str, Any]:
    """Versions, git revision, devices and command line of this process."""
    import torch

    packages = (
        "longfire",
        "torch",
        "numpy",
        "transformers",
        "datasets",
        "tokenizers",
        "safetensors",
        "triton",
        "fla-core",
    )
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "versions": {name: version for name in packages if (version := version_of(name))},
        "git": git_revision(Path(__file__).parent),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": {"devices": cuda, "version": torch.version.cuda} if cuda else None,
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(folder: Path) -> str | None:
    """Commit of the sources in use, with `+changes` if files differ from it; None where they are
    not a git checkout."""
    try:
        command = [
            "git",
            "-C",
            str(folder),
            "describe",
            "--always",
            "--abbrev=40",
            "--match=",
            "--dirty=+changes",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode == 0:
        return result.stdout.strip()
    return None


def cpu_name() -> str:
    """As /proc/cpuinfo names it, else as the platform does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if names:
        return names[0]
    return platform.processor() or platform.machine()
