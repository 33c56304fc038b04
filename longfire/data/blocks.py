"""Checksums of a file by blocks: written beside it as it grows, compared when a block is first
read.

    tokens-00000.bin      the data
    tokens-00000.crc32    uint32, little-endian: the CRC-32 of each whole block of BLOCK_BYTES

What is behind the last whole block, and the list of checksums itself, have theirs in the manifest
of the store (`Sums`), which has one of its own.

CRC-32 finds every flipped bit and every burst of up to 32 bits, and misses 1 of 2^32 other
accidents. zlib's needs no dependency, does more than 1 GB/s, and lets other threads run.

A block is 64 KiB and not 1 MiB, since shuffled rows lie anywhere: a row of 2048 tokens is 4 KiB,
and the first one in a block pays for all of it. With 1 MiB the first rows of a run would come
at 2 million tokens/s, and each would read 256 times its size from the disk.
"""

import mmap
import zlib
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np

from longfire.errors import DataError

BLOCK_BYTES = 2**16  # a multiple of every item and of a page of memory
SUM = np.dtype("<u4")


class Sums(NamedTuple):
    """The CRC-32 of a file's list of checksums, and of what is behind its last whole block."""

    blocks_crc32: int
    rest_crc32: int


def sums_file(file: Path) -> Path:
    """Where the checksums of a file's whole blocks are."""
    return file.with_suffix(".crc32")


