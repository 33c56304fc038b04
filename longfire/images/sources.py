"""What a source of images gives, and the images of folders: a folder for each class."""

from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from longfire.data.file_checks import check_inside, check_links
from longfire.errors import DataError
from longfire.listing import paths_in, walk
from longfire.regular_files import read_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class ImageSource(Protocol):
    """Encoded images, each of one class; number i is the same image in every process."""

    name: str
    classes: tuple[str, ...]
    labels_N: np.ndarray  # int64, the number of each image's class in `classes`

    def content(self, number: int) -> bytes:
        """The encoded image. Raises DataError."""
        ...

    def where(self, number: int) -> str:
        """The place of the image, for messages."""
        ...

    def identity(self, number: int) -> str:
        """What the image is called in its source, wherever the source lies."""
        ...

    def fingerprint(self) -> str:
        """A digest of which images there are, in which order, of which classes."""
        ...


class ImageFolder:
    """The images below `root/<class>/`, in the order of their paths; classes in that of their
    names.

    No link may lead out of the folder. Hidden files, and files that are no images by their
    suffixes, are left out. Raises DataError.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        folders = class_folders(root)
        self.classes = tuple(folder.name for folder in folders)
        self.files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            files = images_below(folder, root)
            if not files:
                raise DataError(
                    f"{folder}: no image in the folder of this class ({', '.join(SUFFIXES)}); add "
                    "some, or remove the folder"
                )
            self.files += files
            labels += [label] * len(files)
        self.labels_N = np.array(labels, np.int64)

    def content(self, number: int) -> bytes:
        path = check_inside(self.files[number], self.root)
        try:
            return read_regular(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error

    def where(self, number: int) -> str:
        return str(self.files[number])

    def identity(self, number: int) -> str:
        return self.files[number].relative_to(self.root).as_posix()

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for number in range(len(self.files)):
            digest.update(self.identity(number).encode() + b"\0")
        return digest.hexdigest()


def class_folders(root: Path) -> list[Path]:
    """The folders of the classes. Raises DataError for a folder of splits, or of loose images."""
    folders = [path for path in paths_in(root) if path.is_dir() and path.name[0] != "."]
    for folder in folders:
        check_inside(folder, root)
    names = {folder.name for folder in folders}
    if not names:
        raise DataError(
            f"{root}: no folder of a class: images are read from {root}/<class>/<image>"
        )
    if names <= SPLITS:
        raise DataError(
            f"{root} has folders of splits, {', '.join(sorted(names))}, not of classes: name one "
            "in data.dataset, and one in data.validation"
        )
    return folders


def images_below(folder: Path, root: Path) -> list[Path]:
    """The image files below a folder, by path. Folders behind links are not entered."""
    found: list[Path] = []
    for parent, folders, names in walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                found.append(Path(parent, name))
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    links = [path for path in found if path.is_symlink()]
    check_links(links)
    for path in links:
        check_inside(path, root)
    return found
