"""What tasks of classes share: the model's answer for a record, its loss, and what is measured."""

import json
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from longfire.checkpoint.provenance import CLASSES_JSON
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.state import State
from longfire.config.model_config import ModelConfig
from longfire.config.run import DATA_JSON
from longfire.config.run_folder import keep
from longfire.config.run_settings import RunSettings
from longfire.data.step_batch import StepBatch
from longfire.errors import DataError, SettingsError
from longfire.evaluation.evaluate import EvaluationStopped
from longfire.huggingface.load import model_of
from longfire.mixers.cache import Cache
from longfire.mlps.auxiliary import refusals as refusals_of_auxiliary_losses
from longfire.model import Model
from longfire.ops.cross_entropy import CorrectLabels
from longfire.own_files import read_json, read_note
from longfire.parallel.apply import device_of, reshard
from longfire.parallel.axes import DATA
from longfire.parallel.tensor_refusals import whole_sequences
from longfire.tasks.class_losses import TOP, counts, numbers_of
from longfire.tasks.contract import Results, Task

if TYPE_CHECKING:
    from longfire.config.run import Run

logger = logging.getLogger(__name__)


def line_of_result(source: str, numbers: dict[str, float]) -> str:
    """The evaluation of a source in one sentence."""
    line = (
        f"validation of {source}: accuracy {numbers['accuracy']:.4f}, loss {numbers['loss']:.4f} "
        f"nats, {numbers['records']:,.0f} records"
    )
    if "accuracy_5" in numbers:
        line += f", right class among the first {TOP}: {numbers['accuracy_5']:.4f}"
    return line


class ClassificationTask(Task):
    """Records with a class each. A subclass reads them, and says what the model answers."""

    unread: ClassVar[tuple[str, ...]] = (
        "distillation",
        "metrics.accuracy",
        "data.validation_seed",
        "data.dataset_name",
        "data.dataset_split",
        "data.data_dir",
        "data.data_files",
        "data.record_format",
        "data.ids_field",
        "data.document_end",
        "data.fields",
        "data.fields_from_record",
        "data.field_separator",
        "data.messages_field",
        "data.split_documents",
        "data.validation_split",
        "data.streaming",
        "data.varlen",
        "data.context_len",
        "data.skip_bad_documents",
        "data.trust_remote_code",
        "model.backend",
        "training.seq_len_schedule",
        "training.tbptt_segments",
        "training.tbptt_exact",
        "training.loss_chunk_tokens",
        "eval.tokens",
        "eval.compare_xz",
        "eval.sample_prompt",
        "eval.sample_tokens",
    )
    proven_axes: ClassVar[frozenset[str]] = frozenset({*DATA, "tp"})

    @classmethod
    def refusals(cls, run: RunSettings) -> Iterator[str]:
        if "embedded" in run.data.dataset:
            yield (
                f"data.dataset = embedded has no classes, which job.task = {run.job.task!r} "
                "learns: name a source of your own"
            )
        tp = run.degrees["tp"]
        if isinstance(run.model_config, ModelConfig):
            is_known = run.model_config.num_classes > 0  # then tensor_refusals.refusals says it
            if tp > 1 and run.parallelism.sequence_parallel and not is_known:
                yield whole_sequences(tp)
            reason = f"job.task = {run.job.task!r} has a loss of its own"
            asked = {reason: "take another MLP"}
            yield from refusals_of_auxiliary_losses(run.model_config, asked)

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""

    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """A digest of the training records of each source, by its name."""

    @abstractmethod
    def logits(self, model: Model, batch: StepBatch, noise_BT: Tensor | None = None) -> Tensor:
        """The model's answer, (B, classes) in fp32."""

    @abstractmethod
    def losses(self, logits_BN: Tensor, batch: StepBatch) -> Tensor:
        """The training loss of each record, (B,)."""

    @abstractmethod
    def validation_batches(self) -> Iterator[tuple[str, Iterator[tuple[StepBatch, Tensor]]]]:
        """The name of each validation source, and its batches with their labels (B,), -100 for
        padding: those of this process, of one size and as many on each."""

    @abstractmethod
    def opened_for_evaluation(
        self, entries: Sequence[str], classes: tuple[str, ...]
    ) -> AbstractContextManager[object]:
        """Instead of `opened`: read the records of these sources as validation records, and nothing
        else. classes: those of the model. Raises DataError on all processes."""

    @abstractmethod
    def batch_of_files(self, files: Sequence[Path]) -> StepBatch:
        """A record of each file, as validation sees it; without labels. Raises DataError."""

    @property
    def model_config(self) -> ModelConfig:
        config = self.run.known_model_config
        assert isinstance(config, ModelConfig), "model.backend is not read"
        return config.with_classes(len(self.classes))

    def begin(self) -> None:
        """Keep the names of the classes, and digests of the data: where they changed since the run
        was last started, that is logged."""
        if self.mesh.rank() == 0:
            keep_classes(self.run, self.classes)
            keep_data(self.run, self.fingerprints())
        shown = ", ".join(self.classes[:TOP])
        more = ", ..." if len(self.classes) > TOP else ""
        logger.info(f"classes: {len(self.classes)} ({shown}{more})")

    def loss_sum(
        self,
        model: Model,
        batch: StepBatch,
        noise_BT: Tensor | None = None,
        cache: Cache | None = None,
        correct: CorrectLabels | None = None,
    ) -> Tensor:
        return self.losses(self.logits(model, batch, noise_BT), batch).sum()

    def evaluate(self, state: State) -> Results:
        return self.measured(state.model)

    @torch.no_grad()
    def measured(self, model: Model) -> Results:
        """What `evaluate` gives, of a model that is not trained."""
        device = device_of(model)
        results: Results = {}
        for name, batches in self.validation_batches():
            total_4 = torch.zeros(4, dtype=torch.float64)
            for batch, labels_B in batches:
                if self.mesh.any(self.stop.requested):
                    raise EvaluationStopped
                logits_BN = self.logits(model, batch.to(device))
                total_4 += counts(logits_BN, labels_B.to(device)).cpu()
            reshard(model)
            total_4 = self.mesh.sum(total_4, *DATA)
            results[name] = numbers_of(total_4, len(self.classes))
        return results

    def last_model(self, state: State) -> Model:
        """The trained model; where its parameters are shards, that of the last checkpoint."""
        if state.mesh.has_whole_parameters:
            return state.model
        weights = load_model_weights(
            self.run.folder / self.run.checkpoint.folder / f"step-{state.step}"
        )
        return model_of(self.model_config, weights, device_of(state.model))

    def result_line(self, source: str, numbers: dict[str, float]) -> str:
        return line_of_result(source, numbers)


