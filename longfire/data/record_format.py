"""What the records of a source are (data.record_format): how one becomes content, and content
becomes tokens.

    record ──► content ──► tokens
    fields      text, ids,   ids, document ends,
                messages     loss mask

text (records.py), tokens (token_rows.py), fields (field_parts.py) and chat (chat.py) are the four.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from longfire.data.losses import Losses
from longfire.data.token_record import TokenRecord

if TYPE_CHECKING:
    from longfire.data.tokenizer import Tokenizer


class TextPart(NamedTuple):
    """A part of a document: a text, or the token `bos` or `eos`. in_loss: whether it is learned."""

    text: str
    token: str
    in_loss: bool


class TokenRow(NamedTuple):
    """Ids of a record (N,), and the loss mask bool (N,), if it has one."""

    ids: np.ndarray
    loss_mask: np.ndarray | None


class Chat(NamedTuple):
    """The messages of a record, each with `role` and `content`."""

    messages: tuple[Mapping[str, object], ...]


Content = str | tuple[TextPart, ...] | TokenRow | Chat


def text_of_content(content: Content) -> str:
    """The text that a tokenizer may be trained on; "" where there is none."""
    if isinstance(content, str):
        return content
    if isinstance(content, TokenRow):
        return ""
    if isinstance(content, Chat):
        return "\n".join(str(message.get("content") or "") for message in content.messages)
    return "\n".join(part.text for part in content if part.text)


def is_empty(content: Content) -> bool:
    """Whether there is nothing to learn from."""
    if isinstance(content, TokenRow):
        return not len(content.ids)
    if isinstance(content, Chat):
        return not content.messages
    return not text_of_content(content)


class Encoded(NamedTuple):
    """The tokens of documents; the bytes of the text of each, int64 (D,); and what the tokenizer
    lost of them."""

    record: TokenRecord
    text_bytes: np.ndarray
    losses: Losses


class EndTokens(NamedTuple):
    """The ids that are put before and after each document; None: nothing is."""

    bos: int | None
    eos: int | None


class RecordFormat(Protocol):
    """One of the formats. A frozen dataclass of its settings."""

    @property
    def name(self) -> str:
        """As data.record_format names it."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that are read, as far as the settings name them."""
        ...

    @property
    def cut_for_validation(self) -> bool:
        """Whether the end of a document can be kept for validation where there are few of them."""
        ...

    def options(self, tokenizer: "Tokenizer") -> dict[str, object]:
        """What it adds to the address of a token store."""
        ...

    def columns(self, file: Path | str, available: Sequence[str]) -> tuple[str, ...]:
        """The columns of a table that are read. Raises DataError where one is missing."""
        ...

    def content_of(self, record: object) -> tuple[Content, str]:
        """(content, problem) of a record."""
        ...

    def encode(
        self, content: Content, tokenizer: "Tokenizer", ends: EndTokens
    ) -> tuple[Encoded | None, str]:
        """(tokens, problem) of content. Raises SettingsError where the tokenizer lacks what the
        format needs."""
        ...
