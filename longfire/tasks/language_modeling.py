"""Text: a record is a sequence of tokens, the loss is -log p of each next token; loss, perplexity
and bits per byte are measured. With a teacher the loss is its own (training/distillation.py)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.transformers_config import TransformersConfig
from longfire.data.batch import Batch
from longfire.data.batches import Batches
from longfire.data.prepare import Prepared
from longfire.data.step_batch import StepBatch
from longfire.evaluation.evaluate import ROWS, evaluate
from longfire.launch import StopRequest
from longfire.loss import loss_sum
from longfire.mixers.cache import Cache
from longfire.model import Model
from longfire.ops.cross_entropy import CorrectLabels
from longfire.parallel.axes import AXES
from longfire.parallel.mesh import Mesh
from longfire.tasks.contract import Results, Task
from longfire.training import lengths, text_outputs
from longfire.training.distillation import Distillation
from longfire.training.start import begin, warn_of_nothing_unseen
from longfire.training.training_data import (
    batches_of,
    next_batch,
    prepare_data,
    refuse_batch_without_labels,
)


class LanguageModeling(Task):
    """Text. What of its settings is refused, config/rules/ says."""

    proven_axes: ClassVar[frozenset[str]] = frozenset(AXES)

    def __init__(self, run: Run, mesh: Mesh, stop: StopRequest) -> None:
        super().__init__(run, mesh, stop)
        self.prepared: Prepared
        self.batches: Batches
        self.teacher: Distillation | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        with (
            self.mesh.rank_0_first(lambda: prepare_data(self.run, self.mesh)) as prepared,
            batches_of(self.run, prepared, self.stop) as batches,
        ):
            self.prepared = prepared
            self.batches = batches
            yield

    def begin(self) -> None:
        run = self.run
        if self.mesh.rank() == 0:
            begin(run, self.prepared)
        self.teacher = Distillation.of_run(run, self.mesh)

    @property
    def model_config(self) -> ModelConfig | TransformersConfig:
        return self.run.known_model_config.with_vocabulary(self.prepared.tokenizer.vocab_size)

    @property
    def vocabulary(self) -> str:
        return self.prepared.tokenizer.vocabulary

    def prepare_model(self, model: Model) -> None:
        if self.teacher:
            self.teacher.prepare(model)

    @property
    def frozen_models(self) -> Sequence[Model]:
        return () if self.teacher is None else (self.teacher.teacher,)

    def batch(self, state: State) -> Batch | None:
        return next_batch(self.run, state, self.batches)

    def check_first_batch(self, batch: StepBatch) -> None:
        assert isinstance(batch, Batch), "a batch of this task"
        refuse_batch_without_labels(self.run, batch, self.mesh)

    def loss_sum(
        self,
        model: Model,
        batch: StepBatch,
        noise_BT: Tensor | None = None,
        cache: Cache | None = None,
        correct: CorrectLabels | None = None,
    ) -> Tensor:
        assert isinstance(batch, Batch), "a batch of this task"
        if self.teacher:
            return self.teacher.loss_sum(model, batch, noise_BT)
        return loss_sum(
            model,
            batch,
            self.run.training.loss_chunk_tokens,
            noise_BT=noise_BT,
            cache=cache,
            correct=correct,
        )

    def origins(self, first: int, count: int) -> Sequence[object]:
        return self.batches.origins(first, count)

    def evaluate(self, state: State) -> Results:
        run = self.run
        results = evaluate(
            state.model,
            self.batches,
            run.eval.tokens,
            run.training.loss_chunk_tokens,
            self.mesh,
            lengths.stage_of_model(run.training, state.step).seq_len,
            # no more sequences at a time than a step has: a requested stop waits for one batch
            min(ROWS, run.training.batch_size),
            run.metrics.accuracy,
        )
        if run.data.streaming:  # otherwise start.begin has warned of it
            warn_of_nothing_unseen(run, self.prepared)
        return results

    def result_line(self, source: str, numbers: dict[str, float]) -> str:
        return text_outputs.validation_line(self.run, source, numbers, self.batches)

    def write_export(self, state: State) -> dict[str, Path]:
        return text_outputs.write_export(self.run, state, self.batches)

    def write_sample(self, state: State) -> dict[str, Path]:
        return text_outputs.write_sample(self.run, state, self.batches)
