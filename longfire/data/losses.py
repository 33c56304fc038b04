"""What of a text a tokenizer cannot say: characters that no token covers, or that become its
unknown token.

A tokenizer with a token for each byte loses nothing, and is not looked at. Of others the unknown
tokens and the documents without any token are counted, and which characters are lost in a sample
of each chunk of documents.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Words

SAMPLE_CHARACTERS = 2**15  # of a chunk, which has 2^20: 3% more work
OF_A_DOCUMENT = 2000  # characters at most
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
    sampled_characters: int = 0  # without white space
    lost_characters: int = 0  # of these

    def __add__(self, other: "Losses") -> "Losses":
        mine, theirs = self.counts(), other.counts()
        return Losses(*(a + b for a, b in zip(mine, theirs)))

    def counts(self) -> tuple[int, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def share(self) -> float:
        """Of the characters, how many are lost."""
        return self.lost_characters / self.sampled_characters if self.sampled_characters else 0.0

    def describe(self) -> str:
        return (
            f"the tokenizer cannot say {self.share:.2%} of the characters ({self.unknown_tokens:,} unknown tokens, "
            f"{self.empty_encodings:,} documents without any token)"
        )


def loses_nothing(words: Words) -> bool:
    """Whether a tokenizer gives every byte of a text back."""
    ids = words.encode(PROBE, add_special_tokens=False).ids
    return words.decode(ids, skip_special_tokens=False) == PROBE


def unknown_id(words: Words) -> int | None:
    """The id of the token that stands for whatever a tokenizer does not know; None if it has
    none."""
    model = json.loads(words.to_str())["model"]
    if model.get("unk_id") is not None:  # Unigram
        return model["unk_id"]
    return words.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def losses_of(
    words: Words, unknown: int | None, texts: Sequence[str], encoded: Sequence[np.ndarray]
) -> Losses:
    """What is lost of some texts, whose ids are `encoded`. unknown: `unknown_id` of the
    tokenizer."""
    unknown_tokens = 0 if unknown is None else sum(int((ids == unknown).sum()) for ids in encoded)
    empty = sum(not len(ids) and bool(text.strip()) for text, ids in zip(texts, encoded))
    sampled = sample_of(texts)
    lost = [
        lost_characters(text, one, unknown)
        for text, one in zip(sampled, encodings_of(words, sampled))
    ]
    characters = sum(len(text) - sum(map(str.isspace, text)) for text in sampled)
    return Losses(unknown_tokens, empty, characters, sum(lost))


def sample_of(texts: Sequence[str]) -> list[str]:
    """The beginnings of some documents, from all over the chunk."""
    each = max(1, min(OF_A_DOCUMENT, SAMPLE_CHARACTERS // max(len(texts), 1)))
    if each < 64 and len(texts) > SAMPLE_CHARACTERS // 64:  # many short documents: some of them
        texts = texts[:: -(-len(texts) * 64 // SAMPLE_CHARACTERS)]
        each = 64
    return [text[:each] for text in texts]


def encodings_of(words: Words, texts: Sequence[str]) -> list[Encoding]:
    """With the places of tokens in the texts, which the fast encoding leaves out."""
    return words.encode_batch(list(texts), add_special_tokens=False)


def lost_characters(text: str, encoding: Encoding, unknown: int | None) -> int:
    """Characters, without white space, that no token but the unknown one covers.

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
    """Whether characters are a longer way to write one: a letter and its accents, a syllable of
    Hangul."""
    return len(text) <= MOST_COMPOSED and len(unicodedata.normalize("NFC", text)) == 1
