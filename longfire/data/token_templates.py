"""The post-processor of a tokenizer.json: templates of the tokens that it adds to a text."""

import json
from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

from tokenizers import Tokenizer as Backend

TEMPLATE = "TemplateProcessing"


class SpecialTokenPart(TypedDict):
    id: str
    type_id: int


class SequencePart(TypedDict):
    id: str
    type_id: int


class Part(TypedDict, total=False):
    """A part of a template has one of the two keys."""

    SpecialToken: SpecialTokenPart
    Sequence: SequencePart


class SpecialToken(TypedDict):
    id: str
    ids: list[int]
    tokens: list[str]


class Step(TypedDict):
    """A step of a post-processor; one of another type than TEMPLATE has other keys."""

    type: str
    single: NotRequired[list[Part]]
    pair: NotRequired[list[Part]]
    special_tokens: NotRequired[dict[str, SpecialToken]]
    processors: NotRequired[list["Step"]]
    cls: NotRequired[tuple[str, int]]
    sep: NotRequired[tuple[str, int]]


def starts_with(backend: Backend, bos_id: int | None) -> bool:
    """Whether the post-processor of a tokenizer.json puts this token before a text."""
    if bos_id is None:
        return False
    # of a text that is not empty: without text, the first token may be the EOS
    return backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


def with_bos_rule(backend: Backend, bos: str, adds_bos: bool) -> Backend:
    """A copy whose post-processor puts BOS before every text, or does not. What else it adds
    stays."""
    bos_id = backend.token_to_id(bos) if bos else None
    if adds_bos == starts_with(backend, bos_id):
        return backend
    content = json.loads(backend.to_str())
    steps = steps_of(content["post_processor"])
    templates = [step for step in steps if step["type"] == TEMPLATE]
    if adds_bos and not templates:
        templates.append(template([text_part("A")], [text_part("A"), text_part("B")], {}))
        steps += templates
    for step in templates:
        step["single"] = without_bos(step["single"], bos)
        step["pair"] = without_bos(step["pair"], bos)
    if adds_bos:
        assert bos_id is not None, "a tokenizer without BOS cannot add it"
        # only the first: each later one would take the token for a text of its own
        first = templates[0]
        first["single"] = [token_part(bos), *first["single"]]
        first["pair"] = with_bos_of_both(first["pair"], bos)
        first["special_tokens"][bos] = special_token(bos, bos_id)
    content["post_processor"] = {"type": "Sequence", "processors": steps}
    if len(steps) == 1:
        content["post_processor"] = steps[0]
    return Backend.from_str(json.dumps(content))


def steps_of(processor: Step | None) -> list[Step]:
    """The steps of a post-processor of tokenizer.json; those of BERT and RoBERTa as the templates
    that they stand for."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        steps = []
        for part in processor["processors"]:
            steps += steps_of(part)
        return steps
    if processor["type"] not in ("BertProcessing", "RobertaProcessing"):
        return [processor]
    cls, cls_id = processor["cls"]
    sep, sep_id = processor["sep"]
    between = [token_part(sep)]
    if processor["type"] == "RobertaProcessing":
        between.append(token_part(sep))
    single = [token_part(cls), text_part("A"), token_part(sep)]
    pair = [token_part(cls), text_part("A"), *between, text_part("B"), token_part(sep)]
    tokens = {cls: special_token(cls, cls_id), sep: special_token(sep, sep_id)}
    return [template(single, pair, tokens)]


def template(single: list[Part], pair: list[Part], tokens: dict[str, SpecialToken]) -> Step:
    return {"type": TEMPLATE, "single": single, "pair": pair, "special_tokens": tokens}


def special_token(token: str, number: int) -> SpecialToken:
    """The entry of a template's table of tokens."""
    return {"id": token, "ids": [number], "tokens": [token]}


def token_part(token: str, type_id: int = 0) -> Part:
    """A token in a template."""
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def text_part(name: Literal["A", "B"]) -> Part:
    """The place of a text in a template: A, or B of a pair."""
    type_id = 0 if name == "A" else 1
    return {"Sequence": {"id": name, "type_id": type_id}}


def without_bos(parts: Sequence[Part], bos: str) -> list[Part]:
    """The parts of a template without BOS before a text. The same token after a text may be its
    EOS, and stays."""
    kept: list[Part] = []
    is_at_start = True
    for place, part in enumerate(parts):
        is_at_start = is_at_start and "Sequence" not in part
        is_bos = "SpecialToken" in part and part["SpecialToken"]["id"] == bos
        is_before_text = place + 1 < len(parts) and "Sequence" in parts[place + 1]
        if not (is_bos and (is_at_start or is_before_text)):
            kept.append(part)
    return kept


def with_bos_of_both(parts: Sequence[Part], bos: str) -> list[Part]:
    """The parts of a pair's template with BOS at its beginning and before the second text."""
    with_bos = [token_part(bos)]
    for part in parts:
        if "Sequence" in part and part["Sequence"]["id"] == "B":
            with_bos.append(token_part(bos, part["Sequence"]["type_id"]))
        with_bos.append(part)
    return with_bos
