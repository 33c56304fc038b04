"""What lies beside a tokenizer.json and goes along from an import to an export: names, chat
templates, limits, ends, and whether a BOS begins every text."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Words

from longfire.errors import DataError

CONFIG, GENERATION, MODEL = "tokenizer_config.json", "generation_config.json", "config.json"
CHAT = "chat_template.jinja"  # as transformers names it
MORE_CHATS = "additional_chat_templates"  # a folder of further ones, NAME.jinja
TEMPLATE = "TemplateProcessing"  # the post-processor of tokenizer.json that adds tokens to a text
# Keys of tokenizer_config.json that are written anew: of how the file is read, and of the two
# tokens that we name.
WRITTEN = (
    "tokenizer_class",
    "clean_up_tokenization_spaces",
    "bos_token",
    "eos_token",
    "add_bos_token",
    "auto_map",
)
# Keys of it that hold for one machine or one version: an export has no use for them.
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
    """config: other keys of tokenizer_config.json.  files: name -> text of chat templates, names with a folder where they have one.
    generation: keys of generation_config.json, sampling defaults among them.  ends: ids that end a text, EOS or not.
    adds_bos: whether add_bos_token asks for a BOS before every text. Where it does not, the
    post-processor of tokenizer.json may: transformers heeds that whatever the key is.
    """

    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    adds_bos: bool = False


def read_carried(folder: Path) -> CarriedFiles:
    """What lies in the folder of a tokenizer.json, or of a model. Raises DataError naming a file
    that is no JSON object."""
    config, generation, model = (json_of(folder / name) for name in (CONFIG, GENERATION, MODEL))
    template = config.get("chat_template")
    kept = {
        key: as_text(key, value) for key, value in config.items() if key not in (*WRITTEN, *DROPPED)
    }
    files = chat_templates(folder)
    if isinstance(template, str):  # before transformers 4.52 it stood among the names
        files.setdefault(CHAT, kept.pop("chat_template"))
    return CarriedFiles(
        config=kept,
        files=files,
        generation={key: value for key, value in generation.items() if key not in GENERATED},
        ends=ids_in(generation.get("eos_token_id", model.get("eos_token_id"))),
        adds_bos=config.get("add_bos_token") is True,
    )


def as_text(key: str, value: Any) -> Any:
    """The value of a key; of a token that is written as an object its text alone, which every
    version reads."""
    if key.endswith("_token") and isinstance(value, dict):
        return value.get("content")
    return value


def json_of(file: Path) -> dict[str, Any]:
    """The object in a file, an empty one if there is no file. Raises DataError."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(
            f"{file}: not valid JSON ({e}); repair it, or save the tokenizer again"
        ) from e
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no JSON object; save the tokenizer again")
    return content


def chat_templates(folder: Path) -> dict[str, str]:
    """Name -> text of each template that has a file of its own."""
    found = [folder / CHAT, *sorted((folder / MORE_CHATS).glob("*.jinja"))]
    files = {
        path: path.relative_to(folder).as_posix()
        for path in found
        if path.is_file() and not leaves(path, folder)
    }
    return {name: path.read_text(encoding="utf-8") for path, name in files.items()}


def leaves(path: Path, folder: Path) -> bool:
    """Whether a link leads out of the folder. The hub's own cache links every file to another one
    of the same cache."""
    target = path.resolve()
    inside = target.is_relative_to(folder.resolve())
    return not inside and "blobs" not in target.parts


def ids_in(value: Any) -> tuple[int, ...]:
    """The ids that an eos_token_id names: one, several or none."""
    values = value if isinstance(value, list) else [value]
    return tuple(number for number in values if type(number) is int)


def starts_with(words: Words, bos_id: int | None) -> bool:
    """Whether the post-processor of a tokenizer.json puts this token before a text."""
    # of a text that is not empty: behind it the same token may be its EOS
    return bos_id is not None and words.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


