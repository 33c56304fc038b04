"""The token store: one source's ids and document ends on disk, append-only, memory-mapped, whole after a kill at any time.

    <name>-<address>/
        manifest.json            what the store holds; committed by one rename; what it does not name does not exist
        train/, heldout/         the two streams, each of three columns in shards of a fixed number of items:
            tokens-00000.bin       ids, uint16 or uint32
            ends-00000.bin         int64: where each document ends in the stream, in tokens
            bytes-00000.bin        int64: the same in bytes of its UTF-8 text (for bits per byte)

A shard is full before the next begins, so item i lies in shard i // shard_items and needs no index to be found. A writer
that finds a store cut off by a kill drops what the manifest does not name and goes on from its position: the finished store
is the same, byte for byte, as one that was never interrupted.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from longfire.disk import held, sync, write_whole
from longfire.errors import DataError

FORMAT = 1
SHARD_TOKENS = 2**28  # 512 MiB of uint16
SHARD_DOCUMENTS = 2**22  # 32 MiB of int64
STREAMS = ("train", "heldout")


def checksum(*parts: bytes) -> str:
    """blake2b of 128 bits: addresses, fingerprints and checks of shards."""
    return blake2b(b"".join(parts), digest_size=16).hexdigest()


def columns(dtype: str, shard_tokens: int, shard_documents: int) -> dict[str, tuple[str, int]]:
    """name -> (dtype, items of a shard) of a stream's columns."""
    return {
        "tokens": (dtype, shard_tokens),
        "ends": ("int64", shard_documents),
        "bytes": ("int64", shard_documents),
    }


def shard_file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}-{number:05d}.bin")


class Column:
    """A column for reading: an array in shards, each mapped when it is first touched; `length` grows with the store."""

    def __init__(self, path: Path, dtype: str, shard_items: int) -> None:
        self.path, self.dtype, self.shard_items, self.length = path, np.dtype(dtype), shard_items, 0
        self._maps: dict[int, np.ndarray] = {}
        self._lasts = np.empty(0, self.dtype)  # last items of full shards

    def _shard(self, number: int) -> np.ndarray:
        """The items of a shard that exist so far; mapped again when it has grown."""
        items = min(self.length - number * self.shard_items, self.shard_items)
        mapped = self._maps.get(number)
        if mapped is None or len(mapped) < items:
            mapped = map_file(shard_file(self.path, number), self.dtype) if items else np.empty(0, self.dtype)
            self._maps[number] = mapped
        return mapped[:items]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop): a view of the file, or a copy where it crosses shards."""
        assert 0 <= start <= stop <= self.length, f"{self.path}: [{start}, {stop}) of {self.length}"
        number, low = divmod(start, self.shard_items)
        high = low + stop - start
        if high <= self.shard_items:
            return self._shard(number)[low:high]
        middle = (number + 1) * self.shard_items
        return np.concatenate([self.read(start, middle), self.read(middle, stop)])

    def __getitem__(self, items: slice) -> np.ndarray:
        return self.read(*items.indices(self.length)[:2])

    def searchsorted(self, values: np.ndarray, side: str = "left") -> np.ndarray:
        """numpy's searchsorted on an ascending column: among the last items of full shards, then inside one shard."""
        full = self.length // self.shard_items
        if full > len(self._lasts):
            new = [self._shard(i)[-1] for i in range(len(self._lasts), full)]
            self._lasts = np.concatenate([self._lasts, np.array(new, self.dtype)])
        numbers = self._lasts.searchsorted(values, side)
        found = np.empty(len(values), np.int64)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            found[mine] = number * self.shard_items + self._shard(number).searchsorted(values[mine], side)
        return found


def map_file(file: Path, dtype: np.dtype) -> np.ndarray:
    """The whole items of a file, read-only. Rows are read in a shuffled order, so the system is told not to read 128 KiB around
    each: a first batch from anywhere in 10^12 tokens takes 13 ms where it took 70 to 500 (16 rows of 2048 tokens)."""
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype, len(mapped) // dtype.itemsize)


