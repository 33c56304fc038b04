"""Documents that are put together from several fields of a record, some of them without loss
(data.fields, or a field of each record: data.fields_from_record).

    [instruction+input],output

- Parts are separated by commas, and each is tokenized by itself.
- `+` joins fields to one part; data.field_separator stands between those that are not empty.
- What is inside [ ] is read and not learned: no loss on it.
- `<|bos|>` and `<|eos|>` are the tokenizer's tokens at this place.

The same notation as the text processor of Blockwise Parallel Transformers and RingAttention (Liu et
al. 2023, arXiv:2310.01889).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from longfire.data.record_format import Content, Encoded, EndTokens, TextPart
from longfire.data.records import as_text, missing_field, repeated_field
from longfire.data.token_record import document_record
from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError, SettingsError

END_TOKENS = {"<|bos|>": "bos", "<|eos|>": "eos"}


class FieldPart(NamedTuple):
    """Fields that are joined, or the token `bos` or `eos`. in_loss: whether the part is learned."""

    fields: tuple[str, ...]
    token: str
    in_loss: bool


@lru_cache(1024)
def parse_fields(notation: str) -> tuple[FieldPart, ...]:
    """The parts of a notation. Raises ValueError saying what is wrong with it."""
    parts = []
    is_inside = False
    for written in notation.split(","):
        word = written.strip()
        if word.startswith("["):
            if is_inside:
                raise ValueError("a bracket begins inside of another one")
            is_inside = True
            word = word[1:].strip()
        ends_here = is_inside and word.endswith("]")
        if ends_here:
            word = word[:-1].strip()
        parts.append(part_of(word, in_loss=not is_inside))
        if ends_here:
            is_inside = False
    if is_inside:
        raise ValueError("a bracket is not closed")
    return tuple(parts)


def part_of(word: str, in_loss: bool) -> FieldPart:
    """One part, without its brackets. Raises ValueError."""
    if word in END_TOKENS:
        return FieldPart((), END_TOKENS[word], in_loss)
    if word.startswith("<|") and word.endswith("|>"):
        raise ValueError(f"{word} is not one of {', '.join(END_TOKENS)}")
    if set(word) & set("[]"):
        raise ValueError(f"{word!r} has a bracket inside: brackets stand around whole parts")
    fields = tuple(name.strip() for name in word.split("+"))
    if not all(fields):
        raise ValueError(f"{word!r} names an empty field")
    return FieldPart(fields, "", in_loss)


@dataclass(frozen=True)
class FieldParts:
    """notation: the parts, the same for all records; or from_record: the field of each record that
    holds them. separator: between joined fields."""

    notation: str
    from_record: str
    separator: str

    name: ClassVar[str] = "fields"
    cut_for_validation: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises SettingsError."""
        if bool(self.notation) == bool(self.from_record):
            raise SettingsError(
                f"data.fields = {self.notation!r}, data.fields_from_record = "
                f"{self.from_record!r}: set one of them, as data.fields = "
                '"[instruction+input],output"'
            )
        if self.notation:
            try:
                parse_fields(self.notation)
            except ValueError as error:
                raise SettingsError(f"data.fields = {self.notation!r}: {error}") from error

    @property
    def fields(self) -> tuple[str, ...]:
        if self.from_record:
            return (self.from_record,)
        names: dict[str, None] = {}
        for part in parse_fields(self.notation):
            names |= dict.fromkeys(part.fields)
        return tuple(names)

    @property
    def setting(self) -> str:
        """The setting that names the fields."""
        return "data.fields_from_record" if self.from_record else "data.fields"

    def options(self, tokenizer: Tokenizer) -> dict[str, object]:
        made_from = [self.name, self.notation, self.from_record, self.separator]
        return {"record_format": made_from}

    def columns(self, file: Path | str, available: Sequence[str]) -> tuple[str, ...]:
        for field in self.fields:
            if field not in available:
                raise DataError(f"{file}: {missing_field(field, available, self.setting)}")
            times = available.count(field)
            if times > 1:
                raise DataError(f"{file}: {repeated_field(field, times, self.setting)}")
        if self.from_record:  # any field may be named in a record
            return tuple(dict.fromkeys(available))
        return self.fields

    def content_of(self, record: object) -> tuple[Content, str]:
        if not isinstance(record, Mapping):
            return "", f"an object was expected, not {type(record).__name__}"
        notation = self.notation
        if self.from_record:
            if self.from_record not in record:
                return "", missing_field(self.from_record, record, self.setting)
            notation, problem = as_text(record[self.from_record])
            if problem or not notation:
                return "", problem or f"the field {self.from_record!r} is empty"
        try:
            parts = parse_fields(notation)
        except ValueError as error:
            return "", f"{self.from_record!r} = {notation!r}: {error}"
        content = []
        for part in parts:
            text, problem = self.joined(record, part.fields)
            if problem:
                return "", problem
            content.append(TextPart(text, part.token, part.in_loss))
        return tuple(content), ""

    def joined(self, record: Mapping[str, object], fields: tuple[str, ...]) -> tuple[str, str]:
        """(text, problem) of the fields of one part."""
        texts = []
        for field in fields:
            if field not in record:
                return "", missing_field(field, record, self.setting)
            text, problem = as_text(record[field])
            if problem:
                return "", f"{field!r}: {problem}"
            if text:
                texts.append(text)
        return self.separator.join(texts), ""

    def encode(
        self, content: Content, tokenizer: Tokenizer, ends: EndTokens
    ) -> tuple[Encoded | None, str]:
        """BOS of tokenizer.add_bos is not learned, EOS of tokenizer.add_eos is."""
        assert isinstance(content, tuple)
        texts = [part.text for part in content if isinstance(part, TextPart) and part.text]
        encoded = tokenizer.arrays(texts)
        waiting = iter(encoded)
        pieces: list[np.ndarray] = []
        masks: list[np.ndarray] = []

        def append(ids: np.ndarray, in_loss: bool) -> None:
            pieces.append(ids)
            masks.append(np.full(len(ids), in_loss))

        if ends.bos is not None:
            append(np.array([ends.bos], tokenizer.dtype), False)
        for part in content:
            assert isinstance(part, TextPart)
            if part.token:
                append(np.array([end_token(part.token, tokenizer)], tokenizer.dtype), part.in_loss)
            elif part.text:
                append(next(waiting), part.in_loss)
        if ends.eos is not None:
            append(np.array([ends.eos], tokenizer.dtype), True)
        loss_mask = np.concatenate(masks)
        record = document_record(np.concatenate(pieces), None if loss_mask.all() else loss_mask)
        text_bytes = np.array([sum(len(text.encode()) for text in texts)], np.int64)
        return Encoded(record, text_bytes, tokenizer.losses_of(texts, encoded)), ""


def end_token(name: str, tokenizer: Tokenizer) -> int:
    """The id of `bos` or `eos`. Raises SettingsError where the tokenizer has none."""
    token = tokenizer.bos_id if name == "bos" else tokenizer.eos_id
    if token is None:
        raise SettingsError(
            f"data.fields has <|{name}|>, and the tokenizer {tokenizer.where} has no {name} token: "
            f"leave it out, or name its {name}_token in a tokenizer_config.json beside it"
        )
    return token
