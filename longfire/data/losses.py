"""The text that a tokenizer loses: characters that no token covers, or that become its unknown
token.

A tokenizer with a token for each byte loses nothing, and is not examined. For others three things
are counted: unknown tokens, documents without any token, and lost characters in a sample of each
chunk of documents.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

SAMPLE_CHARACTERS = 2**15  # of a chunk, which has 2^20: 3% more work
DOCUMENT_CHARACTERS = 2000  # of a document at most
MIN_CHARACTERS = 64  # of a document at least, if it has them
MOST_COMPOSED = 4  # characters that one can be written as
# Every byte of UTF-8 that the beginning or the middle of a character can be: U+0000 to U+07FF, and
# one character for each later lead byte.
PROBE = "".join(map(chr, range(0x800))) + "".join(chr(0x1000 * i + 0xF) for i in range(1, 16))
PROBE += "\u0800\U00010000" + "".join(chr(0x40000 * i + 0x3F) for i in range(1, 5))


@dataclass(frozen=True)
class Losses:
    """Counted over documents; they add up."""

    unknown_tokens: int = 0
    empty_encodings: int = 0  # documents with text and without a token
    sampled_characters: int = 0  # white space is not counted
    lost_characters: int = 0  # of these

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(
            self.unknown_tokens + other.unknown_tokens,
            self.empty_encodings + other.empty_encodings,
            self.sampled_characters + other.sampled_characters,
            self.lost_characters + other.lost_characters,
        )

    def counts(self) -> tuple[int, ...]:
        """The four numbers, as a manifest keeps them."""
        return (
            self.unknown_tokens,
            self.empty_encodings,
            self.sampled_characters,
            self.lost_characters,
        )

    @property
    def share(self) -> float:
        """The lost part of the sampled characters, from 0 to 1."""
        if not self.sampled_characters:
            return 0.0
        return self.lost_characters / self.sampled_characters

    def describe(self) -> str:
        return (
            f"the tokenizer loses {self.share:.2%} of the characters ({self.unknown_tokens:,} "
            f"unknown tokens, {self.empty_encodings:,} documents without any token)"
        )


def loses_nothing(backend: Backend) -> bool:
    """Whether a tokenizer can reproduce every byte of a text."""
    ids = backend.encode(PROBE, add_special_tokens=False).ids
    return backend.decode(ids, skip_special_tokens=False) == PROBE


def unknown_id(backend: Backend) -> int | None:
    """The id of the token for all text that a tokenizer does not know; None if it has none."""
    model = json.loads(backend.to_str())["model"]
    if model.get("unk_id") is not None:  # Unigram
        return model["unk_id"]
    if model.get("unk_token"):
        return backend.token_to_id(model["unk_token"])
    return None


def losses_of(
    backend: Backend, unknown: int | None, texts: Sequence[str], encoded: Sequence[np.ndarray]
) -> Losses:
    """What is lost of some texts, whose ids are `encoded`. unknown: `unknown_id` of the
    tokenizer."""
    unknown_tokens = 0
    empty_encodings = 0
    for text, ids in zip(texts, encoded):
        if unknown is not None:
            unknown_tokens += int((ids == unknown).sum())
        if not len(ids) and text.strip():
            empty_encodings += 1
    sampled = 0
    lost = 0
    sample = sample_of(texts)
    for text, encoding in zip(sample, encodings_of(backend, sample)):
        sampled += len(text) - sum(map(str.isspace, text))
        lost += lost_characters(text, encoding, unknown)
    return Losses(unknown_tokens, empty_encodings, sampled, lost)


def sample_of(texts: Sequence[str]) -> list[str]:
    """The beginnings of some documents, from all over the chunk."""
    size = max(1, min(DOCUMENT_CHARACTERS, SAMPLE_CHARACTERS // max(len(texts), 1)))
    if size < MIN_CHARACTERS and len(texts) > SAMPLE_CHARACTERS // MIN_CHARACTERS:
        # many short documents: take only some of them
        size = MIN_CHARACTERS
        step = -(-len(texts) * size // SAMPLE_CHARACTERS)
        texts = texts[::step]
    return [text[:size] for text in texts]


def encodings_of(backend: Backend, texts: Sequence[str]) -> list[Encoding]:
    """With the places of tokens in the texts, which the fast encoding leaves out."""
    return backend.encode_batch(list(texts), add_special_tokens=False)


def lost_characters(text: str, encoding: Encoding, unknown: int | None) -> int:
    """How many characters, without white space, no token covers except the unknown one.

    Where a normalizer composes characters (NFC), the token covers only the first one of them; the
    others are not lost.
    """
    covered = np.zeros(len(text), bool)
    for number, (start, stop) in zip(encoding.ids, encoding.offsets):
        if number != unknown:
            covered[start:stop] = True
    lost = 0
    first = 0  # the last character that is covered
    for place, (is_covered, character) in enumerate(zip(covered.tolist(), text)):
        if is_covered:
            first = place
        elif not character.isspace():
            lost += not (covered[first] and is_one_character(text[first : place + 1]))
    return lost


def is_one_character(text: str) -> bool:
    """Whether several characters are a way to write one: a letter and its accents, a syllable of
    Hangul."""
    return len(text) <= MOST_COMPOSED and len(unicodedata.normalize("NFC", text)) == 1
