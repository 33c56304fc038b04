"""Hashes of all that files hold. Only these decide which token store files belong to.

Where a file is and when it was last changed do not matter: `touch` and `cp` change nothing. A
hash is computed once. It is kept in `fingerprints.json` beside the token stores, together with the
file's size, times and inode (`Stamp`), and is used again while these stay the same. So 1 TB of text
costs about 20 minutes on one core when it is first named, in parallel over cores, and only a look
at each file's stamp later.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from longfire.disk import write_whole
from longfire.errors import DataError
from longfire.own_files import json_of
from longfire.regular_files import open_regular, read_regular

logger = logging.getLogger(__name__)

CACHE = "fingerprints.json"
CACHED_BYTES = 2**20  # smaller files are hashed again each time: that costs a millisecond
ANNOUNCED_BYTES = 10 * 2**30  # so much to hash takes long enough to print a line
# A file that changed more recently may change again within one tick of its clock.
SETTLED_SECONDS = 2.0
FORMER_WHOLE_BYTES = 16 * 2**20  # the largest file that earlier versions hashed completely
FORMER_END_BYTES = 2**20  # of a larger file: its first and last bytes that they hashed
BLOCK_BYTES = 2**22
HASHING_THREADS = 8


class Stamp(NamedTuple):
    """What the file system knows of a file. A change of its content changes one of these: `touch`
    cannot set back the time of change of the inode (ctime)."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


class Content(NamedTuple):
    """A file's hash, and its stamp from before it was read."""

    digest: str
    stamp: Stamp


def stamp_of(file: Path) -> Stamp:
    """The stamp of a file now. Raises DataError for a file that is gone."""
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def digest_of(file: Path) -> str:
    """blake2b of 128 bits of all bytes of a file. Raises DataError."""
    digest = blake2b(digest_size=16)
    try:
        with open_regular(file) as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def contents_of(files: Sequence[Path], folder: str = "") -> list[Content]:
    """Hash of each file; those that are remembered in `folder` (data.folder) are not read.

    Raises DataError for a file that changes while it is read.
    """
    cache = Path(folder, CACHE) if folder else None
    known = read_cache(cache) if cache else {}
    contents: dict[Path, Content] = {}
    missing: list[Path] = []
    for file in files:
        content = known_content(file, known)
        if content:
            contents[file] = content
        else:
            missing.append(file)
    size = sum(stamp_of(file).size for file in missing)
    if size >= ANNOUNCED_BYTES:
        logger.info(
            f"data: reading {size / 1e9:,.0f} GB once, to name the token store by what the files "
            f"hold (remembered in {cache})"
        )
    new: dict[str, Content] = {}
    with ThreadPoolExecutor(HASHING_THREADS, "fingerprints") as threads:
        for file, content in zip(missing, threads.map(content_of, missing)):
            contents[file] = content
            if is_settled(content):
                new[key_of(file)] = content
    if cache and new:
        write_cache(cache, new)
    return [contents[file] for file in files]


def content_of(file: Path) -> Content:
    """A file's hash, read now."""
    stamp = stamp_of(file)
    digest = digest_of(file)
    if stamp_of(file) != stamp:
        raise DataError(
            f"{file}: it changed while it was read; start again when nothing writes to it"
        )
    return Content(digest, stamp)


def known_content(file: Path, known: Mapping[str, Content]) -> Content | None:
    """What is remembered of a file, if its stamp is still the same."""
    content = known.get(key_of(file))
    if content and content.stamp == stamp_of(file):
        return content
    return None


def key_of(file: Path) -> str:
    return os.path.abspath(file)


def is_settled(content: Content) -> bool:
    """Whether a hash may be remembered: of a large file that did not change just now."""
    stamp = content.stamp
    age = time.time() - max(stamp.modified_ns, stamp.changed_ns) / 1e9
    return stamp.size >= CACHED_BYTES and age > SETTLED_SECONDS


def read_cache(file: Path) -> dict[str, Content]:
    """What was remembered; nothing if it cannot be read: then files are hashed again."""
    contents = {}
    try:
        entries = json_of(read_regular(file), dict[str, Content])
        for path, (digest, stamp) in entries.items():
            contents[path] = Content(digest, Stamp(*stamp))
    except (OSError, ValueError):
        return {}
    return contents


def write_cache(file: Path, new: Mapping[str, Content]) -> None:
    """Remember more. A folder that cannot be written remembers nothing, and everything still
    works."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**read_cache(file), **new}))


def former_digest(file: Path, content: Content) -> str:
    """The hash of earlier versions: of a large file its time of change and its first and last
    bytes."""
    if content.stamp.size <= FORMER_WHOLE_BYTES:
        return content.digest
    with open_regular(file) as opened:
        start = opened.read(FORMER_END_BYTES)
        digest = blake2b(f"{content.stamp.modified_ns}".encode() + start, digest_size=16)
        opened.seek(content.stamp.size - FORMER_END_BYTES)
        digest.update(opened.read())
    return digest.hexdigest()
