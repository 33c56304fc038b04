"""Checksums of a file by blocks: written beside it as it grows, compared when a block is first
read.

    tokens-00000.bin      the data
    tokens-00000.crc32    uint32, little-endian: the CRC-32 of each full block of BLOCK_BYTES

The bytes after the last full block and the list of checksums itself have their checksums in the
manifest of the store (`Sums`). The manifest has a checksum of its own.

CRC-32 finds every flipped bit and every burst of up to 32 bits, and misses 1 of 2^32 other
errors. zlib's needs no dependency, does more than 1 GB/s, and lets other threads run.

A block is 64 KiB and not 1 MiB, since shuffled sequences come from anywhere: a sequence of 2048
tokens is 4 KiB, and the first one in a block pays for all of it. With 1 MiB the first sequences of
a run would come at 2 million tokens/s, and each would read 256 times its size from the disk.
"""

import mmap
import zlib
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from longfire.disk import write_whole
from longfire.errors import DataError
from longfire.regular_files import IrregularFileError, open_regular, open_without_link

BLOCK_BYTES = 2**16  # a multiple of every item and of a page of memory
SUM = np.dtype("<u4")

Side = Literal["left", "right"]  # of numpy's searchsorted


class Sums(NamedTuple):
    """The CRC-32 of a file's list of checksums, and of the bytes after its last full block."""

    blocks_crc32: int
    rest_crc32: int


def sums_file(file: Path) -> Path:
    """The file with the checksums of a file's full blocks."""
    return file.with_suffix(".crc32")


