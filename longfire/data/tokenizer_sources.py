"""Where tokenizers are found: in a tokenizer.json, in a folder, on the hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

from longfire.data.tokenizer_files import (
    CHAT,
    CONFIG,
    MORE_CHATS,
    CarriedFiles,
    json_of,
    read_carried,
)
from longfire.errors import DataError, first_line

BOS = "<bos>"  # in the tokenizers that longfire makes
EOS = "<eos>"
KNOWN_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]")
PROBE_SECONDS = 10  # how long the hub may take to answer


class Found(NamedTuple):
    """A tokenizer that was found: the library's object, the names of BOS and EOS ("" if it has
    none), where it comes from, and the files that it came with."""

    backend: Backend
    bos: str
    eos: str
    where: str
    carried: CarriedFiles


def find(name: str) -> Found:
    """The tokenizer of a file, a folder or a name on the hub. Raises DataError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return in_folder(path)
    if path.is_file():
        return in_file(path)
    if name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise DataError(f"tokenizer.path = {name!r}: no such file or folder")
    return on_hub(name)


def in_folder(folder: Path) -> Found:
    """A tokenizer.json and the names beside it; files of other kinds through transformers. Raises
    DataError."""
    if (folder / "tokenizer.json").is_file():
        return in_file(folder / "tokenizer.json")
    failure = f"{folder}: no tokenizer.json in this folder, and transformers finds no other"
    return by_transformers(str(folder), failure, offline=True)


def in_file(file: Path) -> Found:
    """The tokenizer of a tokenizer.json. Raises DataError."""
    content = file.read_bytes()
    try:
        backend = Backend.from_buffer(content)
    except ValueError as error:
        raise DataError(
            f"{file}: not a tokenizer.json ({error}); name one, or the folder that holds it"
        ) from error
    bos, eos = names_of_ends(file.parent, backend)
    return Found(backend, bos, eos, str(file), read_carried(file.parent))


def names_of_ends(folder: Path, backend: Backend) -> tuple[str, str]:
    """(BOS, EOS) as the files beside tokenizer.json name them; without such files, the well-known
    names it has."""
    for name in (CONFIG, "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            config = json_of(file)
            return named_token(config, "bos_token", file), named_token(config, "eos_token", file)
    special = set()
    for token in backend.get_added_tokens_decoder().values():
        if token.special:
            special.add(token.content)
    return first_known(KNOWN_BOS, special), first_known(KNOWN_EOS, special)


def first_known(names: Sequence[str], tokens: set[str]) -> str:
    """The first of the names that is a token; "" if none is."""
    for name in names:
        if name in tokens:
            return name
    return ""


def named_token(config: Mapping[str, object], key: str, file: Path) -> str:
    """A token that a file names, as text or as an object with `content`; "" if it names none.
    Raises DataError."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return ""
    if not isinstance(token, str):
        raise DataError(
            f"{file}: {key} = {json.dumps(token)} must be one token, as text; further ends of a "
            "text belong into the eos_token_id of generation_config.json"
        )
    return token


def on_hub(name: str) -> Found:
    """A tokenizer of the hub, or of its cache. Raises DataError."""
    import huggingface_hub  # only those who name a tokenizer of the hub pay for the import
    from huggingface_hub.errors import HTTPError

    try:  # ask once, briefly: transformers would try again for most of a minute
        huggingface_hub.HfApi().model_info(name, timeout=PROBE_SECONDS)
        offline = False
    except (HTTPError, OSError, ValueError):
        offline = True
    failure = (
        f"tokenizer.path = {name!r} is no file or folder here, and as a tokenizer of the hub it "
        "cannot be had"
    )
    return by_transformers(name, failure, offline)


def by_transformers(name: str, failure: str, offline: bool) -> Found:
    """What transformers makes of a folder or a name. Raises DataError that begins with
    `failure`."""
    # Seconds of imports, only where there is no tokenizer.json.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=offline)
        backend = loaded.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise DataError(
            f"{failure} ({first_line(error, None)}); name a tokenizer.json or a folder "
            "that holds one"
        ) from error
    if Path(name).is_dir():
        carried = read_carried(Path(name))
    else:
        carried = CarriedFiles(files=template_files(loaded.chat_template))
    copy = Backend.from_str(backend.to_str())
    return Found(copy, loaded.bos_token or "", loaded.eos_token or "", name, carried)


def template_files(template: str | Mapping[str, str] | None) -> dict[str, str]:
    """Name -> text of files for the chat templates of a tokenizer: one, or several by name."""
    if template is None:
        return {}
    if isinstance(template, str):
        return {CHAT: template}
    files = {}
    for key, text in template.items():
        files[CHAT if key == "default" else f"{MORE_CHATS}/{key}.jinja"] = text
    return files
