"""Conversations (data.record_format = "chat"), with loss on the turns of the assistant only.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}

The tokenizer's chat template writes the text. It is Jinja in a sandbox, as transformers runs it:
it can compute a text and reach nothing else. What is learned of a turn of the assistant is what a
model would have to write: from where the template asks for an answer (add_generation_prompt) to
where it ends the turn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NoReturn

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from longfire.data.losses import Losses
from longfire.data.manifest import checksum
from longfire.data.record_format import Chat, Content, Encoded, EndTokens
from longfire.data.records import as_text, missing_field, repeated_field
from longfire.data.token_bytes import byte_lengths
from longfire.data.token_record import document_record
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokenizer_files import CHAT
from longfire.errors import DataError, SettingsError, first_line

MESSAGES_SETTING = "data.messages_field"
ASSISTANT = "assistant"
# What a template can raise, written by anybody: errors of Jinja, and of Python inside a template.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


@dataclass(frozen=True)
class Chats:
    """messages_field: the field with the messages of a record."""

    messages_field: str = "messages"

    name: ClassVar[str] = "chat"
    cut_for_validation: ClassVar[bool] = False

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.messages_field,)

    def options(self, tokenizer: Tokenizer) -> dict[str, object]:
        template = checksum(template_of(tokenizer).encode())
        return {"record_format": [self.name, self.messages_field, template]}

    def columns(self, file: Path | str, available: Sequence[str]) -> tuple[str, ...]:
        field = self.messages_field
        if field not in available:
            raise DataError(f"{file}: {missing_field(field, available, MESSAGES_SETTING)}")
        times = available.count(field)
        if times > 1:
            raise DataError(f"{file}: {repeated_field(field, times, MESSAGES_SETTING)}")
        return (field,)

    def content_of(self, record: object) -> tuple[Content, str]:
        if not isinstance(record, Mapping):
            return "", f"an object was expected, not {type(record).__name__}"
        if self.messages_field not in record:
            return "", missing_field(self.messages_field, record, MESSAGES_SETTING)
        messages = record[self.messages_field]
        if not isinstance(messages, list):
            return "", f"{self.messages_field!r} holds {type(messages).__name__}, not messages"
        checked = []
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                return "", f"message {number} is no object with a `role`"
            if not isinstance(message.get("content"), str):
                return "", f"message {number} has no text as its `content`"
            _, problem = as_text(message["content"])
            if problem:
                return "", f"`content` of message {number}: {problem}"
            # a table has every key in every row, with null where a message has none
            checked.append({key: value for key, value in message.items() if value is not None})
        return Chat(tuple(checked)), ""

    def encode(
        self, content: Content, tokenizer: Tokenizer, ends: EndTokens
    ) -> tuple[Encoded | None, str]:
        """The template has the tokens at the ends of a conversation: `ends` are not added."""
        assert isinstance(content, Chat)
        return chat_encoder(tokenizer).encode(content)


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template of a tokenizer. Raises SettingsError where it has none."""
    template = tokenizer.carried.files.get(CHAT)
    if template is None:
        template = default_of(tokenizer.carried.config.get("chat_template"))
    if template is None:
        raise SettingsError(
            f'data.record_format = "chat": the tokenizer {tokenizer.where} has no chat template; '
            f"put one beside its tokenizer.json as {CHAT}, or name another in tokenizer.path"
        )
    return template


def default_of(templates: object) -> str | None:
    """The template of this name among several, as tokenizer_config.json lists them."""
    if not isinstance(templates, list):
        return None
    for named in templates:
        if isinstance(named, Mapping) and named.get("name") == "default":
            template = named.get("template")
            return template if isinstance(template, str) else None
    return None


@lru_cache(4)
def chat_encoder(tokenizer: Tokenizer) -> "ChatEncoder":
    """Made once for each tokenizer."""
    return ChatEncoder(tokenizer)