def blocks_in(size: int) -> int:
    """Blocks of a file of `size` bytes, the last one full or not."""
    return -(-size // BLOCK_BYTES)


def delete_advice(file: Path) -> str:
    """What the user can do about a damaged file of a token store."""
    return f"delete {file.parent.parent} and the data will be prepared again"


class BlockWriter:
    """Computes the checksums of a file that is appended to and has `size` bytes already.

    expected: the manifest's checksums of these bytes. None where it has none (a new file, or one
    of a store without checksums of blocks): then they are computed from the file.
    Raises DataError when the bytes are not those that were written.
    """

    def __init__(self, file: Path, size: int, expected: Sums | None) -> None:
        full_blocks, self.rest_bytes = divmod(size, BLOCK_BYTES)
        path = sums_file(file)
        with open_regular(file) as opened:
            if expected is None:
                sums = [sum_of(opened.read(BLOCK_BYTES)) for _ in range(full_blocks)]
                write_whole(path, b"".join(sums))
            opened.seek(full_blocks * BLOCK_BYTES)
            self.rest_crc32 = zlib.crc32(opened.read(self.rest_bytes))
        list_bytes = full_blocks * SUM.itemsize
        if not path.is_file():
            raise DataError(f"{path}: missing; {delete_advice(path)}")
        self.file = open_without_link(path, "r+b")
        self.blocks_crc32 = zlib.crc32(self.file.read(list_bytes))
        self.file.truncate(list_bytes)
        self.file.seek(list_bytes)
        if expected not in (None, self.sums()):
            self.file.close()
            raise DataError(
                f"{file}: damaged: its content does not have the checksums of the manifest and of "
                f"{path.name}; {delete_advice(file)}"
            )

    def update(self, content: memoryview) -> None:
        """Take in the bytes that are appended to the file."""
        while len(content):
            room = BLOCK_BYTES - self.rest_bytes
            piece = content[:room]
            content = content[room:]
            self.rest_crc32 = zlib.crc32(piece, self.rest_crc32)
            self.rest_bytes += len(piece)
            if self.rest_bytes == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        entry = self.rest_crc32.to_bytes(SUM.itemsize, "little")
        self.file.write(entry)
        self.blocks_crc32 = zlib.crc32(entry, self.blocks_crc32)
        self.rest_crc32 = 0
        self.rest_bytes = 0

    def sums(self) -> Sums:
        """The two checksums for the manifest."""
        return Sums(self.blocks_crc32, self.rest_crc32)


def written_sums(file: Path, size: int) -> Sums:
    """Write the checksums of a file that has none yet. Returns the two for the manifest."""
    writer = BlockWriter(file, size, None)
    writer.file.close()
    return writer.sums()


def sum_of(block: bytes) -> bytes:
    """A block's entry in the list of checksums."""
    return zlib.crc32(block).to_bytes(SUM.itemsize, "little")


class BlockFile:
    """The first `size` bytes of a file as items, read-only. A block is checked when it is first
    read.

    sums: None in a store without checksums of blocks, whose blocks are not checked.
    Raises DataError naming the damaged file and block.
    """

    def __init__(self, file: Path, dtype: np.dtype, size: int, sums: Sums | None) -> None:
        self.file = file
        self.size = size
        self.sums = sums
        self.items_per_block = BLOCK_BYTES // dtype.itemsize
        self.itemsize = dtype.itemsize
        self.mapped = map_file(file, size)
        self.items = np.frombuffer(self.mapped, dtype)
        self.raw = memoryview(self.mapped)
        self.unchecked = bytearray(blocks_in(size))  # 1: the block has not been checked yet
        self.block_sums = np.empty(0, SUM)
        if sums is not None:
            self.unchecked[:] = b"\1" * len(self.unchecked)
            self.block_sums = self._read_block_sums(sums)

    def _read_block_sums(self, sums: Sums) -> np.ndarray:
        """The checksums of the full blocks, after a check of their own checksum."""
        path = sums_file(self.file)
        size = self.size // BLOCK_BYTES * SUM.itemsize
        try:
            with open_regular(path) as opened:
                content = opened.read(size)
        except FileNotFoundError:
            raise DataError(f"{path}: missing; {delete_advice(path)}") from None
        if len(content) < size or zlib.crc32(content) != sums.blocks_crc32:
            raise DataError(
                f"{path}: damaged, by its checksum in the manifest; {delete_advice(path)}"
            )
        return np.frombuffer(content, SUM)

    def continued(self, size: int, sums: Sums | None) -> "BlockFile":
        """The same file when it has grown. Full blocks that were checked are not checked again."""
        grown = BlockFile(self.file, self.items.dtype, size, sums)
        full_blocks = self.size // BLOCK_BYTES
        grown.unchecked[:full_blocks] = self.unchecked[:full_blocks]
        return grown

    def read(self, low: int, high: int) -> np.ndarray:
        """Items [low, high), a view of the file."""
        first = low * self.itemsize // BLOCK_BYTES
        stop = (high * self.itemsize - 1) // BLOCK_BYTES + 1
        if self.unchecked.find(1, first, stop) >= 0:
            self.check(first, stop)
        return self.items[low:high]

    def check(self, first: int = 0, stop: int | None = None) -> None:
        """Check those of the blocks [first, stop) that have not been checked yet."""
        if stop is None:
            stop = len(self.unchecked)
        for block in range(first, stop):
            if self.unchecked[block]:
                self._check_block(block)
                self.unchecked[block] = 0

    def _check_block(self, block: int) -> None:
        assert self.sums is not None, "without checksums no block waits to be checked"
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.size)
        if isinstance(self.mapped, mmap.mmap) and hasattr(self.mapped, "madvise"):
            # one request to the disk instead of one for each page, since the mapping says "random"
            self.mapped.madvise(mmap.MADV_WILLNEED, start, stop - start)
        expected = self.sums.rest_crc32
        if block < len(self.block_sums):
            expected = int(self.block_sums[block])
        if zlib.crc32(self.raw[start:stop]) != expected:
            raise DataError(
                f"{self.file}: block {block} (bytes {start:,} to {stop:,}) is damaged: its "
                f"checksum is not that of what was written; {delete_advice(self.file)}"
            )

    def searchsorted(self, values: np.ndarray, side: Side = "left") -> np.ndarray:
        """numpy's searchsorted on ascending items. Each block that the search reads is checked.

        When half of the file has been checked, the rest is checked too, so that numpy can search
        alone.
        """
        waiting = self.unchecked.count(1)
        if 2 * waiting < len(self.unchecked):
            self.check()
            waiting = 0
        if not waiting:
            return self.items.searchsorted(values, side)
        return np.array([self._search(value, side) for value in values.tolist()], np.int64)

    def _search(self, value: int, side: Side) -> int:
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

    Sequences are read in a shuffled order, so the kernel is asked not to read 128 KiB around each:
    a first batch from anywhere in 10^12 tokens takes 13 ms instead of 70 to 500 (16 sequences of
    2048 tokens).

    Raises DataError for what is no regular file.
    """
    if not size:
        return b""  # an empty range cannot be mapped
    try:
        with open_regular(file) as opened:
            mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
    except IrregularFileError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