def with_bos_rule(words: Words, bos: str, adds_bos: bool) -> Words:
    """A copy whose post-processor puts BOS before every text, or does not; what else it adds
    stays."""
    bos_id = words.token_to_id(bos) if bos else None
    if adds_bos == starts_with(words, bos_id):
        return words
    content = json.loads(words.to_str())
    steps = steps_of(content["post_processor"])
    if adds_bos and not any(step["type"] == TEMPLATE for step in steps):
        steps.append(
            {
                "type": TEMPLATE,
                "single": [text("A")],
                "pair": [text("A"), text("B")],
                "special_tokens": {},
            }
        )
    templates = [step for step in steps if step["type"] == TEMPLATE]
    for step in templates:
        for form in ("single", "pair"):
            step[form] = without_bos(step[form], bos)
    if adds_bos:  # one after another would each see what the one before added as a text of its own
        first = templates[0]
        first["single"] = [special(bos), *first["single"]]
        first["pair"] = with_bos_of_both(first["pair"], bos)
        first["special_tokens"][bos] = {"id": bos, "ids": [bos_id], "tokens": [bos]}
    content["post_processor"] = (
        steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}
    )
    return Words.from_str(json.dumps(content))


def steps_of(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a post-processor, as tokenizer.json has it; those of BERT and RoBERTa as the
    templates that they are."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [step for part in processor["processors"] for step in steps_of(part)]
    if processor["type"] not in ("BertProcessing", "RobertaProcessing"):
        return [dict(processor)]
    (cls, cls_id), (sep, sep_id) = processor["cls"], processor["sep"]
    between = [special(sep)] * (2 if processor["type"] == "RobertaProcessing" else 1)
    return [
        {
            "type": TEMPLATE,
            "single": [special(cls), text("A"), special(sep)],
            "pair": [special(cls), text("A"), *between, text("B"), special(sep)],
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]}
                for token, number in ((cls, cls_id), (sep, sep_id))
            },
        }
    ]


def special(token: str, type_id: int = 0) -> dict[str, Any]:
    """A token in a template."""
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def text(name: str) -> dict[str, Any]:
    """The place of a text in a template: A, or B of a pair."""
    return {"Sequence": {"id": name, "type_id": 0 if name == "A" else 1}}


def without_bos(parts: list[dict[str, Any]], bos: str) -> list[dict[str, Any]]:
    """The parts of a template without BOS before a text; the same token behind one may be its
    EOS."""
    kept: list[dict[str, Any]] = []
    is_at_start = True
    for part, following in zip(parts, [*parts[1:], {}]):
        is_at_start = is_at_start and "Sequence" not in part
        is_bos = part.get("SpecialToken", {}).get("id") == bos
        if not (is_bos and (is_at_start or "Sequence" in following)):
            kept.append(part)
    return kept


def with_bos_of_both(parts: list[dict[str, Any]], bos: str) -> list[dict[str, Any]]:
    """The parts of a pair's template with BOS at its beginning and before the second text."""
    with_bos = [special(bos)]
    for part in parts:
        sequence = part.get("Sequence", {})
        if sequence.get("id") == "B":
            with_bos.append(special(bos, sequence["type_id"]))
        with_bos.append(part)
    return with_bos


def written(carried: CarriedFiles, bos: str, eos: str, adds_bos: bool) -> dict[str, str]:
    """Name -> text of the files beside a tokenizer.json."""
    names = {"bos_token": bos, "eos_token": eos}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: word for name, word in names.items() if word} | carried.config
    if eos:
        config.setdefault("pad_token", eos)
    if bos:
        config["add_bos_token"] = adds_bos
    return {CONFIG: json.dumps(config, indent=1, ensure_ascii=False), **carried.files}


def generation_config(
    carried: CarriedFiles, bos_id: int | None, eos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    """generation_config.json of an export: what came along, and the ids of its own tokenizer."""
    ends = list(ends_of(carried, eos_id))
    ids = {
        "bos_token_id": bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad_id,
    }
    return {
        **carried.generation,
        **{name: value for name, value in ids.items() if value is not None},
    }


def ends_of(carried: CarriedFiles, eos_id: int | None) -> tuple[int, ...]:
    """Every id that ends a text."""
    if eos_id is None or eos_id in carried.ends:
        return carried.ends
    return (*carried.ends, eos_id) if carried.ends else (eos_id,)


def within(carried: CarriedFiles, vocab_size: int) -> CarriedFiles:
    """The same without ends that the vocabulary does not have."""
    return replace(
        carried, ends=tuple(number for number in carried.ends if 0 <= number < vocab_size)
    )