class TokenStream:
    """The train or heldout part of a store; its sizes follow `TokenStore.refresh`.

    ids, ends, bytes are its columns: `ends.searchsorted(place)` is the document of a place, `ends[a:b]` ends of documents.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, shard_documents: int) -> None:
        shapes = columns(dtype, shard_tokens, shard_documents)
        self.ids, self.ends, self.bytes = (Column(folder / name, *shape) for name, shape in shapes.items())

    @property
    def length(self) -> int:
        """Tokens."""
        return self.ids.length

    @property
    def documents(self) -> int:
        return self.ends.length

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the stream."""
        return self.ids.read(start, stop)

    def rows(self, first: np.ndarray, length: int) -> np.ndarray:
        """Ids (rows, length): `length` tokens from each place in `first`."""
        tokens_BS = np.empty((len(first), length), self.ids.dtype)
        for row, start in enumerate(first.tolist()):
            tokens_BS[row] = self.ids.read(start, start + length)
        return tokens_BS


class TokenStore:
    """A store for reading, finished or growing (`refresh`).

    Raises DataError when the folder is no store, when a shard is shorter than the manifest says, or when the store was made
    with another tokenizer than `tokenizer_fingerprint`.
    """

    def __init__(self, folder: Path, tokenizer_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        made_with = self.manifest["tokenizer"]["fingerprint"]
        if tokenizer_fingerprint not in (None, made_with):
            raise DataError(
                f"{self.folder}: this token store was made with another tokenizer (fingerprint {made_with}, not "
                f"{tokenizer_fingerprint}); name the one it was made with, or prepare the data again"
            )
        shapes = (self.manifest["dtype"], self.manifest["shard_tokens"], self.manifest["shard_documents"])
        self.train, self.heldout = (TokenStream(self.folder / name, *shapes) for name in STREAMS)
        self._take(self.manifest)
        for file, shard in self._shards():
            check_size(file, shard["size"])

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    def refresh(self) -> None:
        """Read the manifest again: the store may have grown."""
        if not self.complete:
            self._take(read_manifest(self.folder))

    def _take(self, manifest: dict[str, Any]) -> None:
        for name in STREAMS:
            stream, sizes = getattr(self, name), manifest["streams"][name]
            stream.ids.length = sizes["tokens"]
            stream.ends.length = stream.bytes.length = sizes["documents"]
        self.manifest = manifest

    def verify(self) -> None:
        """Read all finished shards and compare their checksums. Raises DataError naming the file."""
        for file, shard in self._shards():
            if shard["blake2b"] and checksum(file.read_bytes()) != shard["blake2b"]:
                raise DataError(f"{file}: its checksum is not the manifest's; {remake(file)}")

    def _shards(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for name in STREAMS:
            folder = self.folder / name
            for shard in self.manifest["streams"][name]["shards"]:
                yield folder / shard["file"], shard


def check_size(file: Path, size: int) -> None:
    """Raises DataError for a shard that is missing or shorter than the manifest says."""
    try:
        there = file.stat().st_size
    except FileNotFoundError:
        there = -1
    if there < size:
        what = "missing" if there < 0 else f"{there} bytes long"
        raise DataError(f"{file}: {what}, and the manifest names {size} bytes; {remake(file)}")


def remake(shard: Path) -> str:
    return f"delete {shard.parent.parent} and the data will be prepared again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises DataError when there is none, or one of another format."""
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder}: not a token store (no manifest.json); make one with `longfire prepare`") from None
    except ValueError as e:
        raise DataError(
            f"{file}: not valid JSON ({e}); delete the folder and the data will be prepared again"
        ) from None
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{file}: format {manifest.get('format')}, and this version reads {FORMAT}; prepare the data again"
        )
    return manifest


@contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a store against other writers; waits, and says so, while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(
        folder / "lock", lambda holder: note(f"data: {folder.name} is being prepared by {holder}; waiting for it")
    ):
        yield


