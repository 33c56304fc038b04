"""Paths in settings: found beside the recipe or in the working folder, and local. A URL is refused
where it is given, since a file system would take it for the name of a folder: s3://bucket/run
trains into a folder `s3:`."""

import glob
import logging
import re
from pathlib import Path

from longfire.config import shipped
from longfire.errors import SettingsError
from longfire.listing import has_match

logger = logging.getLogger(__name__)

# Values of data.dataset and tokenizer.path that are names of ours, never of files
RESERVED_NAMES = ("embedded", "bytes", "train")

# One letter before the colon would be a drive. :// is nowhere in a path, so also runs/s3://b is
# meant as a URL; of known schemes one slash is enough at the beginning, as pathlib leaves it.
URL = re.compile(
    r"(?:"
    r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]+)://|"
    r"(?:^|,)\s*"
    r"(s3a?|gs|gcs|hf|https?|ftp|az|abfss?|wasbs?|hdfs|dbfs|oci|r2|file):/"
    r")",
    re.IGNORECASE,
)
HUB = re.compile(
    r"(hf://|https?://(www\.)?(huggingface\.co|hf\.co)/)"
    r"(datasets/|models/)?"
    r"(?P<name>[^/\s]+/[^/\s@]+|[^/\s]+)",
    re.IGNORECASE,
)


def refuse_url(value: str, setting: str) -> str:
    """The value, if neither it nor one of its parts between commas is a URL.

    setting: the setting or option, as the message names it. Raises SettingsError with what to write
    instead.
    """
    found = URL.search(value)
    if not found:
        return value
    scheme = (found.group(1) or found.group(2)).lower()
    hub = HUB.search(value)
    if hub:
        instead = f"name the model or dataset of the hub as {hub.group('name')!r}"
    elif scheme == "file":
        instead = "write the path without file://"
    else:
        instead = (
            "copy it to a local disk, or mount it (rclone mount, s3fs, gcsfuse), and name the "
            "local path"
        )
    raise SettingsError(
        f"{setting} = {value!r} is a URL, and longfire reads and writes local files only: {instead}"
    )


def find_path(name: str, beside: Path, also_in: Path | None = None) -> str:
    """A file, folder or glob as an absolute path if it exists in `beside` (the folder of the
    recipe), in the working folder or in `also_in`; else the name itself: a dataset of the hub, or a
    path whose reader will report it as missing."""
    if not name or name in RESERVED_NAMES:
        return name
    places = [beside, Path()]
    if also_in is not None:
        places.append(also_in)
    for folder in places:
        path = (folder / Path(name).expanduser()).absolute()
        if path.exists() or (
            glob.has_magic(name) and has_match(folder, str(Path(name).expanduser()))
        ):
            return str(path)
    return name


def may_be_on_hub(name: str) -> bool:
    """Whether a name that is no file or folder here can be one of the hub: OWNER/NAME, unless
    OWNER is a folder here, as in a mistyped runs/a."""
    parts = name.split("/")
    if Path(parts[0]).is_dir():
        return False
    is_path = name.startswith((".", "/", "~")) or name.endswith((".json", ".toml"))
    return len(parts) == 2 and all(parts) and not is_path and not Path(name).exists()


def find_paths(
    names: tuple[str, ...], beside: Path, also_in: Path | None = None
) -> tuple[str, ...]:
    """The same for each of several names."""
    return tuple(find_path(name, beside, also_in) for name in names)


def find_config(name: str, beside: Path) -> str:
    """The model config of this name: a file or folder as `find_path` finds it, else one that comes
    with longfire, which is logged."""
    path = find_path(name, beside)
    known = shipped.model_config(name) if name else None
    if path != name or Path(name).exists() or known is None:
        return path
    logger.info(f"model.config = {name}: {known}, which comes with longfire")
    return str(known)
