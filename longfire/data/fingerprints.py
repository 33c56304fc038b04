"""What files hold, by a hash of every byte: it alone decides which token store they belong to.

Where a file is and when it was last changed do not matter: `touch` and `cp` change nothing. A
hash is computed once. It is kept in `fingerprints.json` beside the token stores, with what the
file system says of the file (`Stamp`), and is taken from there while that stays as it was. So
1 TB of text costs about 20 minutes on one core when it is first named, in parallel over cores,
and one look at each file's stamp from then on.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from longfire.errors import DataError

CACHE = "fingerprints.json"
CACHED_BYTES = 2**20  # smaller files are hashed again each time: that costs a millisecond
TOLD_BYTES = 10 * 2**30  # so much to hash takes long enough to be announced
SETTLED_SECONDS = (
    2.0  # a file that changed more recently may change again within one tick of its clock
)
BLOCK_BYTES = 2**22
HASHING_THREADS = 8

Note = Callable[[str], None]


class Stamp(NamedTuple):
    """What the file system says of a file. A change of its content changes one of these: the time
    of change of the inode (ctime) cannot be set back by `touch`."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


class Content(NamedTuple):
    """A file's hash, and its stamp from before it was read."""

    digest: str
    stamp: Stamp


def stamp_of(file: Path) -> Stamp:
    """Raises DataError for a file that is gone."""
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def digest_of(file: Path) -> str:
    """blake2b of 128 bits of all that a file holds. Raises DataError."""
    digest = blake2b(digest_size=16)
    try:
        with open(file, "rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def contents_of(files: Sequence[Path], folder: str = "", note: Note | None = None) -> list[Content]:
    """Hash of each file; those that `folder` (data.folder) remembers are not read.

    Raises DataError for a file that changes while it is read.
    """
    cache = Path(folder, CACHE) if folder else None
    known = read_cache(cache) if cache else {}
    found = [known_content(file, known) for file in files]
    missing = [number for number, content in enumerate(found) if content is None]
    size = sum(stamp_of(files[number]).size for number in missing)
    if note and size >= TOLD_BYTES:
        note(
            f"data: reading {size / 1e9:,.0f} GB once, to name the token store by what the files hold "
            f"(remembered in {cache})"
        )
    with ThreadPoolExecutor(HASHING_THREADS, "fingerprints") as threads:
        hashed = threads.map(content_of, [files[number] for number in missing])
        for number, content in zip(missing, hashed):
            found[number] = content
    new = {key_of(files[number]): found[number] for number in missing if is_settled(found[number])}
    if cache and new:
        write_cache(cache, new)
    return found


def content_of(file: Path) -> Content:
    """A file's hash, read now."""
    stamp = stamp_of(file)
    digest = digest_of(file)
    if stamp_of(file) != stamp:
        raise DataError(
            f"{file}: it changed while it was read; start again when nothing writes to it"
        )
    return Content(digest, stamp)


def known_content(file: Path, known: dict[str, Content]) -> Content | None:
    """What is remembered of a file, if its stamp is still the same."""
    content = known.get(key_of(file))
    return content if content and content.stamp == stamp_of(file) else None


def key_of(file: Path) -> str:
    return os.path.abspath(file)


def is_settled(content: Content) -> bool:
    stamp = content.stamp
    age = time.time() - max(stamp.modified_ns, stamp.changed_ns) / 1e9
    return stamp.size >= CACHED_BYTES and age > SETTLED_SECONDS


def read_cache(file: Path) -> dict[str, Content]:
    """What was remembered; nothing if it cannot be read: then files are hashed again."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {path: Content(digest, Stamp(*stamp)) for path, (digest, stamp) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_cache(file: Path, new: dict[str, Content]) -> None:
    """Remember more. A folder that cannot be written remembers nothing, and everything still
    works."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({**read_cache(file), **new}), encoding="utf-8")
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)


def former_digest(file: Path, content: Content) -> str:
    """As it was before: of a file over 16 MiB its time of change and its first and last MiB."""
    if content.stamp.size <= 16 * 2**20:
        return content.digest
    with open(file, "rb") as opened:
        digest = blake2b(
            f"{content.stamp.modified_ns}".encode() + opened.read(2**20), digest_size=16
        )
        opened.seek(content.stamp.size - 2**20)
        digest.update(opened.read())
    return digest.hexdigest()