class ColumnWriter:
    """A column for appending. Goes on after `length` committed items and drops what lies behind them."""

    def __init__(self, path: Path, dtype: str, shard_items: int, length: int, checksums: list[str]) -> None:
        self.path, self.dtype, self.shard_items, self.length = path, np.dtype(dtype), shard_items, length
        full, rest = divmod(length, shard_items)
        self.checksums = checksums[:full]
        for file in path.parent.glob(f"{path.name}-*.bin"):
            if int(file.stem.rsplit("-", 1)[1]) > full:
                file.unlink()
        for number in range(full + (rest > 0)):
            check_size(shard_file(path, number), (shard_items if number < full else rest) * self.dtype.itemsize)
        self._open()

    def _open(self) -> None:
        """The shard that is being filled, with nothing in it but committed items."""
        number, items = divmod(self.length, self.shard_items)
        file = shard_file(self.path, number)
        file.touch()
        os.truncate(file, items * self.dtype.itemsize)
        self._hash = blake2b(file.read_bytes(), digest_size=16)
        self._file = open(file, "ab")  # noqa: SIM115 (open until the shard is full)
        self._synced = self.length

    def append(self, items: np.ndarray) -> None:
        items = np.ascontiguousarray(items, self.dtype)
        while len(items):
            room = self.shard_items - self.length % self.shard_items
            part, items = items[:room], items[room:]
            self._file.write(part)
            self._hash.update(part)
            self.length += len(part)
            if len(part) == room:
                self.sync()
                self._file.close()
                self.checksums.append(self._hash.hexdigest())
                self._open()

    def sync(self) -> None:
        if self._synced != self.length:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = self.length

    def close(self) -> None:
        self._file.close()

    def shards(self, complete: bool) -> list[dict[str, Any]]:
        """What the manifest says of the shards that hold something; the last one's checksum only when all is done."""
        full, rest = divmod(self.length, self.shard_items)
        sizes = [self.shard_items] * full + [rest] * (rest > 0)
        sums = [*self.checksums, self._hash.hexdigest() if complete else ""]
        return [
            {"file": shard_file(self.path, number).name, "size": items * self.dtype.itemsize, "blake2b": sums[number]}
            for number, items in enumerate(sizes)
        ]


class StoreWriter:
    """Appends documents to a store and commits them; made while the store is `locked`.

    header: what the store is made from (source, tokenizer, options, dtype). A store that exists is continued; `progress` is
    what its last commit was given.
    """

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        shard_tokens: int = SHARD_TOKENS,
        shard_documents: int = SHARD_DOCUMENTS,
    ) -> None:
        self.folder = folder
        self.header = {"format": FORMAT, **header, "shard_tokens": shard_tokens, "shard_documents": shard_documents}
        manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
        self.header |= {key: manifest[key] for key in self.header if key in manifest}
        self.progress: dict[str, Any] = manifest.get("progress", {})
        self.complete: bool = manifest.get("complete", False)
        sizes = manifest.get("streams") or {
            name: {"tokens": 0, "documents": 0, "bytes": 0, "shards": []} for name in STREAMS
        }
        self._sizes = sizes
        self._bytes = {name: sizes[name]["bytes"] for name in STREAMS}
        self._columns = {} if self.complete else {name: self._continue(name, sizes[name]) for name in STREAMS}
        if not manifest:
            self.commit({})

    def _continue(self, name: str, sizes: dict[str, Any]) -> dict[str, ColumnWriter]:
        (self.folder / name).mkdir(exist_ok=True)
        shapes = columns(self.header["dtype"], self.header["shard_tokens"], self.header["shard_documents"])
        writers = {}
        for column, shape in shapes.items():
            sums = [shard["blake2b"] for shard in sizes["shards"] if shard["file"].startswith(f"{column}-")]
            length = sizes["tokens" if column == "tokens" else "documents"]
            writers[column] = ColumnWriter(self.folder / name / column, *shape, length, sums)
        return writers

    def append(self, stream: str, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """Documents: their ids end to end, the length of each in tokens, and in bytes of its text."""
        into = self._columns[stream]
        into["ends"].append(into["tokens"].length + np.cumsum(lengths))
        into["bytes"].append(self._bytes[stream] + np.cumsum(text_bytes))
        into["tokens"].append(ids)
        self._bytes[stream] += int(np.sum(text_bytes))

    def tokens(self, stream: str) -> int:
        return self._columns[stream]["tokens"].length if self._columns else self._sizes[stream]["tokens"]

    def documents(self, stream: str) -> int:
        return self._columns[stream]["ends"].length if self._columns else self._sizes[stream]["documents"]

    def commit(self, progress: dict[str, Any], complete: bool = False) -> None:
        """What was appended becomes the store, at once: first the data reach the disk, then one rename names them."""
        streams = {}
        for name, into in self._columns.items():
            for column in into.values():
                column.sync()
            sync(self.folder / name)
            streams[name] = {
                "tokens": into["tokens"].length,
                "documents": into["ends"].length,
                "bytes": self._bytes[name],
                "shards": [shard for column in into.values() for shard in column.shards(complete)],
            }
        self.progress, self.complete = progress, complete
        manifest = {**self.header, "streams": streams, "progress": progress, "complete": complete}
        write_whole(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())

    def close(self) -> None:
        for into in self._columns.values():
            for column in into.values():
                column.close()
