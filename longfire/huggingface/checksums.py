"""SHA256SUMS of an export: the hash of each of its files when it was written and compared.

    e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  model.safetensors

It is the format of `sha256sum -c SHA256SUMS`. Import, eval, generate and everything else that
reads an export checks it where it exists. A listed file with other content is an error, also a
config.json: damage cannot be distinguished from an edit. Whoever edited a file on purpose removes
its line. A changed README.md is only reported: it changes no model.
"""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from longfire.errors import CheckpointError
from longfire.listing import is_file, paths_in
from longfire.regular_files import open_regular, read_regular

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
CARD = "README.md"
LINE = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)")
BLOCK_BYTES = 2**22
THREADS = 8  # hashing lets other threads run


def write_checksums(folder: Path) -> None:
    """List every file of a folder. The last thing that is written of an export."""
    files = [path for path in paths_in(folder) if is_file(path)]
    if folder / SUMS in files:
        files.remove(folder / SUMS)
    lines = [f"{digest}  {file.name}\n" for file, digest in zip(files, digests_of(files))]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder: Path, whole: bool = True) -> None:
    """Compare a folder with its list, where it has one.

    whole: a missing file of the list is an error; it is none where only some files were fetched. A
    changed README.md is a warning.

    Raises CheckpointError naming a file that is missing or has other content.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return
    expected = read_checksums(sums)
    present = []
    for name in expected:
        if (folder / name).is_file():
            present.append(name)
        elif whole and name != CARD:
            raise CheckpointError(
                f"{folder / name}: {SUMS} lists it, but it is not there; copy or download the "
                f"folder again, or remove its line from {sums} if you removed it on purpose"
            )
    for name, digest in zip(present, digests_of([folder / name for name in present])):
        if digest != expected[name]:
            report_change(folder, name)


def report_change(folder: Path, name: str) -> None:
    """Raises CheckpointError, except for a README.md."""
    if name != CARD:
        raise CheckpointError(
            f"{folder / name}: it does not hold what was exported, by its checksum in {SUMS}: "
            "damaged, or edited; copy or download it again, or remove its line from "
            f"{folder / SUMS} if you changed it on purpose"
        )
    logger.warning(
        f"{folder / name} was changed after the export ({SUMS}); it does not change the model"
    )


def read_checksums(sums: Path) -> dict[str, str]:
    """File -> hash. Raises CheckpointError for a line of another form."""
    try:
        lines = read_regular(sums).decode().split("\n")
    except UnicodeDecodeError:
        lines = [""]
    if len(lines) > 1 and lines[-1] == "":
        lines.pop()
    digests = {}
    for number, line in enumerate(lines, 1):
        found = LINE.fullmatch(line)
        if not found:
            raise CheckpointError(
                f"{sums}:{number}: damaged: not a hash and a file; copy or download it again, or "
                "remove it to continue unchecked"
            )
        digests[found[2]] = found[1]
    return digests


def digests_of(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(THREADS, "checksums") as threads:
        return list(threads.map(digest_of, files))


def digest_of(file: Path) -> str:
    digest = sha256()
    with open_regular(file) as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
