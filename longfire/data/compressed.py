"""Files as streams of bytes, compressed or not. A compressed file that ends early raises EOFError.

Such a file may be several streams, one after another (`cat`, pbzip2, pigz, zstd's frames). Python's
reader of gzip checks each. Its readers of bzip2 and xz end without an error at a later stream whose
first bytes are damaged, and readers of Zstandard do not notice a cut: `ConcatenatedStream` checks
where each stream ends. A file of no bytes, which an aborted download leaves, is an error and not an
empty text.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import zstandard

from longfire.regular_files import open_regular

BLOCK_BYTES = 2**20
# Compressed bytes that are unpacked at a time. Zstandard packs up to 128 KiB of one repeated byte
# into 4 bytes, so this is at most 256 MiB of text.
PACKED_BYTES = 2**13
ZSTD_WINDOW_BYTES = 2**31  # the largest: what `zstd --long=31` writes
ERRORS = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, zlib.error)


class Decompressor(Protocol):
    """Decompresses one stream of a file, as the classes of bz2 and lzma do."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether it has returned all that it can without more input."""
        ...

    @property
    def unused_data(self) -> bytes:
        """The bytes that it was given after the end of the stream."""
        ...

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class ZstdFrame:
    """The `Decompressor` of a Zstandard frame. It has no limit on what it returns at a time."""

    needs_input = True

    def __init__(self, zstd: zstandard.ZstdDecompressor) -> None:
        self.frame = zstd.decompressobj()

    @property
    def eof(self) -> bool:
        return self.frame.eof

    @property
    def unused_data(self) -> bytes:
        return self.frame.unused_data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self.frame.decompress(data)


class ConcatenatedStream(io.RawIOBase):
    """The text of all compressed streams of a file, one after another.

    is_padded: zero bytes after a stream are padding (the format of xz has it, tapes add it).
    Raises EOFError where the last stream is cut off, and the error of the decompressor where other
    bytes than a stream follow a stream.
    """

    def __init__(
        self, raw: BinaryIO, new_decompressor: Callable[[], Decompressor], is_padded: bool
    ) -> None:
        self.raw = raw
        self.new_decompressor = new_decompressor
        self.is_padded = is_padded
        self.decompressor = new_decompressor()
        self.in_stream = False  # whether a byte of the stream has been read
        self.packed = b""  # read and not yet unpacked
        self.text = memoryview(b"")  # unpacked and not yet returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        assert isinstance(buffer, bytearray | memoryview), "what the classes of io pass"
        target = memoryview(buffer).cast("B")
        while not len(self.text):
            if not self._unpack():
                return 0
        size = min(len(target), len(self.text))
        target[:size] = self.text[:size]
        self.text = self.text[size:]
        return size

    def _unpack(self) -> bool:
        """Unpack some more; False at the end of the file."""
        if self.decompressor.eof:
            self._begin_another()
        if self.decompressor.needs_input or not self.in_stream:
            self.packed = self.packed or self.raw.read(PACKED_BYTES)
            if not self.packed:
                if self.in_stream:
                    raise EOFError("the file ends within a compressed stream: it was cut off")
                return False
        packed = self.packed
        self.packed = b""
        self.in_stream = True
        self.text = memoryview(self.decompressor.decompress(packed, BLOCK_BYTES))
        return True

    def _begin_another(self) -> None:
        """Begin another stream, with the bytes that the last one has left over."""
        self.packed = self.decompressor.unused_data
        self.decompressor = self.new_decompressor()
        self.in_stream = False
        if self.is_padded:
            self.packed = self.packed.lstrip(b"\0")
            while not self.packed and (block := self.raw.read(PACKED_BYTES)):
                self.packed = block.lstrip(b"\0")


def open_bz2(raw: BinaryIO) -> BinaryIO:
    return buffered(ConcatenatedStream(raw, bz2.BZ2Decompressor, is_padded=True))


def open_xz(raw: BinaryIO) -> BinaryIO:
    # not the older format of .lzma files: in that, a file of zero bytes is an empty text
    def new_decompressor() -> Decompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)

    return buffered(ConcatenatedStream(raw, new_decompressor, is_padded=True))


def open_zstd(raw: BinaryIO) -> BinaryIO:
    zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)

    def new_decompressor() -> Decompressor:
        return ZstdFrame(zstd)

    return buffered(ConcatenatedStream(raw, new_decompressor, is_padded=False))


def open_gzip(raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))


def buffered(stream: ConcatenatedStream) -> BinaryIO:
    return io.BufferedReader(stream, BLOCK_BYTES)


OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": open_gzip,
    ".bz2": open_bz2,
    ".xz": open_xz,
    ".zst": open_zstd,
}


def compression_of(file: Path) -> str:
    """The suffix of a compressed file (`.gz`); "" if it is not compressed."""
    suffix = file.suffix.lower()
    if suffix in OPENERS:
        return suffix
    return ""


def open_file(file: Path) -> tuple[BinaryIO, BinaryIO]:
    """(text, file) as streams of bytes; the place in the file shows how much has been read.

    Raises EOFError for a compressed file of no bytes.
    """
    raw = cast(io.BufferedReader, open_regular(file))
    compression = compression_of(file)
    if not compression:
        return raw, raw
    if not raw.peek(1):
        raw.close()
        raise EOFError("it has no bytes, as an aborted download leaves it")
    return OPENERS[compression](raw), raw
