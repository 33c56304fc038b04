"""Token stores for reading: the ids and document ends of one source on disk, memory-mapped.

    <name>-<address>/
        manifest.json          what the store holds (manifest.py)
        train/, heldout/       the two streams, each of its columns in shards of a fixed size:
            tokens-00000.bin     ids, uint16 or uint32
            ends-00000.bin       int64: where each document ends in the stream, in tokens
            bytes-00000.bin      int64: the same in bytes of its UTF-8 text (for bits per byte)
            mask-00000.bin       uint8: 1 where the token counts in the loss, else 0; there from
                                 the first record that has a mask, and then for every token
            tokens-00000.crc32   checksums of its blocks, compared when a block is first read
                                 (blocks.py)

A shard is full before the next one begins, so item i is in shard i // shard_items and no index is
needed. store_writer.py writes stores.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longfire.data.blocks import BlockFile, Side, Sums, delete_advice
from longfire.data.manifest import (
    MANIFEST,
    MASK,
    STREAMS,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardRecord,
    StreamRecord,
    check_size,
    checksum,
    column_shapes,
    read_manifest,
    shard_file,
    shards_by_column,
    sums_of,
)
from longfire.errors import DataError
from longfire.regular_files import read_regular
from longfire.work_progress import WorkProgress


class Column:
    """A column for reading: an array in shards, each mapped when it is first read. `length` grows
    with the store.

    sums: the checksums of each shard that the manifest names; None in a store of format 1.
    """

    def __init__(self, path: Path, dtype: str, shard_items: int) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.shard_items = shard_items
        self.length = 0
        self.sums: list[Sums | None] = []
        self._files: dict[int, BlockFile] = {}
        self._last_items = np.empty(0, self.dtype)  # of the full shards

    def grow(self, length: int, shards: list[ShardRecord]) -> None:
        """What the manifest names now. Raises DataError where it names too few shards."""
        needed = -(-length // self.shard_items)
        if len(shards) < needed:
            raise DataError(
                f"{self.path}: the manifest of the store names {len(shards)} of the {needed} "
                "shards of this column, so it is damaged; prepare the store again"
            )
        self.length = length
        self.sums = [sums_of(shard) for shard in shards]

    def _shard(self, number: int) -> BlockFile:
        """The items of a shard that exist so far; mapped again when it has grown."""
        items = min(self.length - number * self.shard_items, self.shard_items)
        size = items * self.dtype.itemsize
        opened = self._files.get(number)
        if opened is None or opened.size < size:
            sums = self.sums[number] if size and self.sums else None
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
        start, stop, _ = items.indices(self.length)
        return self.read(start, stop)

    def searchsorted(self, values: np.ndarray, side: Side = "left") -> np.ndarray:
        """numpy's searchsorted on an ascending column: first among the last items of the full
        shards, then inside one shard."""
        self._read_last_items()
        shard_numbers = self._last_items.searchsorted(values, side)
        found = np.empty(len(values), np.int64)
        for number in np.unique(shard_numbers).tolist():
            selected = shard_numbers == number
            in_shard = self._shard(number).searchsorted(values[selected], side)
            found[selected] = number * self.shard_items + in_shard
        return found

    def _read_last_items(self) -> None:
        """Of the shards that became full since the last call."""
        full = self.length // self.shard_items
        last = self.shard_items - 1
        new = []
        for number in range(len(self._last_items), full):
            new.append(self._shard(number).read(last, last + 1)[0])
        if new:
            self._last_items = np.concatenate([self._last_items, np.array(new, self.dtype)])

    def verify(self, progress: WorkProgress) -> int:
        """Check all blocks that have not been checked. Returns the size in bytes."""
        size = 0
        for number in range(-(-self.length // self.shard_items)):
            shard = self._shard(number)
            shard.check()
            size += shard.size
            progress.add(shard.size)
        return size


class TokenStream:
    """The training or the validation part of a store; its sizes follow `TokenStore.refresh`.

    ids, ends, bytes, mask are its columns: `ends.searchsorted(place)` is the document of a token,
    `ends[a:b]` are ends of documents. mask is empty where every token counts in the loss.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, shard_documents: int) -> None:
        shapes = column_shapes(dtype, shard_tokens, shard_documents)
        self.ids = Column(folder / "tokens", *shapes["tokens"])
        self.ends = Column(folder / "ends", *shapes["ends"])
        self.bytes = Column(folder / "bytes", *shapes["bytes"])
        self.mask = Column(folder / MASK, *shapes[MASK])
        self.loss_tokens = 0

    @property
    def length(self) -> int:
        """In tokens."""
        return self.ids.length

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.ends.length

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.ids, self.ends, self.bytes, self.mask

    @property
    def has_mask(self) -> bool:
        """Whether some of its tokens may not count in the loss."""
        return self.mask.length > 0

    @property
    def loss_share(self) -> float:
        """The share of its tokens that count in the loss."""
        return self.loss_tokens / max(self.length, 1)

    def grow(self, record: StreamRecord) -> None:
        """What the manifest names now."""
        shards = shards_by_column(record["shards"])
        # the mask first: whoever sees new ids while this grows must see their mask too
        if shards[MASK]:
            self.mask.grow(record["tokens"], shards[MASK])
        self.loss_tokens = record.get("loss_tokens", record["tokens"])
        self.ids.grow(record["tokens"], shards["tokens"])
        self.ends.grow(record["documents"], shards["ends"])
        self.bytes.grow(record["documents"], shards["bytes"])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the stream."""
        return self.ids.read(start, stop)

    def loss_mask(self, start: int, stop: int) -> np.ndarray:
        """Whether tokens [start, stop) of the stream count in the loss, bool."""
        if not self.has_mask:
            return np.ones(stop - start, bool)
        return self.mask.read(start, stop).astype(bool)

    def sequences(self, first: np.ndarray, length: int) -> np.ndarray:
        """Ids (B, length): `length` tokens from each place in `first` (B,)."""
        tokens_BS = np.empty((len(first), length), self.ids.dtype)
        for number, start in enumerate(first.tolist()):
            tokens_BS[number] = self.ids.read(start, start + length)
        return tokens_BS

    def loss_masks(self, first: np.ndarray, length: int) -> np.ndarray:
        """Whether each token of `sequences` counts in the loss, bool (B, length)."""
        mask_BS = np.empty((len(first), length), bool)
        for number, start in enumerate(first.tolist()):
            mask_BS[number] = self.loss_mask(start, start + length)
        return mask_BS


class TokenStore:
    """A store for reading, complete or growing (`refresh`).

    train, validation: its two streams.

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
                f"{self.folder}: this token store was made with another tokenizer (fingerprint "
                f"{made_with}, not {tokenizer_fingerprint}); name the one it was made with, or "
                "prepare the data again"
            )
        shapes = (
            self.manifest["dtype"],
            self.manifest["shard_tokens"],
            self.manifest["shard_documents"],
        )
        self.train = TokenStream(self.folder / TRAIN, *shapes)
        self.validation = TokenStream(self.folder / VALIDATION, *shapes)
        self._take(self.manifest)
        for file, shard in self._shards():
            check_size(file, shard["size"])

    @property
    def complete(self) -> bool:
        """Whether all documents of the source are in it."""
        return self.manifest["complete"]

    @property
    def has_checksums(self) -> bool:
        """Whether blocks are checked when they are read: not in stores of format 1."""
        return self.manifest["format"] > 1

    def refresh(self) -> None:
        """Read the manifest again: the store may have grown. A store that its writer has deleted
        stays as it was, until the writer says why (prepare.Prepared.check)."""
        if not self.complete and (self.folder / MANIFEST).exists():
            self._take(read_manifest(self.folder))

    def _take(self, manifest: Manifest) -> None:
        self.train.grow(manifest["streams"][TRAIN])
        self.validation.grow(manifest["streams"][VALIDATION])
        self.manifest = manifest

    def verify(self) -> int:
        """Read all of the store and compare its checksums. Returns the bytes that were read.
        Raises DataError naming file and block."""
        total = sum(shard["size"] for _, shard in self._shards())
        with WorkProgress(f"verify {self.folder.name}", total, "bytes") as progress:
            if self.has_checksums:
                columns = (*self.train.columns, *self.validation.columns)
                return sum(column.verify(progress) for column in columns)
            for file, shard in self._shards():
                if shard["blake2b"] and checksum(read_regular(file)) != shard["blake2b"]:
                    raise DataError(
                        f"{file}: damaged: its checksum is not the manifest's; "
                        f"{delete_advice(file)}"
                    )
                progress.add(shard["size"])
        return total

    def _shards(self) -> Iterator[tuple[Path, ShardRecord]]:
        for name in STREAMS:
            for shard in self.manifest["streams"][name]["shards"]:
                yield self.folder / name / shard["file"], shard
