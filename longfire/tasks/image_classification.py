"""Images: a record is an image with a class, the loss is the cross-entropy of its class; its
accuracy is measured (Dosovitskiy 2021, the Vision Transformer; with any mixer)."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config import settings
from longfire.config.model_config import ModelConfig
from longfire.config.run_settings import RunSettings
from longfire.data.step_batch import StepBatch
from longfire.errors import SettingsError
from longfire.huggingface.vit import vit_config
from longfire.huggingface.vit_export import export_vit
from longfire.images.augmentation import View
from longfire.images.batch import ImageBatch
from longfire.images.batches import ImageBatches
from longfire.images.dataset import ImageDataset, read_dataset, validation_of
from longfire.images.decoding import refuse_without_pillow
from longfire.model import Model
from longfire.parallel.axes import DATA
from longfire.tasks.class_losses import image_logits, image_losses
from longfire.tasks.classification import ClassificationTask, check_several

logger = logging.getLogger(__name__)


class ImageClassification(ClassificationTask):
    """Images of folders or parquet files."""

    unread: ClassVar[tuple[str, ...]] = (
        *ClassificationTask.unread,
        "tokenizer",
        "data.text_field",
    )

    @classmethod
    def refusals(cls, run: RunSettings) -> Iterator[str]:
        yield from super().refusals(run)
        try:
            refuse_without_pillow()
        except SettingsError as error:
            yield str(error)
        config = run.model_config
        if not isinstance(config, ModelConfig) or not config.image_size:
            yield (
                f"job.task = {run.job.task!r} needs a model of images: set image_size in "
                f"{run.model_config_source or '[model]'}, or take vit-s-16"
            )
            return
        if run.training.seq_len != config.image_tokens:
            yield (
                f"training.seq_len = {run.training.seq_len}, but an image has "
                f"{config.image_tokens} tokens (image_size = {config.image_size}, patch_size = "
                f"{config.patch_size}): leave it out"
            )
        yield from refusals_of_views(run.images, config)
        if run.checkpoint.export:
            yield from refusals_of_export(run, config)

    @contextmanager
    def opened(self) -> Iterator[None]:
        run = self.run
        with self.mesh.raise_on_all_ranks():
            self.dataset: ImageDataset = read_dataset(run.data, run.images, run.classification)
            check_several(self.dataset.classes)
        with self.batches_of_dataset() as self.batches:
            yield

    @contextmanager
    def opened_for_evaluation(
        self, entries: Sequence[str], classes: tuple[str, ...]
    ) -> Iterator[None]:
        run = self.run
        with self.mesh.raise_on_all_ranks():
            validation = validation_of(entries, classes, run.images, run.classification)
        self.dataset = ImageDataset(classes, (), validation, ())
        with self.batches_of_dataset() as self.batches:
            yield

    def batches_of_dataset(self) -> ImageBatches:
        """The batches of the images that were read, in the size of the model."""
        run = self.run
        config = run.known_model_config
        assert isinstance(config, ModelConfig), "refused"
        view = View(run.images, config.image_size, config.image_channels, run.training.seed)
        return ImageBatches(self.dataset, run.data, view, config.image_tokens)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def vocabulary(self) -> str:
        return self.dataset.vocabulary()

    def fingerprints(self) -> dict[str, str]:
        return self.dataset.fingerprints()

    def batch(self, state: State) -> ImageBatch:
        run = self.run
        images_here = run.training.batch_size * run.accumulation
        first = state.rows_consumed + self.mesh.rank(*DATA) * images_here
        return self.batches.at(first, images_here, run.sequences_per_step)

    def batch_of_files(self, files: Sequence[Path]) -> ImageBatch:
        return self.batches.of_files(files)

    def logits(self, model: Model, batch: StepBatch, noise_BT: Tensor | None = None) -> Tensor:
        assert isinstance(batch, ImageBatch), "a batch of this task"
        return image_logits(model, batch.pixels_BCHW, noise_BT)

    def losses(self, logits_BN: Tensor, batch: StepBatch) -> Tensor:
        assert isinstance(batch, ImageBatch), "a batch of this task"
        smoothing = self.run.classification.label_smoothing
        return image_losses(logits_BN, batch, smoothing)

    def write_export(self, state: State) -> dict[str, Path]:
        run = self.run
        if not run.checkpoint.export:
            return {}
        out = run.folder / "hf"
        compared = export_vit(self.last_model(state), self.classes, run.images, out)
        logger.info(f"export: {compared}")
        return {"Hugging Face weights": out}

    def origins(self, first: int, count: int) -> Sequence[object]:
        return self.batches.origins(first, count)

    def validation_batches(self) -> Iterator[tuple[str, Iterator[tuple[StepBatch, Tensor]]]]:
        for part in self.dataset.validation:
            batches = self.batches.validation(
                part, self.run.training.batch_size, self.mesh.rank(*DATA), self.mesh.size(*DATA)
            )
            yield part.name, ((batch, batch.labels_B) for batch in batches)


def refusals_of_export(run: RunSettings, config: ModelConfig) -> Iterator[str]:
    """A model that ViTForImageClassification cannot express, and other types than float32."""
    if run.checkpoint.export_dtype != "float32":
        yield (
            f"checkpoint.export_dtype = {run.checkpoint.export_dtype!r}: models of images are "
            "exported in float32: set it to that"
        )
    try:
        vit_config(config.with_classes(config.num_classes or 1), ())
    except SettingsError as error:
        yield f"checkpoint.export = true: {error}"


def refusals_of_views(images: settings.Images, config: ModelConfig) -> Iterator[str]:
    """Settings of [images] that do not fit the model or each other."""
    for key in ("mean", "std"):
        values = getattr(images, key)
        if len(values) not in (1, config.image_channels):
            yield (
                f"images.{key} has {len(values)} numbers for {config.image_channels} channels: "
                "give one, or one for each"
            )
    if min(images.std, default=0) <= 0:
        yield f"images.std = {list(images.std)}: each must be above 0"
    if 0 < images.resize < config.image_size:
        yield (
            f"images.resize = {images.resize} is smaller than image_size = {config.image_size}: "
            "raise it, or set it to 0"
        )
    if images.crop_padding and images.crop != "random":
        yield (
            f"images.crop_padding = {images.crop_padding} is for images.crop = 'random': set that, "
            "or leave it out"
        )
    if images.crop != "resized" and images.min_crop_area != settings.Images.min_crop_area:
        yield (
            f"images.min_crop_area = {images.min_crop_area} is for images.crop = 'resized': set "
            "that, or leave it out"
        )
