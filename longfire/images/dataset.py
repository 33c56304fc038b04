"""The sources of a run: the classes of all of them, what is trained on, what is kept apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from longfire.config.settings import Classification, Data, Images
from longfire.data.file_checks import check_inside
from longfire.data.files import short_name
from longfire.data.prepare import distinct
from longfire.data.validation import kept_records
from longfire.errors import DataError, SettingsError
from longfire.images.parquet import ImageParquet
from longfire.images.sources import ImageFolder, ImageSource
from longfire.listing import files_below


@dataclass(frozen=True)
class ImageSet:
    """Some images of a source. numbers_N: theirs in the source, int64. labels_N: theirs among the
    classes of the run."""

    source: ImageSource
    numbers_N: np.ndarray
    labels_N: np.ndarray

    @property
    def name(self) -> str:
        """That of the source."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.numbers_N)


@dataclass(frozen=True)
class ImageDataset:
    """classes: in the order of their numbers. training, validation: images by source; shares: of
    the training images, that of each source."""

    classes: tuple[str, ...]
    training: tuple[ImageSet, ...]
    validation: tuple[ImageSet, ...]
    shares: tuple[float, ...]

    def fingerprints(self) -> dict[str, str]:
        """A digest of the training images of each source, by its name."""
        return {part.name: part.source.fingerprint() for part in self.training}

    def vocabulary(self) -> str:
        """A digest of what the numbers of classes mean."""
        return blake2b("\0".join(self.classes).encode(), digest_size=16).hexdigest()


def read_dataset(data: Data, images: Images, classification: Classification) -> ImageDataset:
    """What the settings name. Raises SettingsError and DataError naming source and fix.

    Images are kept for validation by a hash of their name, as documents are (data/validation.py),
    where data.validation names none.
    """
    sources = sources_of(data.dataset, images, classification)
    classes = all_classes(sources)
    training: list[ImageSet] = []
    validation: list[ImageSet] = []
    fraction = 0.0 if data.validation else data.validation_fraction
    for source in sources:
        is_kept_N = kept_apart(source, fraction)
        training.append(images_of(source, classes, ~is_kept_N))
        if is_kept_N.any():
            validation.append(images_of(source, classes, is_kept_N))
        if not len(training[-1]):
            raise DataError(f"{source.name}: no image is left to train on")
    validation += validation_of(data.validation, classes, images, classification)
    shares = data.data_probs or tuple(float(len(part)) for part in training)
    total = sum(shares)
    return ImageDataset(
        classes, tuple(training), tuple(validation), tuple(share / total for share in shares)
    )


def validation_of(
    entries: Sequence[str],
    classes: tuple[str, ...],
    images: Images,
    classification: Classification,
) -> tuple[ImageSet, ...]:
    """All images of these sources, whose classes are among these. Raises SettingsError and
    DataError."""
    found: list[ImageSet] = []
    for source in sources_of(entries, images, classification):
        found.append(images_of(source, classes, np.ones(len(source.labels_N), bool)))
    return tuple(found)


def sources_of(
    entries: Sequence[str], images: Images, classification: Classification
) -> list[ImageSource]:
    """The sources of data.dataset or data.validation, each under a name of its own."""
    found: list[ImageSource] = []
    names = distinct([short_name(entry) for entry in entries])
    for entry, name in zip(entries, names):
        found.append(source_of(entry, name, images, classification))
    return found


def source_of(entry: str, name: str, images: Images, classification: Classification) -> ImageSource:
    """The images of a folder of classes, of a parquet file, or of a folder of parquet files."""
    path = Path(entry).expanduser()
    if not path.exists():
        raise SettingsError(
            f"data: {entry!r} is not there: name a folder of classes, a parquet file, or a folder "
            "of parquet files"
        )
    files = [path]
    root = path.parent
    if path.is_dir():
        files = files_below(path, "*.parquet")
        root = path
        if not files:
            return ImageFolder(path, name)
    elif path.suffix != ".parquet":
        raise SettingsError(f"data: {entry!r} is no folder and no parquet file")
    for file in files:
        check_inside(file, root)
    return ImageParquet(files, path, name, images.image_field, classification.label_field)


def all_classes(sources: Sequence[ImageSource]) -> tuple[str, ...]:
    """The classes of all sources: those of each where they agree, else all names in their order."""
    classes = sources[0].classes
    if all(source.classes == classes for source in sources):
        return classes
    names: set[str] = set()
    for source in sources:
        names.update(source.classes)
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def kept_apart(source: ImageSource, fraction: float) -> np.ndarray:
    """Which images are kept for validation, bool (N,)."""
    if not fraction:
        return np.zeros(len(source.labels_N), bool)
    identities = [source.identity(number) for number in range(len(source.labels_N))]
    return kept_records(identities, fraction)


def images_of(source: ImageSource, classes: tuple[str, ...], is_chosen_N: np.ndarray) -> ImageSet:
    """The chosen images with their numbers among the classes of the run. Raises DataError for a
    class that there is not."""
    number_of = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in number_of]
    if unknown:
        raise DataError(
            f"{source.name}: the class {unknown[0]!r} is not one of the {len(classes)} that are "
            "trained on (data.dataset): remove it, or add it there"
        )
    of_source = np.array([number_of[name] for name in source.classes], np.int64)
    return ImageSet(source, np.flatnonzero(is_chosen_N), of_source[source.labels_N[is_chosen_N]])
