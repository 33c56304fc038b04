"""The tensors in a folder of weights. Nothing that is read can run code: safetensors, and of
PyTorch's own files their tensors only."""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longfire.errors import CheckpointError, first_line
from longfire.listing import exists, is_file, paths_in
from longfire.own_files import read_json
from longfire.regular_files import refuse_irregular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Suffix -> the single file, and the index of several files.
KINDS = {
    ".safetensors": (SINGLE, INDEX),
    ".bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
OTHER_KINDS = ("*.pt", "*.pth", "*.gguf", "*.h5")
NAMES_SHOWN = 4  # names that a message lists


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of an open file; `read` reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class WeightFiles:
    """The tensors in a folder's files, by their names there. Opening reads no tensor; `read` reads
    one. Raises CheckpointError naming the file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._file = Path()  # the one file that is open
        self._content: Mapping[str, LazyTensor] = {}
        for file in weight_files(folder):
            for name, tensor in self._opened(file).items():
                self.tensors[name] = StoredTensor(file, tensor.shape, tensor.dtype)

    def read(self, name: str) -> Tensor:
        """The tensor of a name."""
        return self._opened(self.tensors[name].file)[name].read()

    def _opened(self, file: Path) -> Mapping[str, LazyTensor]:
        if file == self._file:
            return self._content
        self._file = Path()  # closed before the next one is opened
        self._content = {}
        try:
            if file.suffix == ".safetensors":
                self._content = from_safetensors(file)
            else:
                self._content = from_bin(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}); copy or download it again"
            ) from error
        self._file = file
        return self._content


def from_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file."""
    refuse_irregular(file)
    opened = safe_open(file, "pt")
    tensors = {}
    for name in opened.keys():  # noqa: SIM118 (it is no dict)
        slices = opened.get_slice(name)
        shape = tuple(slices.get_shape())
        # An empty slice is the only public way to the type.
        empty = slices[:0] if shape else opened.get_tensor(name)
        tensors[name] = LazyTensor(shape, empty.dtype, partial(opened.get_tensor, name))
    return tensors


def from_bin(file: Path) -> dict[str, LazyTensor]:
    """The tensors of PyTorch's own format: a pickle of which only tensors and plain containers are
    made, whatever else it asks for. Raises CheckpointError."""
    refuse_irregular(file)
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file}: cut off, or of PyTorch before 1.6: its tensors cannot be mapped; copy it "
            "again, or save it anew as safetensors"
        )
    try:
        content = torch.load(
            file,
            map_location="cpu",
            mmap=True,
            weights_only=True,
        )
    except Exception as error:  # what torch raises has no common class but this one
        raise CheckpointError(
            f"{file}: cannot be read as tensors alone ({first_line(error, None)}); it would have "
            "to run code, or is "
            "damaged"
        ) from error
    is_dict = isinstance(content, dict)
    if not is_dict or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{file}: holds other things than tensors by name; save the state dict alone, as "
            "safetensors"
        )
    tensors = {}
    for name, tensor in content.items():
        tensors[name] = LazyTensor(tuple(tensor.shape), tensor.dtype, partial(same, tensor))
    return tensors


def same(tensor: Tensor) -> Tensor:
    """A mapped tensor is read where it is used."""
    return tensor


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: those of an index, or the single one; safetensors
    before all others. Raises CheckpointError."""
    for suffix, (single, index) in KINDS.items():
        if exists(folder / index):
            return indexed(folder, index, suffix)
        if exists(folder / single):
            return [folder / single]
    names = [*KINDS[".safetensors"], *KINDS[".bin"]]
    others: list[str] = []
    for pattern in OTHER_KINDS:
        others += [path.name for path in paths_in(folder, pattern)]
    refused = ""
    if others:
        shown = ", ".join(sorted(others)[:NAMES_SHOWN])
        refused = f" ({shown} could run code when read, or is of another kind)"
    raise CheckpointError(
        f"{folder}: none of {', '.join(names)} is there{refused}; save the model as safetensors: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
    )


class WeightIndex(TypedDict):
    """The file of each tensor."""

    weight_map: dict[str, str]


def indexed(folder: Path, index: str, suffix: str) -> list[Path]:
    """The files that an index names, all of which are beside it. Raises CheckpointError."""
    fix = "it is not an index of weight files: copy or download it again"
    content = read_json(folder / index, WeightIndex, CheckpointError, fix)
    names = sorted(set(content["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(
                f"{folder / index}: {name!r} is not the name of a {suffix} file in the same folder"
            )
        if not is_file(folder / name):
            raise CheckpointError(
                f"{folder / name}: the index names it, but it is not there; copy or download it "
                "again"
            )
    return [folder / name for name in names]