class ChatEncoder:
    """Encodes conversations with a tokenizer and its chat template. Raises SettingsError for a
    template that cannot be read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # In what a template writes, special tokens are tokens.
        self.backend = Backend.from_str(tokenizer.backend.to_str())
        self.backend.encode_special_tokens = False
        self.special: list[str] = []
        for token in self.backend.get_added_tokens_decoder().values():
            if token.special:
                self.special.append(token.content)
        try:
            self.template = sandbox().from_string(template_of(tokenizer))
        except jinja2.TemplateError as error:
            raise SettingsError(
                f"the chat template of the tokenizer {tokenizer.where} cannot be read "
                f"({first_line(error)}); correct {CHAT} beside its tokenizer.json"
            ) from error
        # transformers gives both of these, and templates test them for none
        self.names: dict[str, object] = {"tools": None, "documents": None}
        self.names |= {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        for key, value in tokenizer.carried.config.items():
            if key.endswith("_token") and isinstance(value, str):
                self.names.setdefault(key, value)

    def encode(self, chat: Chat) -> tuple[Encoded | None, str]:
        """(tokens, problem) of a conversation."""
        problem = self.special_token_in(chat)
        if problem:
            return None, problem
        try:
            text = self.render(chat.messages)
            spans = list(self.answers(chat.messages, text))
        except TEMPLATE_ERRORS as error:
            return None, f"the chat template does not take it: {first_line(error)}"
        _, problem = as_text(text)
        if problem:
            return None, f"what the chat template writes: {problem}"
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, self.tokenizer.dtype)
        if not len(ids):
            return None, "the chat template writes nothing for it"
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        loss_mask = np.zeros(len(ids), bool)
        for start, stop in spans:
            # a token that begins before the answer and reaches into it is learned too
            loss_mask |= (places[:, 1] > start) & (places[:, 0] < stop)
        text_bytes = byte_lengths(self.tokenizer)[ids].sum(keepdims=True)
        record = document_record(ids, None if loss_mask.all() else loss_mask)
        return Encoded(record, text_bytes, self.losses_of(chat)), ""

    def losses_of(self, chat: Chat) -> Losses:
        """What the tokenizer loses of the texts of the messages."""
        if self.tokenizer.loses_nothing:
            return Losses()
        texts = [str(message["content"]) for message in chat.messages]
        return self.tokenizer.losses_of(texts, self.tokenizer.arrays(texts))

    def render(self, messages: Sequence[Mapping[str, object]], asks: bool = False) -> str:
        """The text of messages. asks: with the beginning of the assistant's next turn."""
        return self.template.render(
            messages=list(messages), add_generation_prompt=asks, **self.names
        )

    def answers(
        self, messages: Sequence[Mapping[str, object]], text: str
    ) -> Iterator[tuple[int, int]]:
        """[start, stop) in the text of each turn of the assistant. Raises ValueError where the
        template writes a turn otherwise when others follow it."""
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked = self.render(messages[:number], asks=True)
            answered = self.render(messages[: number + 1])
            if not (text.startswith(answered) and answered.startswith(asked)):
                raise ValueError(
                    f"message {number + 1} is written otherwise when it is the last one, so where "
                    "the answer begins and ends is not known"
                )
            yield len(asked), len(answered)

    def special_token_in(self, chat: Chat) -> str:
        """Which message holds a special token as text, which the tokenizer would take for the token
        itself; "" if none does."""
        for number, message in enumerate(chat.messages, 1):
            for key, value in message.items():
                for token in self.special:
                    if token in str(value):
                        return (
                            f"`{key}` of message {number} holds {token!r}, which is a special "
                            "token of the tokenizer"
                        )
        return ""


class GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`, with which some templates mark answers: what is
    inside is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def sandbox() -> ImmutableSandboxedEnvironment:
    """What a chat template may use, as in transformers. Without the time of day (strftime_now),
    which would make other tokens of the same record: templates ask whether it is there."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = json_text
    environment.globals["raise_exception"] = refuse
    return environment


def json_text(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, as in transformers: that of Jinja escapes `<`, `>`, `&` and `'`, as HTML
    needs it."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def refuse(message: str) -> NoReturn:
    """What a template calls for messages that it does not take."""
    raise jinja2.TemplateError(message)
