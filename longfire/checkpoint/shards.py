"""Tensors in files: each process writes the slices that it holds, anyone reads any slices. The
format is safetensors, so nothing in them can run code.

A key of a file is a tensor's name, or name#0, name#1 ... for slices of it; the header of the file
has the whole tensor and the beginning of each slice. A file without that (of another writer) holds
whole tensors.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from longfire.listing import paths_in
from longfire.own_files import json_of
from longfire.parallel.sharding import TensorSlice
from longfire.regular_files import refuse_irregular

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}
BOXES = "longfire.boxes"  # in a header's metadata: key -> [name, whole shape, begin]
ALIGNED = 64  # bytes that data begin at a multiple of, for readers that map the file
SUFFIX = ".safetensors"


class LocalTensor(NamedTuple):
    """The part of a tensor of the run that is on this process."""

    tensor: Tensor  # the local part
    shape: tuple[int, ...]  # of the whole
    slices: list[TensorSlice]


class Box(NamedTuple):
    """What a header says of a key: the whole tensor, and where the part begins in it."""

    name: str
    shape: Sequence[int]
    begin: Sequence[int]


class StoredPart(NamedTuple):
    """A part of a whole tensor: its key in a file, where it begins, and its shape."""

    path: Path
    key: str
    begin: tuple[int, ...]
    size: tuple[int, ...]


@dataclass
class Entry:
    """A whole tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[StoredPart] = field(default_factory=list)


def write_shard(held: dict[str, LocalTensor], path: Path) -> int:
    """Write the slices to a file and return its CRC-32. Raises OSError."""
    parts: list[Tensor] = []
    header: dict[str, object] = {}
    stored: dict[str, object] = {}
    at = 0
    for name, (tensor, shape, slices) in held.items():
        for number, here in enumerate(slices):
            part = here.of_local(tensor)
            is_whole = len(slices) == 1 and tuple(here.size) == tuple(shape)
            key = name if is_whole else f"{name}#{number}"
            header[key] = {
                "dtype": NAMES[part.dtype],
                "shape": list(part.shape),
                "data_offsets": [at, at + part.nbytes],
            }
            stored[key] = [
                name,
                list(shape),
                list(here.begin),
            ]
            parts.append(part)
            at += part.nbytes
    header["__metadata__"] = {"format": "pt", BOXES: json.dumps(stored)}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNED)
    checksum = 0
    with path.open("wb") as file:
        blocks: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for block in chain(blocks, map(raw, parts)):
            checksum = zlib.crc32(block, checksum)
            file.write(block)
    return checksum


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, copied only if they are not contiguous."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def read_index(files: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of some files, and where its parts are; the parts are not compared yet
    (slices.py). Raises OSError, SafetensorError or ValueError for a file that cannot be read."""
    index: dict[str, Entry] = {}
    for path in files:
        refuse_irregular(path)
        with safe_open(path, "pt") as file:
            boxes = (file.metadata() or {}).get(BOXES)  # None: a file of whole tensors
            stored = {} if boxes is None else json_of(boxes, dict[str, Box])
            if boxes is not None and stored.keys() != set(file.keys()):
                raise ValueError(f"{path}: its header names other tensors than it has")
            for key in file.keys():  # noqa: SIM118 (no dict)
                part = file.get_slice(key)
                size = tuple(part.get_shape())
                box = Box(*stored.get(key, (key, size, (0,) * len(size))))
                dtype = TYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{path}: {key} is of type {part.get_dtype()}")
                entry = index.setdefault(box.name, Entry(tuple(box.shape), dtype))
                if entry.shape != tuple(box.shape) or entry.dtype != dtype:
                    raise ValueError(f"{path}: {key} is of another shape or type than its tensor")
                entry.parts.append(StoredPart(path, key, tuple(box.begin), size))
    return index


class Reader:
    """Reads slices of whole tensors; keeps the files open. A context manager."""

    def __init__(self, index: dict[str, Entry]) -> None:
        self.index = index
        self.files: dict[Path, safe_open] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def fill(self, held: LocalTensor, name: str) -> None:
        """Copy from disk into the part of a tensor that is on this process, in its type."""
        for here in held.slices:
            out = here.of_local(held.tensor)
            for part in self.index[name].parts:
                common = intersection(here, part.begin, part.size)
                if common is None:
                    continue
                begin, size = common
                target = TensorSlice(begin, size, difference(begin, here.begin))
                target.of_local(out).copy_(self.read(part, begin, size))

    def read(
        self,
        part: StoredPart,
        begin: tuple[int, ...],
        size: tuple[int, ...],
    ) -> Tensor:
        """Of a stored part, what begins there in the whole tensor and has this size."""
        file = self.opened(part.path)
        if not size:
            return file.get_tensor(part.key)  # a number, of which there are no slices
        inside: list[slice] = []
        for first, length in zip(difference(begin, part.begin), size):
            inside.append(slice(first, first + length))
        return file.get_slice(part.key)[tuple(inside)]

    def whole(self, name: str) -> Tensor:
        """A whole tensor on the host."""
        entry = self.index[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.fill(LocalTensor(tensor, entry.shape, [whole_slice(entry.shape)]), name)
        return tensor

    def opened(self, path: Path) -> safe_open:
        """The file, opened once."""
        if path not in self.files:
            self.files[path] = safe_open(path, "pt")
        return self.files[path]


def difference(
    indices: tuple[int, ...],
    others: tuple[int, ...],
) -> tuple[int, ...]:
    """Of each dimension."""
    return tuple(index - other for index, other in zip(indices, others))


def whole_slice(shape: tuple[int, ...]) -> TensorSlice:
    """A tensor of this shape as one slice."""
    return TensorSlice((0,) * len(shape), tuple(shape), (0,) * len(shape))


def intersection(
    part: TensorSlice,
    begin: tuple[int, ...],
    size: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(begin, size) of the overlap of two slices of a tensor; None where they do not overlap."""
    low = tuple(map(max, part.begin, begin))
    lengths: list[int] = []
    for dim, first in enumerate(low):
        end = min(part.begin[dim] + part.size[dim], begin[dim] + size[dim])
        if end <= first:
            return None
        lengths.append(end - first)
    return low, tuple(lengths)


def shard_files(folder: Path) -> Iterator[Path]:
    """Those of a checkpoint's folder, by name."""
    yield from paths_in(folder, f"*{SUFFIX}")
