"""Paths are local. A URL is refused where it is given, since a file system would take it for the
name of a folder: s3://bucket/run trains into a folder `s3:`."""

import re

from longfire.errors import SettingsError

# One letter before the colon would be a drive. :// is nowhere in a path, so also runs/s3://b is
# meant as a URL; of known schemes one slash is enough at the beginning, as pathlib leaves it.
URL = re.compile(
    r"(?:(?<![a-z0-9+.-])([a-z][a-z0-9+.-]+)://|(?:^|,)\s*(s3a?|gs|gcs|hf|https?|ftp|az|abfss?|wasbs?|hdfs|dbfs|oci|r2|file):/)",
    re.IGNORECASE,
)
HUB = re.compile(
    r"(hf://|https?://(www\.)?(huggingface\.co|hf\.co)/)(datasets/|models/)?(?P<name>[^/\s]+/[^/\s@]+|[^/\s]+)",
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
        instead = "copy it to a local disk, or mount it (rclone mount, s3fs, gcsfuse), and name the local path"
    raise SettingsError(
        f"{setting} = {value!r} is a URL, and longfire reads and writes local files only: {instead}"
    )
