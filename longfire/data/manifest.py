"""The manifest of a token store: what the store holds. It is committed by one rename.

    {"format": 2, "source": ..., "tokenizer": ..., "options": ..., "dtype": "uint16", ...,
     "streams": {"train": ..., "heldout": ...}, "progress": ..., "complete": true,
     "crc32": "0a1b2c3d"}

Its last line is the CRC-32 of all bytes before it. What a manifest does not name does not exist.
"""

import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from longfire.data.blocks import Sums, delete_advice
from longfire.data.documents import Position
from longfire.disk import held, write_whole
from longfire.errors import DataError
from longfire.own_files import parse_json, problem_of
from longfire.regular_files import read_regular

logger = logging.getLogger(__name__)

FORMAT = 2  # of the folder. Format 1 had no checksums of blocks, and can still be read
# Of a store with loss masks. Versions that do not know masks refuse it, since they would train on
# every token.
MASKED_FORMAT = 3
MANIFEST = "manifest.json"
TRAIN = "train"
VALIDATION = "heldout"  # on disk the stream keeps its first name
STREAMS = (TRAIN, VALIDATION)
MASK = "mask"  # the column of the loss mask, which only some streams have
COLUMNS = ("tokens", "ends", "bytes", MASK)


class SourceRecord(TypedDict):
    name: str
    entry: str
    fingerprint: str


class TokenizerRecord(TypedDict):
    fingerprint: str
    vocab_size: int


class Header(TypedDict):
    """What a store is made from."""

    source: SourceRecord
    tokenizer: TokenizerRecord
    options: dict[str, object]
    dtype: str


class ShardRecord(TypedDict, total=False):
    """One shard of a column: `blake2b` in format 1, `blocks_crc32` and `rest_crc32` since
    format 2."""

    file: str
    size: int
    blake2b: str
    blocks_crc32: int
    rest_crc32: int


class StreamRecord(TypedDict):
    """How much a stream holds, in tokens, documents and bytes of text, and its shards.

    loss_tokens: how many of the tokens count in the loss; only where the stream has a mask.
    """

    tokens: int
    documents: int
    bytes: int
    loss_tokens: NotRequired[int]
    shards: list[ShardRecord]


class Progress(TypedDict, total=False):
    """How far the source has been read, and what was left out or lost."""

    position: Position
    empty_documents: int
    bad_documents: int
    bad: list[str]
    losses: list[int]


class Manifest(Header):
    format: int
    shard_tokens: int
    shard_documents: int
    streams: dict[str, StreamRecord]
    progress: Progress
    complete: bool


def checksum(*parts: bytes) -> str:
    """blake2b of 128 bits: for addresses, fingerprints and the shards of format 1."""
    return blake2b(b"".join(parts), digest_size=16).hexdigest()


def column_shapes(
    dtype: str, shard_tokens: int, shard_documents: int
) -> dict[str, tuple[str, int]]:
    """name -> (dtype, items of a shard) of a stream's columns."""
    return {
        "tokens": (dtype, shard_tokens),
        "ends": ("int64", shard_documents),
        "bytes": ("int64", shard_documents),
        MASK: ("uint8", shard_tokens),
    }


def shard_file(path: Path, number: int) -> Path:
    """The file of a shard of the column `path`."""
    return path.with_name(f"{path.name}-{number:05d}.bin")


def shards_by_column(shards: Sequence[ShardRecord]) -> dict[str, list[ShardRecord]]:
    """The shards of each column, in their order."""
    by_column: dict[str, list[ShardRecord]] = {name: [] for name in COLUMNS}
    for shard in shards:
        column = shard["file"].rpartition("-")[0]
        by_column[column].append(shard)
    return by_column


def sums_of(shard: ShardRecord) -> Sums | None:
    """The checksums of a shard; None in format 1."""
    if "blocks_crc32" not in shard:
        return None
    return Sums(shard["blocks_crc32"], shard["rest_crc32"])


def check_size(file: Path, size: int) -> None:
    """Raises DataError for a shard that is missing or shorter than the manifest says."""
    try:
        size_on_disk = file.stat().st_size
    except FileNotFoundError:
        size_on_disk = -1
    if size_on_disk < size:
        problem = "missing" if size_on_disk < 0 else f"{size_on_disk} bytes long"
        raise DataError(
            f"{file}: {problem}, and the manifest names {size} bytes; {delete_advice(file)}"
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises DataError where there is none, and for one that is damaged
    or of another format."""
    file = Path(folder) / MANIFEST
    advice = "delete the folder and the data will be prepared again"
    try:
        content = read_regular(file)
        manifest = parse_json(content)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not a token store (no manifest.json); make one with `longfire prepare`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {problem_of(error)}; {advice}") from None
    if not isinstance(manifest, dict):
        raise DataError(f"{file}: damaged: no JSON object; {advice}")
    if manifest.get("format") not in (1, FORMAT, MASKED_FORMAT):
        raise DataError(
            f"{file}: format {manifest.get('format')}, and this version reads 1 to "
            f"{MASKED_FORMAT}; prepare the data again"
        )
    if manifest["format"] >= FORMAT:
        size = len(last_line(b""))
        if content[-size:] != last_line(content[:-size]):
            raise DataError(
                f"{file}: damaged: its checksum is not that of what was written; {advice}"
            )
        del manifest["crc32"]
    return cast(Manifest, manifest)  # its checksum says that `write_manifest` wrote it


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Commit a manifest, by one rename."""
    content = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    write_whole(folder / MANIFEST, content + last_line(content))


def last_line(content: bytes) -> bytes:
    """The last line of a manifest: the CRC-32 of the bytes before it."""
    return f',\n "crc32": "{zlib.crc32(content):08x}"\n}}'.encode()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a store against other writers. While another process holds the lock, wait and report
    that."""

    def report(holder: str) -> None:
        logger.info(f"data: {folder.name} is being prepared by {holder}; waiting for it")

    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / "lock", report):
        yield
