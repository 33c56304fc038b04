"""The token store: one source's ids and document ends on disk, append-only, memory-mapped, whole
after a kill at any time.

    <name>-<address>/
        manifest.json            what the store holds; committed by one rename; what it does not name does not exist;
                                 its last line is the CRC-32 of all before it
        train/, heldout/         the two streams, each of three columns in shards of a fixed number of items:
            tokens-00000.bin       ids, uint16 or uint32
            ends-00000.bin         int64: where each document ends in the stream, in tokens
            bytes-00000.bin        int64: the same in bytes of its UTF-8 text (for bits per byte)
            tokens-00000.crc32     checksums of its blocks, compared when a block is first read (blocks.py)

A shard is full before the next begins, so item i lies in shard i // shard_items and needs no index
to be found. A writer that finds a store cut off by a kill drops what the manifest does not name and
resumes from its position: the finished store is the same, byte for byte, as one that was never
interrupted.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from longfire.data.blocks import BlockFile, BlockWriter, Sums, remake, written_sums
from longfire.disk import held, sync, write_whole
from longfire.errors import DataError

FORMAT = 2  # of the folder. Format 1 had no checksums of blocks, and is read as it is
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**28  # 512 MiB of uint16
SHARD_DOCUMENTS = 2**22  # 32 MiB of int64
STREAMS = ("train", "heldout")
COLUMN_ATTRIBUTES = {
    "tokens": "ids",
    "ends": "ends",
    "bytes": "bytes",
}  # file name -> attribute of TokenStream


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
    """A column for reading: an array in shards, each mapped when it is first touched; `length`
    grows with the store.

    sums: the checksums of each shard; empty in a store without.
    """

    def __init__(self, path: Path, dtype: str, shard_items: int) -> None:
        self.path, self.dtype, self.shard_items, self.length = path, np.dtype(dtype), shard_items, 0
        self.sums: list[Sums] = []
        self._files: dict[int, BlockFile] = {}
        self._lasts = np.empty(0, self.dtype)  # last items of full shards

    def _shard(self, number: int) -> BlockFile:
        """The items of a shard that exist so far; mapped again when it has grown."""
        size = min(self.length - number * self.shard_items, self.shard_items) * self.dtype.itemsize
        opened = self._files.get(number)
        if opened is None or opened.size < size:
            sums = self.sums[number] if self.sums and size else None
            if opened is None:
                opened = BlockFile(shard_file(self.path, number), self.dtype, size, sums)
            else:
                opened = opened.continued(size, sums)
            self._files[number] = opened
        return opened

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop): a view of the file, or a copy where it crosses shards."""
        assert 0 <= start <= stop <= self.length, f"{self.path}: [{start}, {stop}) of {self.length}"
        number, low = divmod(start, self.shard_items)
        high = low + stop - start
        if high <= self.shard_items:
            return self._shard(number).read(low, high)
        middle = (number + 1) * self.shard_items
        return np.concatenate([self.read(start, middle), self.read(middle, stop)])

    def __getitem__(self, items: slice) -> np.ndarray:
        return self.read(*items.indices(self.length)[:2])

    def searchsorted(self, values: np.ndarray, side: str = "left") -> np.ndarray:
        """numpy's searchsorted on an ascending column: among the last items of full shards, then
        inside one shard."""
        full = self.length // self.shard_items
        if full > len(self._lasts):
            last = self.shard_items - 1
            new = [self._shard(i).read(last, last + 1)[0] for i in range(len(self._lasts), full)]
            self._lasts = np.concatenate([self._lasts, np.array(new, self.dtype)])
        numbers = self._lasts.searchsorted(values, side)
        found = np.empty(len(values), np.int64)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            found[mine] = number * self.shard_items + self._shard(number).searchsorted(
                values[mine], side
            )
        return found

    def verify(self) -> int:
        """Check all blocks that have not been; the bytes that were looked at."""
        size = 0
        for number in range(-(-self.length // self.shard_items)):
            shard = self._shard(number)
            shard.check()
            size += shard.size
        return size


class TokenStream:
    """The train or heldout part of a store; its sizes follow `TokenStore.refresh`.

    ids, ends, bytes are its columns: `ends.searchsorted(place)` is the document of a place,
    `ends[a:b]` ends of documents.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, shard_documents: int) -> None:
        shapes = columns(dtype, shard_tokens, shard_documents)
        self.ids, self.ends, self.bytes = (
            Column(folder / name, *shape) for name, shape in shapes.items()
        )

    @property
    def length(self) -> int:
        """Tokens."""
        return self.ids.length

    @property
    def documents(self) -> int:
        return self.ends.length

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.ids, self.ends, self.bytes

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

    Raises DataError when the folder is no store, when a shard is shorter than the manifest says,
    when a block that is read is damaged, or when the store was made with another tokenizer than
    `tokenizer_fingerprint`.
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
        shapes = (
            self.manifest["dtype"],
            self.manifest["shard_tokens"],
            self.manifest["shard_documents"],
        )
        self.train, self.heldout = (TokenStream(self.folder / name, *shapes) for name in STREAMS)
        self._take(self.manifest)
        for file, shard in self._shards():
            check_size(file, shard["size"])

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    @property
    def has_checksums(self) -> bool:
        """Whether blocks are checked when they are read: not in stores of format 1."""
        return self.manifest["format"] > 1

    def refresh(self) -> None:
        """Read the manifest again: the store may have grown. One that was dropped by its writer
        stays as it was, until the writer says why (prepare.Behind)."""
        if not self.complete and (self.folder / MANIFEST).exists():
            self._take(read_manifest(self.folder))

    def _take(self, manifest: dict[str, Any]) -> None:
        for name in STREAMS:
            stream, sizes = getattr(self, name), manifest["streams"][name]
            stream.ids.length = sizes["tokens"]
            stream.ends.length = stream.bytes.length = sizes["documents"]
            for column, facts in shards_by_column(sizes["shards"]).items():
                getattr(stream, COLUMN_ATTRIBUTES[column]).sums = [
                    s for s in map(sums_in, facts) if s is not None
                ]
        self.manifest = manifest

    def verify(self) -> int:
        """Read all of the store and compare its checksums; the bytes that were read. Raises
        DataError naming file and block."""
        if self.has_checksums:
            return sum(
                column.verify()
                for stream in (self.train, self.heldout)
                for column in stream.columns
            )
        for file, shard in self._shards():
            if shard["blake2b"] and checksum(file.read_bytes()) != shard["blake2b"]:
                raise DataError(
                    f"{file}: damaged: its checksum is not the manifest's; {remake(file)}"
                )
        return sum(shard["size"] for _, shard in self._shards())

    def _shards(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for name in STREAMS:
            folder = self.folder / name
            for shard in self.manifest["streams"][name]["shards"]:
                yield folder / shard["file"], shard


def shards_by_column(shards: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What a manifest says of the shards of each column, in their order."""
    columns: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMN_ATTRIBUTES}
    for shard in shards:
        columns[shard["file"].rpartition("-")[0]].append(shard)
    return columns


def sums_in(shard: dict[str, Any]) -> Sums | None:
    """The checksums that a manifest has of a shard; None in format 1."""
    return Sums(shard["blocks_crc32"], shard["rest_crc32"]) if "blocks_crc32" in shard else None


def check_size(file: Path, size: int) -> None:
    """Raises DataError for a shard that is missing or shorter than the manifest says."""
    try:
        there = file.stat().st_size
    except FileNotFoundError:
        there = -1
    if there < size:
        what = "missing" if there < 0 else f"{there} bytes long"
        raise DataError(f"{file}: {what}, and the manifest names {size} bytes; {remake(file)}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest. Raises DataError when there is none, or one that is damaged or of another
    format."""
    file = Path(folder) / MANIFEST
    try:
        content = file.read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not a token store (no manifest.json); make one with `longfire prepare`"
        ) from None
    except ValueError as e:
        raise DataError(
            f"{file}: not valid JSON ({e}); delete the folder and the data will be prepared again"
        ) from None
    if not isinstance(manifest, dict):
        raise DataError(
            f"{file}: damaged: no JSON object; delete the folder and the data will be prepared again"
        )
    if manifest.get("format") not in (1, FORMAT):
        raise DataError(
            f"{file}: format {manifest.get('format')}, and this version reads 1 to {FORMAT}; prepare the data again"
        )
    if manifest["format"] == FORMAT:
        size = len(manifest_end(b""))
        if content[-size:] != manifest_end(content[:-size]):
            raise DataError(
                f"{file}: damaged: its checksum is not that of what was written; delete the folder and the data will be "
                "prepared again"
            )
        del manifest["crc32"]
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Commit a manifest, by one rename."""
    content = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    write_whole(folder / MANIFEST, content + manifest_end(content))


def manifest_end(content: bytes) -> bytes:
    """The last line of a manifest: the CRC-32 of what is before it."""
    return f',\n "crc32": "{zlib.crc32(content):08x}"\n}}'.encode()


def discard(folder: Path) -> None:
    """Remove what a store holds, the manifest first: what is left without it is not a store. The
    lock stays with its holder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in STREAMS:
        shutil.rmtree(folder / name, ignore_errors=True)


def add_checksums(folder: Path, note: Callable[[str], None]) -> None:
    """Give a finished store of format 1, which was just verified, its checksums of blocks."""
    with locked(folder, note):
        manifest = read_manifest(folder)
        for name in STREAMS:
            for shard in manifest["streams"][name]["shards"]:
                sums = written_sums(folder / name / shard["file"], shard["size"])
                shard.update(sums._asdict())
                del shard["blake2b"]
        write_manifest(folder, {**manifest, "format": FORMAT})


@contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a store against other writers; waits, and says so, while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with held(
        folder / "lock",
        lambda holder: note(f"data: {folder.name} is being prepared by {holder}; waiting for it"),
    ):
        yield


class ColumnWriter:
    """A column for appending. Goes on after `length` committed items and drops what lies behind
    them.

    shards: what the manifest says of the shards with committed items. Raises DataError where they
    are damaged.
    """

    def __init__(
        self, path: Path, dtype: str, shard_items: int, length: int, shards: list[dict[str, Any]]
    ) -> None:
        self.path, self.dtype, self.shard_items, self.length = (
            path,
            np.dtype(dtype),
            shard_items,
            length,
        )
        full, rest = divmod(length, shard_items)
        for file in path.parent.glob(f"{path.name}-*"):
            if int(file.stem.rsplit("-", 1)[1]) > full:
                file.unlink()
        for number in range(full + (rest > 0)):
            check_size(
                shard_file(path, number),
                (shard_items if number < full else rest) * self.dtype.itemsize,
            )
        self.full_sums = [
            sums_in(shards[number])
            or written_sums(shard_file(path, number), shard_items * self.dtype.itemsize)
            for number in range(full)
        ]
        self._open(sums_in(shards[full]) if rest else None)

    def _open(self, expected: Sums | None) -> None:
        """The shard that is being filled, with nothing in it but committed items."""
        number, items = divmod(self.length, self.shard_items)
        file, size = shard_file(self.path, number), items * self.dtype.itemsize
        file.touch()
        os.truncate(file, size)
        self._blocks = BlockWriter(file, size, expected)
        self._file = open(file, "ab")  # noqa: SIM115 (open until the shard is full)
        self._synced = self.length

    def append(self, items: np.ndarray) -> None:
        items = np.ascontiguousarray(items, self.dtype)
        while len(items):
            room = self.shard_items - self.length % self.shard_items
            part, items = items[:room], items[room:]
            self._file.write(part)
            self._blocks.update(memoryview(part).cast("B"))
            self.length += len(part)
            if len(part) == room:
                self.sync()
                self.close()
                self.full_sums.append(self._blocks.sums())
                self._open(None)

    def sync(self) -> None:
        if self._synced != self.length:
            for file in (self._file, self._blocks.file):
                file.flush()
                os.fsync(file.fileno())
            self._synced = self.length

    def close(self) -> None:
        self._file.close()
        self._blocks.file.close()

    def shards(self) -> list[dict[str, Any]]:
        """What the manifest says of the shards that hold something."""
        full, rest = divmod(self.length, self.shard_items)
        sizes = [self.shard_items] * full + [rest] * (rest > 0)
        sums = [*self.full_sums, self._blocks.sums()]
        return [
            {
                "file": shard_file(self.path, number).name,
                "size": items * self.dtype.itemsize,
                **sums[number]._asdict(),
            }
            for number, items in enumerate(sizes)
        ]


class StoreWriter:
    """Appends documents to a store and commits them; made while the store is `locked`.

    header: what the store is made from (source, tokenizer, options, dtype). A store that exists is
    continued; `progress` is what its last commit was given.
    """

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        shard_tokens: int = SHARD_TOKENS,
        shard_documents: int = SHARD_DOCUMENTS,
    ) -> None:
        self.folder = folder
        self.header = {**header, "shard_tokens": shard_tokens, "shard_documents": shard_documents}
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
        self.header |= {key: manifest[key] for key in self.header if key in manifest}
        self.header = {"format": FORMAT, **self.header}
        self.progress: dict[str, Any] = manifest.get("progress", {})
        self.complete: bool = manifest.get("complete", False)
        sizes = manifest.get("streams") or {
            name: {"tokens": 0, "documents": 0, "bytes": 0, "shards": []} for name in STREAMS
        }
        self._sizes = sizes
        self._bytes = {name: sizes[name]["bytes"] for name in STREAMS}
        self._columns = (
            {} if self.complete else {name: self._continue(name, sizes[name]) for name in STREAMS}
        )
        if not manifest:
            self.commit({})

    def _continue(self, name: str, sizes: dict[str, Any]) -> dict[str, ColumnWriter]:
        (self.folder / name).mkdir(exist_ok=True)
        shapes = columns(
            self.header["dtype"], self.header["shard_tokens"], self.header["shard_documents"]
        )
        shards = shards_by_column(sizes["shards"])
        writers = {}
        for column, shape in shapes.items():
            length = sizes["tokens" if column == "tokens" else "documents"]
            writers[column] = ColumnWriter(
                self.folder / name / column, *shape, length, shards[column]
            )
        return writers

    def append(
        self, stream: str, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray
    ) -> None:
        """Documents: their ids end to end, the length of each in tokens, and in bytes of its
        text."""
        into = self._columns[stream]
        into["ends"].append(into["tokens"].length + np.cumsum(lengths))
        into["bytes"].append(self._bytes[stream] + np.cumsum(text_bytes))
        into["tokens"].append(ids)
        self._bytes[stream] += int(np.sum(text_bytes))

    def tokens(self, stream: str) -> int:
        return (
            self._columns[stream]["tokens"].length
            if self._columns
            else self._sizes[stream]["tokens"]
        )

    def documents(self, stream: str) -> int:
        return (
            self._columns[stream]["ends"].length
            if self._columns
            else self._sizes[stream]["documents"]
        )

    def commit(self, progress: dict[str, Any], complete: bool = False) -> None:
        """What was appended becomes the store, at once: first the data reach the disk, then one
        rename names them."""
        streams = {}
        for name, into in self._columns.items():
            for column in into.values():
                column.sync()
            sync(self.folder / name)
            streams[name] = {
                "tokens": into["tokens"].length,
                "documents": into["ends"].length,
                "bytes": self._bytes[name],
                "shards": [shard for column in into.values() for shard in column.shards()],
            }
        self.progress, self.complete = progress, complete
        write_manifest(
            self.folder,
            {**self.header, "streams": streams, "progress": progress, "complete": complete},
        )

    def close(self) -> None:
        for into in self._columns.values():
            for column in into.values():
                column.close()
