"""Readers of plain text: one document a file, or several that a separator divides (formats.py says
what a reader is)."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from longfire.data.compressed import open_file
from longfire.data.lines import decode, lines_of
from longfire.data.record_format import RecordFormat
from longfire.data.records import Record

BLOCK_BYTES = 2**20  # read at a time of a text that a separator splits


def read_text(file: Path, record_format: RecordFormat, row: int, offset: int) -> Iterator[Record]:
    """A file of text is one document."""
    if row == 0:
        stream, raw = open_file(file)
        with raw, stream:
            text, problem = decode(stream.read())
            yield Record(1, text, problem, 1.0)


def read_split_text(file: Path, split_documents: str, row: int, offset: int) -> Iterator[Record]:
    """The documents of a text file that holds several, without the white space around them. A
    record is the text between two separators; those without text are counted and not yielded."""
    size = max(file.stat().st_size, 1)
    stream, raw = open_file(file)
    is_plain = stream is raw
    with raw, stream:
        if is_plain and offset:
            stream.seek(offset)
        pieces = split_stream(stream, split_documents)
        if not (is_plain and offset):
            offset = sum(len(piece) for piece in islice(pieces, row))
        for number, piece in enumerate(pieces, row + 1):
            offset += len(piece)
            text, problem = decode(piece.removesuffix(separator_of(split_documents)))
            text = text.strip()
            if not text and not problem:
                continue
            if is_plain:
                yield Record(number, text, problem, offset / size, offset)
            else:
                yield Record(number, text, problem, raw.tell() / size)


def separator_of(split_documents: str) -> bytes:
    """What is removed from the end of a piece; white space is removed anyway."""
    if split_documents in ("lines", "blank_lines"):
        return b""
    return split_documents.encode()


def split_stream(stream: BinaryIO, split_documents: str) -> Iterator[bytes]:
    """The bytes of a text up to and with each separator; all of them together are the text."""
    if split_documents == "lines":
        yield from lines_of(stream)
    elif split_documents == "blank_lines":
        yield from split_at_blank_lines(stream)
    else:
        yield from split_at_separator(stream, split_documents.encode())


def split_at_blank_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines up to a blank one, and with it."""
    lines: list[bytes] = []
    for line in lines_of(stream):
        lines.append(line)
        if line.isspace():
            yield b"".join(lines)
            lines = []
    if lines:
        yield b"".join(lines)


def split_at_separator(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """The pieces that end with the separator, and the rest. Reads a block at a time, so that a file
    need not fit into memory."""
    rest = bytearray()
    while block := stream.read(BLOCK_BYTES):
        begin = max(0, len(rest) - len(separator) + 1)  # what is before was searched already
        rest += block
        while (found := rest.find(separator, begin)) >= 0:
            end = found + len(separator)
            yield bytes(rest[:end])
            del rest[:end]  # moves nothing: Python remembers where the bytes begin
            begin = 0
    if rest:
        yield bytes(rest)
