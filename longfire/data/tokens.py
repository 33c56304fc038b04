"""The token store: one source's ids and document ends on disk, append-only, memory-mapped, whole after a kill at any moment.

    <name>-<address>/
        manifest.json            what the store holds; committed by one rename; what it does not name does not exist
        train/, heldout/         the two streams, each three columns in shards of a fixed number of items:
            tokens-00000.bin       ids, uint16 or uint32
            ends-00000.bin         int64: where each document ends in the stream, in tokens
            bytes-00000.bin        int64: the same in bytes of UTF-8 text (for bits per byte)

A shard is full before the next begins, so item i lies in shard i // shard_items and finding it needs no index. A writer that
finds a store cut off by a kill drops what the manifest does not name and goes on from its position: the finished store is
the same, byte for byte, as one that was never interrupted.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from longfire.errors import DataError

FORMAT = 1
SHARD_TOKENS = 2**28  # 512 MiB of uint16
SHARD_DOCUMENTS = 2**22  # 32 MiB of int64
STREAMS = ("train", "heldout")


def checksum(*parts: bytes) -> str:
    """blake2b, 128 bits: what addresses, fingerprints and shards are checked by."""
    return blake2b(b"".join(parts), digest_size=16).hexdigest()


def columns(dtype: str, shard_tokens: int, shard_documents: int) -> dict[str, tuple[str, int]]:
    """name -> (dtype, items of a shard) of a stream's columns."""
    return {"tokens": (dtype, shard_tokens), "ends": ("int64", shard_documents), "bytes": ("int64", shard_documents)}


class Column:
    """One column of a stream for reading: an array in shards, mapped when first touched. `length` grows with the store."""

    def __init__(self, path: Path, dtype: str, shard_items: int) -> None:
        self.path, self.dtype, self.shard_items, self.length = path, np.dtype(dtype), shard_items, 0
        self._maps: dict[int, np.ndarray] = {}

    def _shard(self, number: int, items: int) -> np.ndarray:
        """At least `items` items of a shard; mapped again where it has grown since."""
        mapped = self._maps.get(number)
        if mapped is None or len(mapped) < items:
            mapped = self._maps[number] = np.memmap(shard_file(self.path, number), self.dtype, mode="r")
        return mapped

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop): a view of the file, or a copy where it crosses shards."""
        assert 0 <= start <= stop <= self.length, f"{self.path}: [{start}, {stop}) of {self.length}"
        parts = []
        while start < stop or not parts:
            number, low = divmod(start, self.shard_items)
            high = min(stop - start + low, self.shard_items)
            parts.append(self._shard(number, high)[low:high] if high > low else np.empty(0, self.dtype))
            start += max(high - low, 0)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __getitem__(self, items: slice) -> np.ndarray:
        return self.read(*items.indices(self.length)[:2])

    def searchsorted(self, values: np.ndarray, side: str = "left") -> np.ndarray:
        """numpy's searchsorted on an ascending column: first among the shards' last items, then inside one shard."""
        shards = -(-self.length // self.shard_items)
        lasts = np.array([self.read(i, i + 1)[0] for i in self._last_items(shards)], self.dtype)
        found = np.full(len(values), self.length, np.int64)
        for place, (value, number) in enumerate(zip(values, lasts.searchsorted(values, side))):
            if number < shards:
                start = int(number) * self.shard_items
                inside = self.read(start, min(start + self.shard_items, self.length))
                found[place] = start + inside.searchsorted(value, side)
        return found

    def _last_items(self, shards: int) -> Iterator[int]:
        return (min((i + 1) * self.shard_items, self.length) - 1 for i in range(shards))


def shard_file(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}-{number:05d}.bin")


class TokenStream:
    """The train or heldout half of a store: `tokens`, `ends`, `bytes` are columns; sizes follow `TokenStore.refresh`."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, shard_documents: int) -> None:
        columns_ = {
            name: Column(folder / name, *spec) for name, spec in columns(dtype, shard_tokens, shard_documents).items()
        }
        self.ids, self.ends, self.bytes = columns_["tokens"], columns_["ends"], columns_["bytes"]

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
        """Ids (rows, length) that begin at tokens number `first`."""
        tokens_BS = np.empty((len(first), length), self.ids.dtype)
        for row, start in enumerate(first.tolist()):
            tokens_BS[row] = self.ids.read(start, start + length)
        return tokens_BS


