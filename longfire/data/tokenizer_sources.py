"""Where tokenizers are found: in a tokenizer.json, in a SentencePiece model, in a folder, on the
hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

from longfire.data.sentencepiece_files import (
    MODEL_FILE,
    SentencePieceModel,
    backend_of,
    is_sentencepiece,
    read_sentencepiece,
)
from longfire.data.tokenizer_files import (
    CHAT,
    CONFIG,
    MORE_CHATS,
    CarriedFiles,
    json_of,
    read_carried,
)
from longfire.errors import DataError, first_line
from longfire.listing import is_file, is_folder
from longfire.regular_files import read_regular

BOS = "<bos>"  # in the tokenizers that longfire makes
EOS = "<eos>"
KNOWN_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]")
# What is fetched of a tokenizer that transformers does not make
HUB_FILES = (
    MODEL_FILE,
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT,
)
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
    if is_folder(path):
        return in_folder(path)
    if is_file(path):
        return in_file(path)
    if name.startswith((".", "/", "~")) or name.endswith((".json", ".model")):
        raise DataError(f"tokenizer.path = {name!r}: no such file or folder")
    return on_hub(name)


def in_folder(folder: Path) -> Found:
    """A tokenizer.json and the names beside it, else a SentencePiece model; files of other kinds
    through transformers. Raises DataError."""
    if is_file(folder / "tokenizer.json"):
        return in_file(folder / "tokenizer.json")
    model_file = folder / MODEL_FILE
    if is_file(model_file) and is_sentencepiece(read_regular(model_file)):
        return in_sentencepiece_file(model_file)
    failure = (
        f"{folder}: no tokenizer.json and no SentencePiece {MODEL_FILE} in this folder, and "
        "transformers finds no other tokenizer"
    )
    return by_transformers(str(folder), failure, offline=True)


def content_of(file: Path) -> bytes:
    """The bytes of a file. Raises DataError."""
    try:
        return read_regular(file)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read: {error.strerror}; name a file that can be"
        ) from error


def in_file(file: Path) -> Found:
    """The tokenizer of a tokenizer.json or of a SentencePiece model. Raises DataError."""
    content = content_of(file)
    if is_sentencepiece(content) and file.suffix != ".json":
        return in_sentencepiece_file(file)
    if file.suffix == ".model":
        raise DataError(
            f"{file}: not a SentencePiece model (Llama 3 has ranks of tiktoken under this name); "
            "name the tokenizer.json of its model"
        )
    try:
        backend = Backend.from_buffer(content)
    except ValueError as error:
        raise DataError(
            f"{file}: not a tokenizer.json ({error}); name one, or the folder that holds it"
        ) from error
    bos, eos = names_of_ends(file.parent, backend)
    return Found(backend, bos, eos, str(file), read_carried(file.parent))


def in_sentencepiece_file(file: Path) -> Found:
    """The tokenizer of a SentencePiece model, with the names and rules of the files beside it.

    Where these do not say whether BOS begins a text, it does, as in transformers' class for Llama.
    Raises DataError where the ids would not be those of the sentencepiece library, and where tokens
    were added to the model.
    """
    model = read_sentencepiece(file)
    refuse_added_tokens(model, file)
    backend = backend_of(model, file)
    config = json_of(file.parent / CONFIG)
    bos = model.bos
    eos = model.eos
    if "bos_token" in config or "eos_token" in config:
        bos = named_token(config, "bos_token", file.parent / CONFIG)
        eos = named_token(config, "eos_token", file.parent / CONFIG)
    carried = read_carried(file.parent)
    if "add_bos_token" not in config:
        carried = replace(carried, adds_bos=bool(bos))
    return Found(backend, bos, eos, str(file), carried)


def refuse_added_tokens(model: SentencePieceModel, file: Path) -> None:
    """Raises DataError where the files beside a model name tokens that it does not have."""
    added = list(json_of(file.parent / "added_tokens.json"))
    entries = json_of(file.parent / CONFIG).get("added_tokens_decoder", {})
    if isinstance(entries, dict):
        for entry in entries.values():
            added.append(entry.get("content", "") if isinstance(entry, dict) else "")
    pieces = {piece.text for piece in model.pieces}
    unknown = [token for token in added if token not in pieces]
    if unknown:
        raise DataError(
            f"{file}: the files beside it add tokens that the model does not have "
            f"({', '.join(unknown[:3])}); name a tokenizer.json, which has all of them"
        )


def names_of_ends(folder: Path, backend: Backend) -> tuple[str, str]:
    """(BOS, EOS) as the files beside tokenizer.json name them; without such files, the well-known
    names it has."""
    for name in (CONFIG, "special_tokens_map.json"):
        file = folder / name
        if is_file(file):
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

    names: set[str] = set()
    try:  # ask once, briefly: transformers would try again for most of a minute
        repository = huggingface_hub.HfApi().model_info(name, timeout=PROBE_SECONDS)
        names = {entry.rfilename for entry in repository.siblings or ()}
        offline = False
    except (HTTPError, OSError, ValueError):
        offline = True
    folder = None
    has_model_only = MODEL_FILE in names and "tokenizer.json" not in names
    if offline or has_model_only:
        folder = snapshot_folder(name, offline)
    if folder is not None and has_sentencepiece_only(folder):
        return in_folder(folder)
    failure = (
        f"tokenizer.path = {name!r} is no file or folder here, and as a tokenizer of the hub it "
        "cannot be had"
    )
    try:
        return by_transformers(name, failure, offline)
    except DataError:
        if folder is None or not is_file(folder / "tokenizer.json"):
            raise
        return in_folder(folder)  # a cache without what transformers asks for besides


def snapshot_folder(name: str, offline: bool) -> Path | None:
    """The files of a tokenizer of the hub in its cache; None where they cannot be had."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, allow_patterns=list(HUB_FILES), local_files_only=offline
        )
    except (HTTPError, OSError, ValueError):
        return None
    return Path(snapshot)


def has_sentencepiece_only(folder: Path) -> bool:
    """Whether a folder has a SentencePiece model and no tokenizer.json."""
    return is_file(folder / MODEL_FILE) and not is_file(folder / "tokenizer.json")


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
            f"{failure} ({reason_of(error)}); name a tokenizer.json, a SentencePiece "
            f"{MODEL_FILE}, or a folder that holds one"
        ) from error
    if is_folder(Path(name)):
        carried = read_carried(Path(name))
    else:
        carried = CarriedFiles(files=template_files(loaded.chat_template))
    copy = Backend.from_str(backend.to_str())
    return Found(copy, loaded.bos_token or "", loaded.eos_token or "", name, carried)


def reason_of(error: Exception) -> str:
    """Why transformers makes no tokenizer, in a line. Where there is no file of a tokenizer its own
    line is about packages, which would change nothing."""
    line = first_line(error, None)
    if "tiktoken" in line or "instantiate the backend" in line:
        return "it finds no file that it can convert"
    return line


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
