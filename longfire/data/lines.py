"""Lines of text, one reader for all: only \n and \r\n end a line; a byte order mark is no text.

Python's `str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which texts contain.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from longfire.data.compressed import open_file

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def decode(raw: bytes) -> tuple[str, str]:
    """(text, problem) of UTF-8, with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return "", f"invalid UTF-8 at byte {error.start}"


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    r"""Lines with their ends; of \r\n and \n both. A stream of bytes is cut at \n alone."""
    return iter(stream)


def read_lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """(number, text, problem) of each line of a file, without its end."""
    stream, raw = open_file(file)
    with raw, stream:
        for number, line in enumerate(lines_of(stream), 1):
            text, problem = decode(line.removesuffix(b"\n").removesuffix(b"\r"))
            yield number, text, problem
