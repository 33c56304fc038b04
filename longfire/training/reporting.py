"""One record a step: metrics.jsonl always, the console, TensorBoard and W&B where asked for; and
warnings of slow training."""

import logging
from pathlib import Path

from longfire.config import settings
from longfire.training.console import ConsoleLines
from longfire.training.environment import write_environment
from longfire.training.records import METRICS, RecordFile, Values, unreadable_line
from longfire.training.slowness import SlownessWatch
from longfire.training.trackers import TensorBoard, Tracker, WandB, check_trackers

logger = logging.getLogger(__name__)


class Report:
    """Records of a run. A context manager, open while the run trains: `record` is called inside.

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
        self.trackers: list[Tracker] = []
        self.watch = SlownessWatch(start_step)

    def __enter__(self) -> "Report":
        write_environment(self.folder, self.start_step)
        self.file = RecordFile(self.folder / METRICS, self.start_step)
        self.has_evaluation = self.file.has_evaluation
        if self.file.unreadable:
            logger.warning(unreadable_line(self.folder / METRICS, self.file.unreadable))
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
        """Record the numbers of a step, or of an evaluation (fields eval/<source>/<what>),
        everywhere.

        The console shows a step every log_freq and all evaluations. A number that is not finite is
        null in metrics.jsonl, since JSON has none. Raises CheckpointError if the disk is full.
        """
        self.open_file().write(step, values)
        for tracker in self.trackers:
            tracker.write(step, values)
        self.console.write(step, values)
        for warning in self.watch.look(step, values):
            logger.warning(warning)

    def open_file(self) -> "RecordFile":
        """metrics.jsonl, which is open inside the context."""
        assert self.file is not None, "a report is used as a context manager"
        return self.file

    def expect(self, total_steps: int) -> None:
        """The run is now planned to end after so many steps, which the console shows."""
        self.console.expect(total_steps)


class QuietReport:
    """The report of every process but the first: it writes nothing."""

    has_evaluation = False

    def __enter__(self) -> "QuietReport":
        return self

    def __exit__(self, *_: object) -> None: ...

    def record(self, step: int, values: Values) -> None: ...

    def expect(self, total_steps: int) -> None: ...