def blocks_in(size: int) -> int:
    """Blocks of a file of so many bytes, the last one whole or not."""
    return -(-size // BLOCK_BYTES)


def remake(file: Path) -> str:
    """What to do about a damaged file of a token store."""
    return f"delete {file.parent.parent} and the data will be prepared again"


class BlockWriter:
    """Keeps the checksums of a file that is appended to and has `size` bytes already.

    expected: what the manifest says of these bytes; None where it says nothing (a new file, or one
    of a store without checksums of blocks): then they are computed from the file.
    Raises DataError when the bytes are not those that were written.
    """

    def __init__(self, file: Path, size: int, expected: Sums | None) -> None:
        self.whole, self.rest_bytes = divmod(size, BLOCK_BYTES)
        path = sums_file(file)
        with open(file, "rb") as opened:
            if expected is None:
                path.write_bytes(
                    b"".join(sum_of(opened.read(BLOCK_BYTES)) for _ in range(self.whole))
                )
            opened.seek(self.whole * BLOCK_BYTES)
            self.rest_crc32 = zlib.crc32(opened.read(self.rest_bytes))
        list_bytes = self.whole * SUM.itemsize
        if not path.is_file():
            raise DataError(f"{path}: missing; {remake(path)}")
        self.file = open(path, "r+b")  # noqa: SIM115 (open as long as the file that it describes)
        self.blocks_crc32 = zlib.crc32(self.file.read(list_bytes))
        self.file.truncate(list_bytes)
        self.file.seek(list_bytes)
        if expected not in (None, self.sums()):
            self.file.close()
            raise DataError(
                f"{file}: damaged: what was written before is not what the checksums of the "
                f"manifest and of {path.name} say; {remake(file)}"
            )

    def update(self, content: memoryview) -> None:
        """Bytes that are appended to the file."""
        while len(content):
            room = BLOCK_BYTES - self.rest_bytes
            piece, content = content[:room], content[room:]
            self.rest_crc32 = zlib.crc32(piece, self.rest_crc32)
            self.rest_bytes += len(piece)
            if self.rest_bytes == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        entry = self.rest_crc32.to_bytes(SUM.itemsize, "little")
        self.file.write(entry)
        self.blocks_crc32 = zlib.crc32(entry, self.blocks_crc32)
        self.rest_crc32 = self.rest_bytes = 0

    def sums(self) -> Sums:
        return Sums(self.blocks_crc32, self.rest_crc32)


def written_sums(file: Path, size: int) -> Sums:
    """Write the checksums of a file that has none yet, and return those that the manifest keeps."""
    writer = BlockWriter(file, size, None)
    writer.file.close()
    return writer.sums()


def sum_of(block: bytes) -> bytes:
    """A block's entry in the list of checksums."""
    return zlib.crc32(block).to_bytes(SUM.itemsize, "little")


class BlockFile:
    """The first `size` bytes of a file as items, read-only; a block is checked when it is first
    read.

    sums: None in a store without checksums of blocks, whose blocks are not checked.
    Raises DataError naming the file and the block that is damaged.
    """

    def __init__(self, file: Path, dtype: np.dtype, size: int, sums: Sums | None) -> None:
        self.file, self.size, self.sums = file, size, sums
        self.items_per_block = BLOCK_BYTES // dtype.itemsize
        self.itemsize = dtype.itemsize
        self.mapped = map_file(file, size)
        self.items = np.frombuffer(self.mapped, dtype)
        self.raw = np.frombuffer(self.mapped, np.uint8)
        self.unchecked = bytearray(blocks_in(size))  # 1: the block has not been compared yet
        self.blocks = np.empty(0, SUM)
        if sums is not None:
            self.unchecked[:] = b"\1" * len(self.unchecked)
            self.blocks = self._listed(sums)

    def _listed(self, sums: Sums) -> np.ndarray:
        """The checksums of the whole blocks, which have a checksum too."""
        path, size = sums_file(self.file), self.size // BLOCK_BYTES * SUM.itemsize
        try:
            with open(path, "rb") as opened:
                content = opened.read(size)
        except FileNotFoundError:
            raise DataError(f"{path}: missing; {remake(path)}") from None
        if len(content) < size or zlib.crc32(content) != sums.blocks_crc32:
            raise DataError(f"{path}: damaged, by its checksum in the manifest; {remake(path)}")
        return np.frombuffer(content, SUM)

    def continued(self, size: int, sums: Sums | None) -> "BlockFile":
        """The same file when it has grown; whole blocks that were checked are not checked again."""
        grown = BlockFile(self.file, self.items.dtype, size, sums)
        whole = self.size // BLOCK_BYTES
        grown.unchecked[:whole] = self.unchecked[:whole]
        return grown

    def read(self, low: int, high: int) -> np.ndarray:
        """Items [low, high), a view of the file."""
        first = low * self.itemsize // BLOCK_BYTES
        stop = (high * self.itemsize - 1) // BLOCK_BYTES + 1
        if self.unchecked.find(1, first, stop) >= 0:
            self.check(first, stop)
        return self.items[low:high]

    def check(self, first: int = 0, stop: int | None = None) -> None:
        """Compare blocks [first, stop) that have not been compared yet."""
        for block in range(first, len(self.unchecked) if stop is None else stop):
            if self.unchecked[block]:
                self._check_block(block)
                self.unchecked[block] = 0

    def _check_block(self, block: int) -> None:
        assert self.sums is not None, "without checksums no block waits to be checked"
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.size)
        if hasattr(self.mapped, "madvise"):
            # one request to the disk instead of one for each page, since the mapping says "random"
            self.mapped.madvise(mmap.MADV_WILLNEED, start, stop - start)
        expected = int(self.blocks[block]) if block < len(self.blocks) else self.sums.rest_crc32
        if zlib.crc32(self.raw[start:stop]) != expected:
            raise DataError(
                f"{self.file}: block {block} (bytes {start:,} to {stop:,}) is damaged: its "
                f"checksum is not that of what was written; {remake(self.file)}"
            )

    def searchsorted(self, values: np.ndarray, side: str = "left") -> np.ndarray:
        """numpy's searchsorted on ascending items; each block that the search looks at is checked.

        When half of the file has been checked the rest is too, so that numpy can search alone.
        """
        waiting = self.unchecked.count(1)
        if 2 * waiting < len(self.unchecked):
            self.check()
            waiting = 0
        if not waiting:
            return self.items.searchsorted(values, side)
        return np.array([self._search(value, side) for value in values.tolist()], np.int64)

    def _search(self, value: int, side: str) -> int:
        bisect = bisect_left if side == "left" else bisect_right
        block = bisect(range(len(self.unchecked)), value, key=self._last_of_block)
        low = min(block * self.items_per_block, len(self.items))
        high = min(low + self.items_per_block, len(self.items))
        return low + int(self.read(low, high).searchsorted(value, side))

    def _last_of_block(self, block: int) -> int:
        last = min((block + 1) * self.items_per_block, len(self.items)) - 1
        return int(self.read(last, last + 1)[0])


def map_file(file: Path, size: int) -> mmap.mmap | bytes:
    """The first bytes of a file, read-only.

    Rows are read in a shuffled order, so the system is told not to read 128 KiB around each: a
    first batch from anywhere in 10^12 tokens takes 13 ms where it took 70 to 500 (16 rows of 2048
    tokens).
    """
    if not size:
        return b""  # an empty range cannot be mapped
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
