"""The contract of a task: what a record is, what the loss is, what is measured.

The training loop (training/loop.py) knows no task. It asks the task of the run for its model
config, its batches, its loss and its evaluation; steps, schedule, optimizer, plan, checkpoints and
records are the same for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.config.named_options import NoOptions, read_named_options
from longfire.config.transformers_config import TransformersConfig
from longfire.data.step_batch import StepBatch
from longfire.launch import StopRequest
from longfire.mixers.cache import Cache
from longfire.ops.cross_entropy import CorrectLabels
from longfire.parallel.mesh import Mesh

if TYPE_CHECKING:
    from longfire.checkpoint.state import State
    from longfire.config.run import Run
    from longfire.config.run_settings import RunSettings
    from longfire.model import Model

Results = dict[str, dict[str, float]]  # of an evaluation: source -> name -> number


class Task(ABC):
    """The task of one run in one process. The loop calls its methods in the order in which they
    stand here.

    A subclass declares, as data read by the code that acts on it:
      Options:     a frozen dataclass of settings of its own, given as job.task_options
      unread:      keys of settings, or sections, that it does not read: another value than the
                   default is refused
      proven_axes: the axes of a plan (dp_replicate, dp_shard, tp, cp, pp) under which a test has
                   compared its gradients with those of one process; every other axis is refused

    Batch number i is a pure function of the settings and i, for any number of processes: a run then
    resumes to the bit.
    """

    Options: ClassVar[type] = NoOptions
    unread: ClassVar[tuple[str, ...]] = ()
    proven_axes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, run: "Run", mesh: Mesh, stop: StopRequest) -> None:
        """Raises SettingsError for options that the task does not have."""
        self.run = run
        self.mesh = mesh
        self.stop = stop
        self.options = read_task_options(type(self), run.job)

    @classmethod
    def refusals(cls, run: "RunSettings") -> Iterator[str]:
        """A message for each thing of the settings that the task cannot do; asked before data or a
        device is touched."""
        yield from ()

    @abstractmethod
    def opened(self) -> AbstractContextManager[object]:
        """Read the data; its files and threads are closed at the end. Collective over the mesh;
        raises DataError on all processes."""

    def begin(self) -> None:
        """Before the model is made: check, and keep in the run folder, what the run depends on.
        Every process calls it; process 0 alone writes. Raises a UserError."""
        return

    @property
    @abstractmethod
    def model_config(self) -> ModelConfig | TransformersConfig:
        """The config of the run's model, with what the data decides of it."""

    @property
    def vocabulary(self) -> str:
        """A digest of what ids or classes mean, which checkpoints keep: one with another digest is
        refused. Empty: not compared."""
        return ""

    def prepare_model(self, model: "Model") -> None:
        """Change the model before it is split, compiled and given memory."""
        return

    @property
    def frozen_models(self) -> "Sequence[Model]":
        """Models beside it that do not learn, as this process holds them: their memory counts."""
        return ()

    @abstractmethod
    def batch(self, state: "State") -> StepBatch | None:
        """The records of the next step that this process trains on; None where a stop was requested
        while it waited for them."""

    def check_first_batch(self, batch: StepBatch) -> None:
        """Refuse the first batch of this start. Collective over the mesh."""
        return

    @abstractmethod
    def loss_sum(
        self,
        model: "Model",
        batch: StepBatch,
        noise_BT: Tensor | None = None,
        cache: Cache | None = None,
        correct: CorrectLabels | None = None,
    ) -> Tensor:
        """The sum of the loss over the batch's labels, a scalar. The step divides it by the labels
        of all processes, counted before any backward.

        noise_BT: what dropout is made of; None: nothing is dropped. cache: where the batch is a
        segment of its sequences (training.tbptt_segments). correct: with metrics.accuracy, what
        counts the labels that the model finds likeliest.
        """

    @abstractmethod
    def origins(self, first: int, count: int) -> Sequence[object]:
        """Where records [first, first + count) of the run come from, to name them in a message."""

    @abstractmethod
    def evaluate(self, state: "State") -> Results:
        """The numbers of each validation source, recorded as eval/<source>/<name>; among them its
        mean `loss`, and over how many `tokens` or `records` it is the mean. Collective over the
        mesh. Raises EvaluationStopped where a stop is requested before the end."""

    @abstractmethod
    def result_line(self, source: str, numbers: dict[str, float]) -> str:
        """The last evaluation of a source in one sentence."""

    def write_export(self, state: "State") -> dict[str, Path]:
        """With checkpoint.export, after the last step, on process 0: the model in a format of
        others. Returns what was written, by name."""
        return {}

    def write_sample(self, state: "State") -> dict[str, Path]:
        """With eval.sample_prompt, after the last step, on process 0: log what the model writes."""
        return {}


def read_task_options(task: type[Task], job: settings.Job) -> object:
    """job.task_options as the task's own dataclass. Raises SettingsError naming the option."""
    owner = f"job.task = {job.task!r}"
    return read_named_options(task.Options, job.task_options, "job.task_options", owner)
