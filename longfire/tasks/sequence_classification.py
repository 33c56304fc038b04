"""Texts with a class: a record is a text, the loss is the cross-entropy of its class, and accuracy
is measured. The head sees the last token of a text, or what `pool` of the model's config says."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config.model_config import ModelConfig
from longfire.config.run_settings import RunSettings
from longfire.data.batch import Batch
from longfire.data.batches import order_of
from longfire.data.files import short_name
from longfire.data.labelled_texts import LabelledTexts, classes_of, encoded, read_labelled
from longfire.data.order import places
from longfire.data.pack import NO_LABEL
from longfire.data.prepare import distinct
from longfire.data.step_batch import StepBatch
from longfire.data.text import one_for_each, same_for_all
from longfire.data.tokenizer import Tokenizer, check_ends
from longfire.data.validation import kept_records
from longfire.errors import DataError
from longfire.model import Model
from longfire.ops.documents import Documents
from longfire.parallel.axes import DATA
from longfire.regular_files import read_regular
from longfire.tasks.class_losses import class_logits, class_losses, text_hidden, text_pooled
from longfire.tasks.classification import ClassificationTask, check_several
from longfire.training.start import keep_tokenizer

logger = logging.getLogger(__name__)


class EncodedTexts(NamedTuple):
    """Some texts of a source: their ids, their classes by number, int64 (N,), and the place of
    each."""

    name: str
    ids: list[np.ndarray]
    labels_N: np.ndarray
    where: list[str]


class SequenceClassification(ClassificationTask):
    """Texts of jsonl and parquet files, which are read whole; one text a sequence, padded to
    training.seq_len."""

    unread: ClassVar[tuple[str, ...]] = (*ClassificationTask.unread, "images", "checkpoint.export")

    @classmethod
    def refusals(cls, run: RunSettings) -> Iterator[str]:
        yield from super().refusals(run)
        config = run.model_config
        if isinstance(config, ModelConfig):
            if config.image_size:
                yield (
                    f"image_size = {config.image_size} of {run.model_config_source} is of a model "
                    f"of images, but job.task = {run.job.task!r}: leave it out"
                )
            if config.pool == "first" and config.direction == "causal":
                yield (
                    f"pool = 'first' of {run.model_config_source} takes the first token, which "
                    "with direction = 'causal' sees no other: take 'last' or 'mean'"
                )
        if run.tokenizer.path == "train":
            yield (
                f"tokenizer.path = train is not supported by job.task = {run.job.task!r}: name a "
                "tokenizer, or bytes"
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self.mesh.raise_on_all_ranks():
            self.read()
        yield

    @contextmanager
    def opened_for_evaluation(
        self, entries: Sequence[str], classes: tuple[str, ...]
    ) -> Iterator[None]:
        with self.mesh.raise_on_all_ranks():
            self.read_tokenizer()
            self._classes = classes
            self.read_validation(entries)
        yield

    def read_tokenizer(self) -> None:
        """Raises SettingsError and DataError."""
        self.tokenizer = Tokenizer.load(self.run.tokenizer.path)
        check_ends(self.tokenizer, self.run.tokenizer)
        self.training: list[EncodedTexts] = []
        self.validation: list[EncodedTexts] = []

    def read(self) -> None:
        """Read and encode the texts. Raises SettingsError and DataError."""
        run = self.run
        self.read_tokenizer()
        self.order = order_of(run.data, run.training.seed)
        sources = self.sources(run.data.dataset, run.data.text_field)
        self.digests = {source.name: source.fingerprint() for source in sources}
        labels: set[str] = set()
        for source in sources:
            labels.update(source.labels)
        self._classes = classes_of(labels)
        check_several(self._classes)
        fraction = 0.0 if run.data.validation else run.data.validation_fraction
        for source in sources:
            identities = [f"row {number}" for number in range(len(source.texts))]
            kept_N = kept_records(identities, fraction)
            self.training.append(self.encode(source, ~kept_N))
            if not self.training[-1].ids:
                raise DataError(f"{source.name}: no text is left to train on")
            if kept_N.any():
                self.validation.append(self.encode(source, kept_N))
        self.read_validation(run.data.validation)
        self.shares = run.data.data_probs or tuple(float(len(part.ids)) for part in self.training)

    def read_validation(self, entries: Sequence[str]) -> None:
        """All texts of these sources. Raises SettingsError and DataError."""
        for source in self.sources(entries, same_for_all(self.run.data.text_field)):
            self.validation.append(self.encode(source, np.ones(len(source.texts), bool)))

    def sources(self, entries: Sequence[str], text_field: tuple[str, ...]) -> list[LabelledTexts]:
        """The records of data.dataset or data.validation. text_field: one, or one for each."""
        text_fields = one_for_each("text_field", text_field, len(entries))
        names = distinct([short_name(entry) for entry in entries])
        label_field = self.run.classification.label_field
        found: list[LabelledTexts] = []
        for entry, name, field in zip(entries, names, text_fields):
            found.append(read_labelled(entry, name, field, label_field))
        return found

    def encode(self, source: LabelledTexts, chosen_N: np.ndarray) -> EncodedTexts:
        """The chosen texts as ids. Raises DataError for a class that is not trained on."""
        run = self.run
        chosen = np.flatnonzero(chosen_N).tolist()
        part = LabelledTexts(
            source.name,
            tuple(source.texts[number] for number in chosen),
            tuple(source.labels[number] for number in chosen),
            tuple(source.where[number] for number in chosen),
        )
        number_of = {name: number for number, name in enumerate(self._classes)}
        for label, where in zip(part.labels, part.where):
            if label not in number_of:
                raise DataError(
                    f"{where}: the class {label!r} is not one of the {len(number_of)} that are "
                    "trained on (data.dataset): remove the record, or add some there"
                )
        tokens = run.training.seq_len
        ids, cut = encoded(
            part, self.tokenizer, tokens, run.tokenizer.add_bos, run.tokenizer.add_eos
        )
        if cut:
            logger.info(
                f"{source.name}: {cut:,} of {len(ids):,} texts are longer than training.seq_len = "
                f"{tokens} tokens: their first ones are used"
            )
        labels_N = np.array([number_of[label] for label in part.labels], np.int64)
        return EncodedTexts(source.name, ids, labels_N, list(part.where))

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def vocabulary(self) -> str:
        meaning = "\0".join((self.tokenizer.vocabulary, *self._classes))
        return blake2b(meaning.encode(), digest_size=16).hexdigest()

    @property
    def model_config(self) -> ModelConfig:
        return super().model_config.with_vocabulary(self.tokenizer.vocab_size)

    def fingerprints(self) -> dict[str, str]:
        return self.digests

    def begin(self) -> None:
        super().begin()
        if self.mesh.rank() == 0:
            keep_tokenizer(self.run, self.tokenizer)

    def batch(self, state: State) -> Batch:
        run = self.run
        here = run.training.batch_size * run.accumulation
        first = state.rows_consumed + self.mesh.rank(*DATA) * here
        found = self.places(first, here)
        ids = [self.training[source].ids[number] for source, _, number in found]
        labels = [int(self.training[source].labels_N[number]) for source, _, number in found]
        return self.made(ids, labels)

    def places(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Source, epoch and number there of the texts [first, first + count) of the run."""
        sizes = [len(part.ids) for part in self.training]
        numbers = range(first, first + count)
        return places(self.order, numbers, sizes, self.shares, self.run.training.seed)

    def made(self, ids: Sequence[np.ndarray], labels: Sequence[int]) -> Batch:
        """A batch of texts: each is padded at its end, and has its class at its last token. Where
        tokens see later ones, the padding is a document of its own."""
        T = self.run.training.seq_len
        ids_BT = torch.zeros(len(ids), T, dtype=torch.int64)
        labels_BT = torch.full((len(ids), T), NO_LABEL)
        is_padding_BT = torch.ones(len(ids), T, dtype=torch.int64)
        for row, (ids_N, label) in enumerate(zip(ids, labels)):
            ids_BT[row, : len(ids_N)] = torch.from_numpy(ids_N)
            labels_BT[row, len(ids_N) - 1] = label
            is_padding_BT[row, : len(ids_N)] = 0
        documents = None
        if self.model_config.direction == "both":
            documents = Documents.from_ids(is_padding_BT)
        return Batch(ids_BT, labels_BT, torch.arange(T).expand(len(ids), T), documents)

    def batch_of_files(self, files: Sequence[Path]) -> Batch:
        """A whole file is one text, in UTF-8, of which the first training.seq_len tokens are
        used."""
        texts = tuple(read_text(file) for file in files)
        names = tuple(map(str, files))
        tokens = self.run.training.seq_len
        of_files = LabelledTexts("files", texts, names, names)
        ends = self.run.tokenizer
        ids, _ = encoded(of_files, self.tokenizer, tokens, ends.add_bos, ends.add_eos)
        return self.made(ids, [0] * len(ids))

    def logits(self, model: Model, batch: StepBatch, noise_BT: Tensor | None = None) -> Tensor:
        assert isinstance(batch, Batch), "a batch of this task"
        hidden_BTD = text_hidden(model, batch, noise_BT)
        return class_logits(model, text_pooled(hidden_BTD, batch, model.config.pool))

    def losses(self, logits_BN: Tensor, batch: StepBatch) -> Tensor:
        assert isinstance(batch, Batch), "a batch of this task"
        smoothing = self.run.classification.label_smoothing
        return class_losses(logits_BN, batch.labels_BT.amax(1), smoothing)

    def origins(self, first: int, count: int) -> list[str]:
        found: list[str] = []
        for source, epoch, number in self.places(first, count):
            found.append(f"{self.training[source].where[number]} in epoch {epoch}")
        return found

    def validation_batches(self) -> Iterator[tuple[str, Iterator[tuple[StepBatch, Tensor]]]]:
        for part in self.validation:
            yield part.name, self.batches_of(part)

    def batches_of(self, part: EncodedTexts) -> Iterator[tuple[StepBatch, Tensor]]:
        """The batches of a validation source that this process computes."""
        processes = self.mesh.size(*DATA)
        count = self.run.training.batch_size * processes
        for first in range(0, len(part.ids), count):
            labels = part.labels_N[first : first + count].tolist()
            of_all = self.made(part.ids[first : first + count], labels)
            batch = of_all.process_part(self.mesh.rank(*DATA), processes)
            yield batch, batch.labels_BT.amax(1)


def read_text(file: Path) -> str:
    """The text of a file. Raises DataError where it holds none in UTF-8."""
    try:
        text = read_regular(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{file}: it holds no text: name a file that does")
    return text
