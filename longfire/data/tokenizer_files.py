"""The files beside a tokenizer.json that an import keeps for an export: names of tokens, chat
templates, limits, ends, and whether a BOS begins every text. token_templates.py changes the last
one in tokenizer.json itself."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from longfire.errors import DataError, first_line
from longfire.listing import paths_in
from longfire.own_files import read_json
from longfire.regular_files import read_regular

CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
MODEL = "config.json"
CHAT = "chat_template.jinja"  # as transformers names it
MORE_CHATS = "additional_chat_templates"  # a folder of further ones, NAME.jinja
# Keys of tokenizer_config.json that are written anew: how the file is read, and the two tokens that
# longfire names.
WRITTEN = (
    "tokenizer_class",
    "clean_up_tokenization_spaces",
    "bos_token",
    "eos_token",
    "add_bos_token",
    "auto_map",
)
# Keys of it that are only valid on one machine or for one version: an export has no use for them.
DROPPED = (
    "name_or_path",
    "_name_or_path",
    "added_tokens_decoder",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "backend",
)
# Keys of generation_config.json that are written anew.
GENERATED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "_from_model_config",
)


@dataclass(frozen=True)
class CarriedFiles:
    """What an import found and an export writes again.

    config: the other keys of tokenizer_config.json.
    files: name -> text of chat templates; a name has a folder where the file has one.
    generation: keys of generation_config.json, sampling defaults among them.
    ends: ids that end a text, EOS or not.
    adds_bos: whether add_bos_token asks for a BOS before every text. Where it does not, the
    post-processor of tokenizer.json may: transformers obeys that whatever the key is.
    """

    config: dict[str, object] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    generation: dict[str, object] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    adds_bos: bool = False


def read_carried(folder: Path) -> CarriedFiles:
    """The files in the folder of a tokenizer.json, or of a model. Raises DataError naming a file
    that is no JSON object."""
    config = json_of(folder / CONFIG)
    generation = json_of(folder / GENERATION)
    model = json_of(folder / MODEL)
    kept = without_keys(config, (*WRITTEN, *DROPPED))
    for key, value in kept.items():
        kept[key] = token_text(key, value)
    files = chat_templates(folder)
    template = config.get("chat_template")
    if isinstance(template, str):  # before transformers 4.52 it was a key of the config
        del kept["chat_template"]
        files.setdefault(CHAT, template)
    return CarriedFiles(
        config=kept,
        files=files,
        generation=without_keys(generation, GENERATED),
        ends=ids_in(generation.get("eos_token_id", model.get("eos_token_id"))),
        adds_bos=config.get("add_bos_token") is True,
    )


def without_keys(content: Mapping[str, object], keys: Iterable[str]) -> dict[str, object]:
    """A copy without some keys."""
    rest = dict(content)
    for key in keys:
        rest.pop(key, None)
    return rest


def token_text(key: str, value: object) -> object:
    """The value of a key. Of a token that is written as an object only its text, which every
    version of transformers reads."""
    if key.endswith("_token") and isinstance(value, dict):
        return value.get("content")
    return value


def json_of(file: Path) -> dict[str, object]:
    """The object in a file, an empty one if there is no file. Raises DataError."""
    if not file.is_file():
        return {}
    return read_json(
        file,
        dict[str, object],
        DataError,
        "repair it, or save the tokenizer again",
    )


def chat_templates(folder: Path) -> dict[str, str]:
    """Name -> text of each template that has a file of its own."""
    templates = {}
    for path in (folder / CHAT, *paths_in(folder / MORE_CHATS, "*.jinja")):
        if path.is_file() and not leaves(path, folder):
            name = path.relative_to(folder).as_posix()
            templates[name] = text_of(path)
    return templates


def text_of(file: Path) -> str:
    """The text of a file. Raises DataError."""
    try:
        return read_regular(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: cannot be read as text ({first_line(error)}); repair it, or save the "
            "tokenizer again"
        ) from error


def leaves(path: Path, folder: Path) -> bool:
    """Whether a link leads out of the folder. The hub's own cache links every file to another one
    of the same cache."""
    target = path.resolve()
    is_inside = target.is_relative_to(folder.resolve())
    return not is_inside and "blobs" not in target.parts


def ids_in(value: object) -> tuple[int, ...]:
    """The ids that an eos_token_id names: one, several or none."""
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int)


def tokenizer_config(
    carried: CarriedFiles, bos: str, eos: str, adds_bos: bool
) -> dict[str, object]:
    """tokenizer_config.json of an export. bos, eos: "" if there is none."""
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if bos:
        config["bos_token"] = bos
    if eos:
        config["eos_token"] = eos
    config |= carried.config
    if eos:
        config.setdefault("pad_token", eos)
    if bos:
        config["add_bos_token"] = adds_bos
    return config


def files_to_write(carried: CarriedFiles, bos: str, eos: str, adds_bos: bool) -> dict[str, str]:
    """Name -> text of the files beside a tokenizer.json."""
    config = tokenizer_config(carried, bos, eos, adds_bos)
    return {CONFIG: json.dumps(config, indent=1, ensure_ascii=False), **carried.files}


def generation_config(
    carried: CarriedFiles, bos_id: int | None, eos_id: int | None, pad_id: int | None
) -> dict[str, object]:
    """generation_config.json of an export: the keys of the import, and the ids of its own
    tokenizer."""
    config = dict(carried.generation)
    if bos_id is not None:
        config["bos_token_id"] = bos_id
    ends = list(ends_of(carried, eos_id))
    if len(ends) == 1:
        config["eos_token_id"] = ends[0]
    elif ends:
        config["eos_token_id"] = ends
    if pad_id is not None:
        config["pad_token_id"] = pad_id
    return config


def ends_of(carried: CarriedFiles, eos_id: int | None) -> tuple[int, ...]:
    """Every id that ends a text."""
    if eos_id is None or eos_id in carried.ends:
        return carried.ends
    return (*carried.ends, eos_id)


def within(carried: CarriedFiles, vocab_size: int) -> CarriedFiles:
    """The same without ends that the vocabulary does not have."""
    ends = tuple(number for number in carried.ends if 0 <= number < vocab_size)
    return replace(carried, ends=ends)
