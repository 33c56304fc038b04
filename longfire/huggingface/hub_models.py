"""Models of the hub as folders on this machine: what `longfire import`, `convert` and the settings
that name a model share. Files come into the hub's own cache; code is never among them."""

import logging
from collections.abc import Sequence
from pathlib import Path

from longfire.errors import SettingsError, first_line
from longfire.huggingface.checksums import SUMS
from longfire.listing import exists, is_file, is_folder, paths_in

logger = logging.getLogger(__name__)

PROBE_SECONDS = 10  # how long the hub may take to answer at all
CONFIG_FILE = "config.json"
# What is downloaded of a repository. No code, and PyTorch's own files only where there is nothing
# else.
DESCRIPTION_FILES = [
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    SUMS,
    "additional_chat_templates/*.jinja",
]
SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
PYTORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def model_folder(name: str, setting: str = "") -> Path:
    """The folder with the files of a model: itself, or a download from the hub.

    setting: what names it, for messages; "" where the name alone says it. Raises SettingsError when
    it is neither.
    """
    folder = Path(name).expanduser()
    if is_folder(folder):
        return folder
    named = named_by(name, setting)
    if exists(folder) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SettingsError(
            f"{named}: no such folder; name one that holds config.json and weights, or a model of "
            "the hub"
        )
    logger.info(f"{named} is no folder here: fetching it from the hub")
    fetched = snapshot(name, [*DESCRIPTION_FILES, *SAFETENSORS], setting)
    if not paths_in(fetched, "*.safetensors"):
        fetched = snapshot(name, [*DESCRIPTION_FILES, *PYTORCH_FILES], setting)
    return fetched


def config_folder(name: str, setting: str = "", hint: str = "") -> Path:
    """The folder with the config.json of a model of the hub, without its weights. hint: what else
    may be meant, as the end of the message. Raises SettingsError when it cannot be had."""
    logger.info(f"{named_by(name, setting)} is no file here: fetching its config from the hub")
    folder = snapshot(name, [CONFIG_FILE], setting, hint)
    if not is_file(folder / CONFIG_FILE):
        raise SettingsError(
            f"{named_by(name, setting)}: this repository of the hub has no {CONFIG_FILE}{hint}"
        )
    return folder


def snapshot(name: str, patterns: Sequence[str], setting: str = "", hint: str = "") -> Path:
    """The files of a model that match patterns, in the hub's cache. Raises SettingsError."""
    import huggingface_hub  # only those who name a model of the hub pay for the import
    from huggingface_hub.errors import HTTPError

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(patterns),
            etag_timeout=PROBE_SECONDS,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise SettingsError(
            f"{named_by(name, setting)} is no folder here, and as a model of the hub it cannot be "
            f"had ({first_line(error, None)}); check the name and the network, or fetch its files "
            f"on a machine that has one (`hf download`) and name their folder{hint}"
        ) from error
    return Path(folder)


def named_by(name: str, setting: str) -> str:
    """A model as a message names it."""
    if setting:
        return f"{setting} = {name!r}"
    return name
