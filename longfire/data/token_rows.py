"""Records of token ids (data.record_format = "tokens"), as other programs write them: a list of
ids, and perhaps a loss mask or labels.

    {"input_ids": [5, 6, 7, 2], "loss_mask": [0, 0, 1, 1]}
    {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]}      (the same)

Ids are taken as they are: nothing is put before or after a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from longfire.data.losses import Losses
from longfire.data.pack import NO_LABEL
from longfire.data.record_format import Content, Encoded, EndTokens, TokenRow
from longfire.data.records import missing_field, repeated_field
from longfire.data.token_bytes import record_bytes
from longfire.data.token_record import TokenRecord
from longfire.data.tokenizer import Tokenizer
from longfire.errors import DataError, SettingsError

LOSS_MASK = "loss_mask"  # fields that are read where a record has them
LABELS = "labels"
IDS_SETTING = "data.ids_field"


@dataclass(frozen=True)
class TokenRows:
    """ids_field: the field with the ids. document_end: the token after which a document ends, by
    its text: documents then continue from row to row until there is one. "": each row is one."""

    ids_field: str = "input_ids"
    document_end: str = ""

    name: ClassVar[str] = "tokens"
    cut_for_validation: ClassVar[bool] = True

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.ids_field, LOSS_MASK, LABELS)

    def options(self, tokenizer: Tokenizer) -> dict[str, object]:
        return {"record_format": [self.name, self.ids_field, self.end_id(tokenizer)]}

    def end_id(self, tokenizer: Tokenizer) -> int | None:
        """The id of document_end. Raises SettingsError where the tokenizer does not have it."""
        if not self.document_end:
            return None
        end_id: int | None = tokenizer.backend.token_to_id(self.document_end)
        if end_id is None:
            raise SettingsError(
                f"data.document_end = {self.document_end!r} is no token of the tokenizer "
                f"{tokenizer.where}: name one, as {tokenizer.eos or '<eos>'}, or leave it empty "
                "(each row is one document)"
            )
        return end_id

    def columns(self, file: Path | str, available: Sequence[str]) -> tuple[str, ...]:
        chosen = [field for field in self.fields if field in available]
        if self.ids_field not in chosen:
            problem = missing_field(self.ids_field, available, IDS_SETTING)
            raise DataError(f"{file}: {problem}")
        for field in chosen:
            times = available.count(field)
            if times > 1:
                raise DataError(f"{file}: {repeated_field(field, times, IDS_SETTING)}")
        return tuple(chosen)

    def content_of(self, record: object) -> tuple[Content, str]:
        if not isinstance(record, Mapping):
            return "", f"an object was expected, not {type(record).__name__}"
        if self.ids_field not in record:
            return "", missing_field(self.ids_field, record, IDS_SETTING)
        ids, problem = whole_numbers(record[self.ids_field], self.ids_field)
        if problem:
            return "", problem
        if len(ids) and ids.min() < 0:
            place = int(np.argmax(ids < 0))
            return "", f"{at(self.ids_field, place)} is {ids[place]}: an id is not negative"
        loss_mask, problem = loss_mask_of(record, ids)
        if problem:
            return "", problem
        return TokenRow(ids, loss_mask), ""

    def encode(
        self, content: Content, tokenizer: Tokenizer, ends: EndTokens
    ) -> tuple[Encoded | None, str]:
        assert isinstance(content, TokenRow)
        ids = content.ids
        outside = ids >= tokenizer.vocab_size
        if outside.any():
            place = int(np.argmax(outside))
            return None, (
                f"{at(self.ids_field, place)} is {ids[place]}, and the tokenizer "
                f"{tokenizer.where} has the ids 0 to {tokenizer.vocab_size - 1}: name the one "
                "that made these ids as tokenizer.path"
            )
        end_id = self.end_id(tokenizer)
        lengths = document_lengths(ids, end_id)
        is_open = end_id is not None and ids[-1] != end_id
        loss_mask = content.loss_mask
        if loss_mask is not None and loss_mask.all():
            loss_mask = None
        record = TokenRecord(ids.astype(tokenizer.dtype), lengths, loss_mask, bool(is_open))
        return Encoded(record, record_bytes(record, tokenizer), Losses()), ""


def at(field: str, place: int) -> str:
    """The begin of a message."""
    return f"position {place} (from 0) of {field!r}"


def whole_numbers(value: object, field: str) -> tuple[np.ndarray, str]:
    """(array, problem) of a field that holds a list of whole numbers."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "iu":
            return value, ""
        value = value.tolist()
    nothing = np.array([], np.int64)
    if not isinstance(value, list):
        return nothing, f"{field!r} holds {type(value).__name__}, not a list of whole numbers"
    for place, number in enumerate(value):
        if type(number) is not int:
            kind = "nothing" if number is None else f"{type(number).__name__} {number!r:.40}"
            return nothing, f"{at(field, place)} is {kind}, not a whole number"
    try:
        return np.array(value, np.int64), ""
    except OverflowError:
        return nothing, f"{field!r} holds a number of more than 64 bits"


def loss_mask_of(record: Mapping[str, object], ids: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(bool (N,) or None, problem): from the loss mask of a record, or else from its labels. Of two
    both must say the same."""
    masks: dict[str, np.ndarray] = {}
    for field in (LOSS_MASK, LABELS):
        if record.get(field) is None:
            continue
        value = record[field]
        if field == LOSS_MASK:
            value = as_integers(value)
        numbers, problem = whole_numbers(value, field)
        if problem:
            return None, problem
        if len(numbers) != len(ids):
            return None, f"{field!r} has {len(numbers)} entries for {len(ids)} ids"
        allowed = (numbers == 0) | (numbers == 1)
        meaning = "0 or 1"
        masks[field] = numbers == 1
        if field == LABELS:
            allowed = (numbers == ids) | (numbers == NO_LABEL)
            meaning = "-100 or the id at the same position (labels are not shifted)"
            masks[field] = numbers != NO_LABEL
        if not allowed.all():
            place = int(np.argmin(allowed))
            return None, f"{at(field, place)} is {numbers[place]}, not {meaning}"
    found = list(masks.values())
    if len(found) == 2 and not np.array_equal(found[0], found[1]):
        place = int(np.argmax(found[0] != found[1]))
        return None, f"{LOSS_MASK!r} and {LABELS!r} differ at position {place} (from 0)"
    return (found[0] if found else None), ""


def as_integers(value: object) -> object:
    """A mask may be written as true and false."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "b":
        return value.astype(np.int64)
    if isinstance(value, list) and all(type(entry) is bool for entry in value):
        return [int(entry) for entry in value]
    return value


def document_lengths(ids: np.ndarray, end_id: int | None) -> np.ndarray:
    """Tokens of each document in a row, int64 (D,): one ends after each `end_id`, and the last one
    with the row, unless it continues in the next one."""
    if end_id is None:
        return np.array([len(ids)], np.int64)
    ends = np.flatnonzero(ids == end_id) + 1
    if not len(ends) or ends[-1] != len(ids):
        ends = np.append(ends, len(ids))
    return np.diff(ends, prepend=0)
