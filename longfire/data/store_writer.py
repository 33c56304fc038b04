"""Token stores for writing: append-only, and consistent after a kill at any time.

A writer that finds a store whose writer was killed deletes what the manifest does not name and
continues from its position. The finished store is the same, byte for byte, as one that was never
interrupted.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from longfire.data.blocks import BlockWriter, Sums, written_sums
from longfire.data.manifest import (
    COLUMNS,
    FORMAT,
    MANIFEST,
    MASK,
    MASKED_FORMAT,
    STREAMS,
    Header,
    Manifest,
    Progress,
    ShardRecord,
    StreamRecord,
    check_size,
    column_shapes,
    locked,
    read_manifest,
    shard_file,
    shards_by_column,
    sums_of,
    write_manifest,
)
from longfire.data.token_record import TokenRecord, mask_of
from longfire.disk import sync
from longfire.listing import exists, paths_in
from longfire.regular_files import open_without_link

SHARD_TOKENS = 2**28  # 512 MiB of uint16
SHARD_DOCUMENTS = 2**22  # 32 MiB of int64
MASKED_AT_ONCE = 2**20  # tokens before the first one with a mask


class ColumnWriter:
    """A column for appending. It continues after `length` committed items and deletes all that is
    behind them.

    shards: the manifest's records of the shards with committed items. Raises DataError where they
    are damaged.
    """

    def __init__(
        self, path: Path, dtype: str, shard_items: int, length: int, shards: list[ShardRecord]
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.shard_items = shard_items
        self.length = length
        full, rest = divmod(length, shard_items)
        for file in paths_in(path.parent, f"{path.name}-*"):
            if int(file.stem.rsplit("-", 1)[1]) > full:
                file.unlink()
        shard_size = shard_items * self.dtype.itemsize
        for number in range(full):
            check_size(shard_file(path, number), shard_size)
        if rest:
            check_size(shard_file(path, full), rest * self.dtype.itemsize)
        self.full_sums: list[Sums] = []
        for number in range(full):
            sums = sums_of(shards[number]) or written_sums(shard_file(path, number), shard_size)
            self.full_sums.append(sums)
        self._open(sums_of(shards[full]) if rest else None)

    def _open(self, expected: Sums | None) -> None:
        """Open the shard that is being filled, with only committed items in it."""
        number, items = divmod(self.length, self.shard_items)
        file = shard_file(self.path, number)
        size = items * self.dtype.itemsize
        with open_without_link(file, "a+b") as opened:
            opened.truncate(size)
        self._blocks = BlockWriter(file, size, expected)
        self._file = open_without_link(file, "ab")
        self._synced = self.length

    def append(self, items: np.ndarray) -> None:
        """Append items; a full shard is closed and the next one begun."""
        items = np.ascontiguousarray(items, self.dtype)
        while len(items):
            room = self.shard_items - self.length % self.shard_items
            part = items[:room]
            items = items[room:]
            content = memoryview(part.data).cast("B")
            self._file.write(content)
            self._blocks.update(content)
            self.length += len(part)
            if len(part) == room:
                self.sync()
                self.close()
                self.full_sums.append(self._blocks.sums())
                self._open(None)

    def sync(self) -> None:
        """Wait until the disk has all items."""
        if self._synced != self.length:
            for file in (self._file, self._blocks.file):
                file.flush()
                os.fsync(file.fileno())
            self._synced = self.length

    def close(self) -> None:
        self._file.close()
        self._blocks.file.close()

    def shards(self) -> list[ShardRecord]:
        """The records of the shards that have items, for the manifest."""
        full, rest = divmod(self.length, self.shard_items)
        records = []
        for number in range(full):
            records.append(self._record(number, self.shard_items, self.full_sums[number]))
        if rest:
            records.append(self._record(full, rest, self._blocks.sums()))
        return records

    def _record(self, number: int, items: int, sums: Sums) -> ShardRecord:
        return {
            "file": shard_file(self.path, number).name,
            "size": items * self.dtype.itemsize,
            "blocks_crc32": sums.blocks_crc32,
            "rest_crc32": sums.rest_crc32,
        }


class StoreWriter:
    """Appends documents to a store and commits them. The caller must have `locked` the store.

    header: what the store is made from. A store that exists is continued. `progress` is what its
    last commit was given.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        shard_tokens: int = SHARD_TOKENS,
        shard_documents: int = SHARD_DOCUMENTS,
    ) -> None:
        self.folder = folder
        self.manifest = new_manifest(header, shard_tokens, shard_documents)
        is_there = exists(folder / MANIFEST)
        if is_there:
            self.manifest.update(read_manifest(folder))
            self.manifest["format"] = max(FORMAT, self.manifest["format"])
        self._text_bytes: dict[str, int] = {}
        self._loss_tokens: dict[str, int] = {}
        for name, record in self.manifest["streams"].items():
            self._text_bytes[name] = record["bytes"]
            self._loss_tokens[name] = record.get("loss_tokens", record["tokens"])
        self._columns: dict[str, dict[str, ColumnWriter]] = {}
        if not self.complete:
            for name in STREAMS:
                self._columns[name] = self._continue(name, self.manifest["streams"][name])
        if not is_there:
            self.commit({})

    @property
    def progress(self) -> Progress:
        return self.manifest["progress"]

    @property
    def complete(self) -> bool:
        """Whether the store needs no more documents."""
        return self.manifest["complete"]

    def _continue(self, name: str, record: StreamRecord) -> dict[str, ColumnWriter]:
        (self.folder / name).mkdir(exist_ok=True)
        shards = shards_by_column(record["shards"])
        writers = {}
        for column in COLUMNS:
            length = record["documents"]
            if column in ("tokens", MASK):
                length = record["tokens"]
            if column == MASK and not shards[MASK]:
                for file in paths_in(self.folder / name, f"{MASK}-*"):
                    file.unlink()  # was not committed
                continue
            writers[column] = self._column(name, column, length, shards[column])
        return writers

    def _column(
        self, stream: str, column: str, length: int, shards: list[ShardRecord]
    ) -> ColumnWriter:
        manifest = self.manifest
        shapes = column_shapes(
            manifest["dtype"], manifest["shard_tokens"], manifest["shard_documents"]
        )
        dtype, shard_items = shapes[column]
        path = self.folder / stream / column
        return ColumnWriter(path, dtype, shard_items, length, shards)

    def append(self, stream: str, record: TokenRecord, text_bytes: np.ndarray) -> None:
        """Append the documents of a record to a stream. text_bytes: (D,), the bytes of the text of
        each."""
        columns = self._columns[stream]
        if record.loss_mask is not None and MASK not in columns:
            columns[MASK] = self._begun_mask(stream, columns["tokens"].length)
        if MASK in columns:
            columns[MASK].append(mask_of(record))
        columns["ends"].append(columns["tokens"].length + np.cumsum(record.lengths))
        columns["bytes"].append(self._text_bytes[stream] + np.cumsum(text_bytes))
        columns["tokens"].append(record.ids)
        self._text_bytes[stream] += int(np.sum(text_bytes))
        self._loss_tokens[stream] += record.loss_tokens

    def _begun_mask(self, stream: str, tokens: int) -> ColumnWriter:
        """The mask of a stream that had none: its `tokens` tokens all count in the loss."""
        mask = self._column(stream, MASK, 0, [])
        for start in range(0, tokens, MASKED_AT_ONCE):
            mask.append(np.ones(min(MASKED_AT_ONCE, tokens - start), np.uint8))
        return mask

    def tokens(self, stream: str) -> int:
        """Tokens of a stream, with those that are not committed yet."""
        if not self._columns:
            return self.manifest["streams"][stream]["tokens"]
        return self._columns[stream]["tokens"].length

    def loss_tokens(self, stream: str) -> int:
        """Tokens of a stream that count in the loss, with those that are not committed yet."""
        return self._loss_tokens[stream]

    def documents(self, stream: str) -> int:
        """Documents of a stream, with those that are not committed yet."""
        if not self._columns:
            return self.manifest["streams"][stream]["documents"]
        return self._columns[stream]["ends"].length

    def commit(self, progress: Progress, complete: bool = False) -> None:
        """Make what was appended part of the store, at once: first the disk receives the data, then
        one rename names them."""
        streams: dict[str, StreamRecord] = {}
        for name, columns in self._columns.items():
            shards: list[ShardRecord] = []
            for column in columns.values():
                column.sync()
                shards += column.shards()
            sync(self.folder / name)
            streams[name] = {
                "tokens": columns["tokens"].length,
                "documents": columns["ends"].length,
                "bytes": self._text_bytes[name],
                "shards": shards,
            }
            if MASK in columns:
                streams[name]["loss_tokens"] = self._loss_tokens[name]
                self.manifest["format"] = MASKED_FORMAT
        self.manifest["streams"] = streams
        self.manifest["progress"] = progress
        self.manifest["complete"] = complete
        write_manifest(self.folder, self.manifest)

    def close(self) -> None:
        for columns in self._columns.values():
            for column in columns.values():
                column.close()


