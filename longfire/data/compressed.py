"""Files as streams of bytes, compressed or not. A compressed file that ends early raises EOFError.

Python's readers of gzip, bzip2 and xz notice a cut themselves, but take a file of no bytes, which
an aborted download leaves, for an empty text. Readers of Zstandard notice nothing: `ZstdStream`
looks where the last frame ends.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import zstandard

BLOCK_BYTES = 2**20
# Compressed bytes that are unpacked at a time. Zstandard packs up to 128 KiB of one repeated byte
# into 4 bytes, so this is at most 256 MiB of text.
ZSTD_BYTES = 2**13
ZSTD_WINDOW_BYTES = 2**31  # the largest: what `zstd --long=31` writes
ERRORS = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, zlib.error)


class ZstdStream(io.RawIOBase):
    """The text of all Zstandard frames of a file. Raises EOFError where the last one is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self.frame = self.decompressor.decompressobj()
        self.in_frame = False  # whether a byte of the frame has been read
        self.packed = b""  # read and not yet unpacked
        self.text = memoryview(b"")  # unpacked and not yet asked for

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not len(self.text):
            if not self._unpack():
                return 0
        size = min(len(buffer), len(self.text))
        buffer[:size] = self.text[:size]
        self.text = self.text[size:]
        return size

    def _unpack(self) -> bool:
        """Unpack some more; False at the end of the file."""
        if self.frame.eof:
            self.packed = self.frame.unused_data + self.packed
            self.frame = self.decompressor.decompressobj()
            self.in_frame = False
        self.packed = self.packed or self.raw.read(ZSTD_BYTES)
        if not self.packed:
            if self.in_frame:
                raise EOFError("the file ends within a frame: it was cut off")
            return False
        packed, self.packed = self.packed, b""
        self.in_frame = True
        self.text = memoryview(self.frame.decompress(packed))
        return True


def open_zstd(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(ZstdStream(raw), BLOCK_BYTES)


OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstd,
}


def packed_as(file: Path) -> str:
    """The suffix that says how a file is compressed; "" if it is not."""
    suffix = file.suffix.lower()
    return suffix if suffix in OPENERS else ""


def open_file(file: Path) -> tuple[BinaryIO, BinaryIO]:
    """(text, file) as streams of bytes; where the file stands tells how far we are.

    Raises EOFError for a compressed file of no bytes.
    """
    raw = open(file, "rb")  # noqa: SIM115 (the caller closes it)
    packed = packed_as(file)
    if not packed:
        return raw, raw
    if not raw.peek(1):
        raw.close()
        raise EOFError("it has no bytes, as an aborted download leaves it")
    return OPENERS[packed](raw), raw