def check_several(classes: Sequence[str]) -> None:
    """Raises DataError where the training records have one class: their loss is 0 whatever the
    model is."""
    if len(classes) < 2:
        raise DataError(
            f"data.dataset: every record has the class {classes[0]!r}, so there is nothing to "
            "learn: name data of two classes or more, and check classification.label_field"
        )


def keep_classes(run: "Run", classes: tuple[str, ...]) -> None:
    """classes.json. Raises SettingsError where the run was trained with others: the same outputs
    would mean other classes."""
    file = run.folder / CLASSES_JSON
    if run.has_checkpoints and file.exists():
        fix = "restore it from a copy, or name another job.dump_folder"
        before = read_json(file, list[str], SettingsError, fix)
        if before != list(classes):
            raise SettingsError(
                f"data.dataset has the classes {', '.join(classes[:TOP])} ({len(classes)}), but "
                f"the run in {run.folder} was trained with {', '.join(before[:TOP])} "
                f"({len(before)}): name its data; or another job.dump_folder, with model.weights = "
                f"{str(run.folder)!r} to begin with its body and a fresh head"
            )
    keep(file, json.dumps(classes, indent=1) + "\n")


def keep_data(run: "Run", fingerprints: Mapping[str, str]) -> None:
    """data.json: the digest of each source. Where a run is resumed with other records, that is
    logged."""
    file = run.folder / DATA_JSON
    before = dict(fingerprints)
    if run.has_checkpoints and file.exists():
        before = read_note(file, dict[str, str]) or before
    for name in {**before, **fingerprints}:
        if before.get(name) != fingerprints.get(name):
            logger.info(
                f"changed since this run was last started: the records of {name}; their order is "
                "another one from here on"
            )
    keep(file, json.dumps(dict(fingerprints), indent=1) + "\n")
