"""Batches of images: images i .. i + B of the run. i is the whole state."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from longfire.config.settings import Data
from longfire.data.batches import order_of
from longfire.data.order import places
from longfire.data.pack import NO_LABEL
from longfire.errors import DataError
from longfire.images.augmentation import View
from longfire.images.batch import ImageBatch
from longfire.images.dataset import ImageDataset, ImageSet
from longfire.images.decoding import decode
from longfire.regular_files import read_regular

if TYPE_CHECKING:
    from PIL.Image import Image


class Place(NamedTuple):
    """Where an image of the run comes from: its number in the set of a source, and the epoch."""

    source: int
    epoch: int
    number: int


class Waiting(NamedTuple):
    """The images that a batch is made of, by their number in the run, while threads make them."""

    labels: dict[int, int]
    views: "dict[int, Future[np.ndarray]]"


class ImageBatches:
    """Random access to the images of a run. A context manager: ends its threads.

    tokens: of the model, for each image. Threads read and decode (data.num_workers), and the next
    data.prefetch_factor batches are made ahead. Raises DataError naming an image that cannot be
    read.
    """

    def __init__(self, dataset: ImageDataset, data: Data, view: View, tokens: int) -> None:
        self.dataset = dataset
        self.view = view
        self.tokens = tokens
        self.order = order_of(data, view.seed)
        self.ahead = data.prefetch_factor
        self.threads = ThreadPoolExecutor(data.num_workers or os.cpu_count() or 1, "images")
        self.prefetched: dict[tuple[int, int], Waiting] = {}

    def __enter__(self) -> "ImageBatches":
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.shutdown(cancel_futures=True)

    def at(self, first: int, count: int, step: int = 0) -> ImageBatch:
        """Images [first, first + count) of the run. step: images from a batch to the next one of
        this process; 0: count."""
        wanted = [(first + ahead * (step or count), count) for ahead in range(self.ahead + 1)]
        for key in self.prefetched.keys() - set(wanted):
            for future in self.prefetched.pop(key).views.values():
                future.cancel()
        for key in wanted:
            if key not in self.prefetched:
                self.prefetched[key] = self.submitted(*key)
        return self.made(first, count, self.prefetched.pop((first, count)))

    def numbers(self, first: int, count: int) -> list[int]:
        """The images of the run that a batch is made of: with mixup or CutMix those of whole pairs,
        which are 2 k and 2 k + 1."""
        stop = first + count
        if self.view.mixes:
            first -= first % 2
            stop += stop % 2
        return list(range(first, stop))

    def submitted(self, first: int, count: int) -> Waiting:
        """Let threads make the images of a batch."""
        waiting = Waiting({}, {})
        numbers = self.numbers(first, count)
        for number, place in zip(numbers, self.places(numbers)):
            label = self.dataset.training[place.source].labels_N[place.number]
            waiting.labels[number] = int(label)
            waiting.views[number] = self.threads.submit(self.view_of, number, place)
        return waiting

    def view_of(self, number: int, place: Place) -> np.ndarray:
        """What training sees of image `number` of the run, float32 (C, H, W)."""
        part = self.dataset.training[place.source]
        return self.view.of_training(self.decoded(part, place.number), number)

    def decoded(self, part: ImageSet, number: int) -> "Image":
        """An image of a set."""
        in_source = int(part.numbers_N[number])
        content = part.source.content(in_source)
        where = part.source.where(in_source)
        view = self.view
        return decode(content, view.channels, view.settings.max_pixels, where, view.shorter_side)

    def places(self, numbers: Sequence[int]) -> list[Place]:
        """Where these images of the run come from."""
        sizes = [len(part) for part in self.dataset.training]
        found = places(self.order, numbers, sizes, self.dataset.shares, self.view.seed)
        return [Place(*place) for place in found]

    def origins(self, first: int, count: int) -> list[str]:
        """The same in words, to name a batch in a message."""
        found: list[str] = []
        for place in self.places(range(first, first + count)):
            part = self.dataset.training[place.source]
            where = part.source.where(int(part.numbers_N[place.number]))
            found.append(f"{where} in epoch {place.epoch}")
        return found

    def made(self, first: int, count: int, waiting: Waiting) -> ImageBatch:
        """The batch, when its images are there."""
        numbers = list(range(first, first + count))
        labels = waiting.labels
        views = {number: future.result() for number, future in waiting.views.items()}
        labels_B = torch.tensor([labels[number] for number in numbers])
        pixels_BCHW = torch.from_numpy(np.stack([views[number] for number in numbers]))
        if not self.view.mixes:
            return ImageBatch(pixels_BCHW, labels_B, self.tokens)
        share_B = torch.tensor([self.view.mixup_share(number) for number in numbers])
        others_BCHW = torch.from_numpy(np.stack([views[number ^ 1] for number in numbers]))
        mixed_BCHW = torch.lerp(others_BCHW, pixels_BCHW, share_B[:, None, None, None])
        for row, number in enumerate(numbers):
            part = self.view.cut_part(number)
            if part is None:
                continue
            rows, columns = part
            theirs_CHW = others_BCHW[row, :, rows, columns]
            mixed_BCHW[row] = pixels_BCHW[row]
            mixed_BCHW[row, :, rows, columns] = theirs_CHW
            share_B[row] = 1 - theirs_CHW[0].numel() / self.view.image_size**2
        partner_labels_B = torch.tensor([labels[number ^ 1] for number in numbers])
        return ImageBatch(mixed_BCHW, labels_B, self.tokens, partner_labels_B, share_B)

    def validation(
        self, part: ImageSet, count: int, process: int = 0, processes: int = 1
    ) -> Iterator[ImageBatch]:
        """The images of a set in their order, `count` at a time for each of the processes. The last
        batches are filled with images without a label, so that all have the same size."""
        view = self.view
        for first_of_all in range(0, len(part), count * processes):
            first = min(first_of_all + process * count, len(part))
            numbers = range(first, min(first + count, len(part)))
            pixels_BCHW = np.zeros((count, view.channels, view.image_size, view.image_size), "f4")
            labels_B = np.full(count, NO_LABEL, np.int64)
            views = self.threads.map(self.validation_view, [part] * len(numbers), numbers)
            for row, pixels_CHW in enumerate(views):
                pixels_BCHW[row] = pixels_CHW
            labels_B[: len(numbers)] = part.labels_N[numbers.start : numbers.stop]
            yield ImageBatch(torch.from_numpy(pixels_BCHW), torch.from_numpy(labels_B), self.tokens)

    def of_files(self, files: Sequence[Path]) -> ImageBatch:
        """These files as validation sees them; they have no labels. Raises DataError."""
        pixels_BCHW = np.stack(list(self.threads.map(self.view_of_file, files)))
        labels_B = torch.full((len(files),), NO_LABEL)
        return ImageBatch(torch.from_numpy(pixels_BCHW), labels_B, self.tokens)

    def view_of_file(self, file: Path) -> np.ndarray:
        """What validation sees of the image in a file, float32 (C, H, W)."""
        try:
            content = read_regular(file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}; name files of images") from error
        view = self.view
        image = decode(
            content, view.channels, view.settings.max_pixels, str(file), view.shorter_side
        )
        return view.of_validation(image)

    def validation_view(self, part: ImageSet, number: int) -> np.ndarray:
        """What validation sees of an image of a set, float32 (C, H, W)."""
        return self.view.of_validation(self.decoded(part, number))