def new_manifest(header: Header, shard_tokens: int, shard_documents: int) -> Manifest:
    """The manifest of an empty store."""
    streams: dict[str, StreamRecord] = {}
    for name in STREAMS:
        streams[name] = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
    return {
        "format": FORMAT,
        "source": header["source"],
        "tokenizer": header["tokenizer"],
        "options": header["options"],
        "dtype": header["dtype"],
        "shard_tokens": shard_tokens,
        "shard_documents": shard_documents,
        "streams": streams,
        "progress": {},
        "complete": False,
    }


def discard(folder: Path) -> None:
    """Delete what a store holds, the manifest first: without it the rest is not a store. The lock
    stays with its holder."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in STREAMS:
        shutil.rmtree(folder / name, ignore_errors=True)


def add_checksums(folder: Path) -> None:
    """Give a complete store of format 1, which was just verified, its checksums of blocks."""
    with locked(folder):
        manifest = read_manifest(folder)
        for name in STREAMS:
            for shard in manifest["streams"][name]["shards"]:
                sums = written_sums(folder / name / shard["file"], shard["size"])
                shard["blocks_crc32"] = sums.blocks_crc32
                shard["rest_crc32"] = sums.rest_crc32
                del shard["blake2b"]
        manifest["format"] = FORMAT
        write_manifest(folder, manifest)