class TokenStore:
    """A store opened for reading, finished or growing (`refresh`).

    Raises DataError when it is not a store, when a shard is shorter than the manifest says, or when it was made with
    another tokenizer than `tokenizer_fingerprint`.
    """

    def __init__(self, folder: Path, tokenizer_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        made_with = self.manifest["tokenizer"]["fingerprint"]
        if tokenizer_fingerprint not in (None, made_with):
            raise DataError(
                f"{self.folder}: this token store was made with another tokenizer ({made_with}, not "
                f"{tokenizer_fingerprint}); name the tokenizer it was made with, or prepare the data again"
            )
        shapes = (self.manifest["dtype"], self.manifest["shard_tokens"], self.manifest["shard_documents"])
        self.train, self.heldout = (TokenStream(self.folder / name, *shapes) for name in STREAMS)
        self._take(self.manifest)
        self._check_sizes()

    @property
    def name(self) -> str:
        return self.manifest["source"]["name"]

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
            stream.ids.length, stream.ends.length = sizes["tokens"], sizes["documents"]
            stream.bytes.length = sizes["documents"]
        self.manifest = manifest

    def _check_sizes(self) -> None:
        for file, shard in self._shards():
            size = file.stat().st_size if file.exists() else -1
            if size < shard["size"]:
                raise DataError(
                    f"{file}: {'missing' if size < 0 else f'{size} bytes'}, but the manifest names {shard['size']} "
                    f"bytes; delete the folder {self.folder} and it will be prepared again"
                )

    def verify(self) -> None:
        """Read every finished shard and compare its checksum. Raises DataError naming the file."""
        for file, shard in self._shards():
            if shard["blake2b"] and checksum(file.read_bytes()) != shard["blake2b"]:
                raise DataError(
                    f"{file}: its checksum is not the manifest's; delete the folder {self.folder} and it will be "
                    f"prepared again"
                )

    def _shards(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for name in STREAMS:
            for shard in self.manifest["streams"][name]["shards"]:
                yield self.folder / name / shard["file"], shard


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises DataError when there is none or it is of another format."""
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"{folder}: not a token store (no manifest.json); make one with `longfire prepare`") from None
    except ValueError as e:
        raise DataError(f"{file}: not valid JSON ({e}); delete the folder and it will be prepared again") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{file}: format {manifest.get('format')}, this version reads {FORMAT}; prepare the data again")
    return manifest


@contextmanager
def locked(folder: Path, note=None) -> Iterator[None]:
    """Hold a store against other writers; waits while another process holds it.

    The lock belongs to the open file (flock): the kernel takes it from a dead process, so none is ever stale.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if note:
                note(f"data: {folder.name} is being prepared by {file.read() or 'another process'}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)


class ColumnWriter:
    """One column of a stream for appending. Starts from `length` committed items; drops what lies behind them."""

    def __init__(self, path: Path, dtype: str, shard_items: int, length: int, checksums: list[str]) -> None:
        self.path, self.dtype, self.shard_items, self.length = path, np.dtype(dtype), shard_items, length
        self.checksums = checksums[: length // shard_items]  # of full shards
        self._file, self._hash, self._unsynced = None, blake2b(digest_size=16), []
        for file in path.parent.glob(f"{path.name}-*.bin"):
            if int(file.stem.rsplit("-", 1)[1]) > length // shard_items:
                file.unlink()
        self._open()

    def _open(self) -> None:
        number, items = divmod(self.length, self.shard_items)
        file = shard_file(self.path, number)
        file.touch()
        os.truncate(file, items * self.dtype.itemsize)
        self._hash = blake2b(file.read_bytes(), digest_size=16)
        self._file = open(file, "ab")  # noqa: SIM115 (it stays open until the shard is full)

    def append(self, items: np.ndarray) -> None:
        items = np.ascontiguousarray(items, self.dtype)
        while len(items):
            room = self.shard_items - self.length % self.shard_items
            part, items = items[:room], items[room:]
            self._file.write(part)
            self._hash.update(part)
            self.length += len(part)
            if self.length % self.shard_items == 0:
                self.sync()
                self._file.close()
                self.checksums.append(self._hash.hexdigest())
                self._open()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def shards(self, complete: bool) -> list[dict[str, Any]]:
        """What the manifest says of each shard that holds something; an open one has a checksum only in the end."""
        full, rest = divmod(self.length, self.shard_items)
        sizes = [self.shard_items] * full + [rest] * (rest > 0)
        sums = [*self.checksums, self._hash.hexdigest() if complete else ""]
        return [
            {"file": shard_file(self.path, i).name, "size": n * self.dtype.itemsize, "blake2b": sums[i]}
            for i, n in enumerate(sizes)
        ]


class StoreWriter:
    """Appends documents to a store and commits them; made under `locked`.

    header: source, tokenizer, options, dtype: what the address was made of. A store that exists is continued: `progress` is
    what the last commit was given.
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
        self.progress: dict[str, Any] = manifest.get("progress", {})
        self.complete: bool = manifest.get("complete", False)
        self._columns = {name: self._continue(name, manifest) for name in STREAMS} if not self.complete else {}
        if not manifest:
            self.commit({})

    def _continue(self, name: str, manifest: dict[str, Any]) -> dict[str, ColumnWriter]:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        sizes = manifest.get("streams", {}).get(name, {"tokens": 0, "documents": 0, "shards": []})
        shape = columns(self.header["dtype"], self.header["shard_tokens"], self.header["shard_documents"])
        writers = {}
        for column, (dtype, items) in shape.items():
            sums = [s["blake2b"] for s in sizes["shards"] if s["file"].startswith(f"{column}-")]
            length = sizes["tokens" if column == "tokens" else "documents"]
            writers[column] = ColumnWriter(self.folder / name / column, dtype, items, length, sums)
        self._bytes = {**getattr(self, "_bytes", {}), name: sizes.get("bytes", 0)}
        return writers

    def append(self, stream: str, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """Documents: their ids end to end, their lengths in tokens, the bytes of their texts."""
        into = self._columns[stream]
        into["ends"].append(into["tokens"].length + np.cumsum(lengths))
        into["bytes"].append(self._bytes[stream] + np.cumsum(text_bytes))
        into["tokens"].append(ids)
        self._bytes[stream] += int(np.sum(text_bytes))

    def tokens(self, stream: str = "train") -> int:
        return self._columns[stream]["tokens"].length

    def commit(self, progress: dict[str, Any], complete: bool = False) -> None:
        """All that was appended becomes the store, at once: data on disk first, then one rename."""
        streams = {}
        for name, into in self._columns.items():
            for column in into.values():
                column.sync()
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


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that it is the old or the new one after a kill at any moment, never a part."""
    aside = file.with_name(file.name + ".new")
    with open(aside, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.rename(aside, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
