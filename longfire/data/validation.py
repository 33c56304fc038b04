"""Which text of a source is kept for validation: whole documents by a hash, or the ends of a few
long ones.

    validation_split = validation_split_of(source, fraction)
    train_text, validation_text = validation_split.parts(document)

The same documents give the same rule, whatever the number of processes.

With data.validation_seed: the documents that train_test_split of the `datasets` library draws by
their numbers, so that a model can be compared with one that was evaluated on these.

Many documents: those whose identity hashes below the fraction. If none does: the one with the
lowest hash. Fewer than FEW_DOCUMENTS: the end of each, since a whole one would be too much.
No text is ever in both parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from longfire.data.documents import Document, Source
from longfire.data.losses import Losses
from longfire.data.record_format import Encoded
from longfire.data.token_bytes import record_bytes
from longfire.data.tokenizer import Tokenizer

FEW_DOCUMENTS = 8  # fewer than this: the end of each is kept
CUT_CHARACTERS = 1000  # a shorter document is not cut
TAIL_CHARACTERS = 50_000  # the end of a document has at least so many characters,
TAIL_SHARE = 0.1  # if that is at most this share of the document
CHARACTERS_A_TOKEN = 4  # of records of ids
# In the address of a store:
TAILS = f"tails of at least {TAIL_CHARACTERS} characters or {TAIL_SHARE:g}"
# Identities that are hashed to find the rule. Of more documents than this one will have a hash
# below the fraction.
HASHED_DOCUMENTS = 10_000


def hash_of(identity: str) -> float:
    """A number from 0 to 1 that depends on the identity of a document alone (52 bits of a hash)."""
    digest = blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return int(digest[:13], 16) / 2**52


def kept_records(identities: Sequence[str], fraction: float) -> np.ndarray:
    """Which of some records are kept for validation, bool (N,): those whose identity hashes below
    the fraction, and at least the one with the lowest hash; none where the fraction is 0."""
    hashes_N = np.array([hash_of(identity) for identity in identities])
    is_kept_N = hashes_N < fraction
    if fraction and len(hashes_N):
        is_kept_N[hashes_N.argmin()] = True
    return is_kept_N


def is_validation(identity: str, fraction: float) -> bool:
    """Whether a document is kept for validation: by a hash of its identity alone. So it does not
    depend on the order, the number of workers and how much of the source has been read."""
    return hash_of(identity) < fraction


@dataclass(frozen=True)
class ValidationSplit:
    """The rule for one source.

    lowest: the identity of the document that is kept because no hash is below the fraction.
    tails: the end of each document is kept instead. seed, drawn: of data.validation_seed, and the
    identities of the documents that it draws; -1 and none without it.
    """

    fraction: float
    lowest: str = ""
    tails: bool = False
    seed: int = -1
    drawn: frozenset[str] = field(default=frozenset(), repr=False)

    def keeps(self, identity: str) -> bool:
        """Whether a document is kept for validation as a whole."""
        if self.seed >= 0:
            return identity in self.drawn
        return identity == self.lowest or is_validation(identity, self.fraction)

    def parts(self, document: Document) -> tuple[str, str]:
        """The text to train on and the text for validation; either may be empty."""
        text = document.text
        if self.tails:
            place = tail_start(text, self.fraction)
            return text[:place], text[place:]
        if self.keeps(document.identity):
            return "", text
        return text, ""

    def record_parts(
        self, identity: str, encoded: Encoded, tokenizer: Tokenizer
    ) -> list[tuple[Encoded, bool]]:
        """The tokens of a record, and whether they are for validation; or both parts of it."""
        if not self.tails:
            return [(encoded, self.keeps(identity))]
        record = encoded.record
        place = token_tail_start(len(record.ids), self.fraction)
        if place == len(record.ids):
            return [(encoded, False)]
        if place == 0:  # a fraction of nearly 1
            return [(encoded, True)]
        parts = []
        for part, kept in zip(record.cut(place), (False, True)):
            parts.append((Encoded(part, record_bytes(part, tokenizer), Losses()), kept))
        return parts

    @property
    def options(self) -> dict[str, str]:
        """What the rule adds to the address of a token store: nothing where the fraction alone
        decides."""
        if self.seed >= 0:
            return {"held_out": f"train_test_split, seed {self.seed}"}
        if self.tails:
            return {"held_out": TAILS}
        if self.lowest:
            return {"held_out": self.lowest}
        return {}


def tail_start(text: str, fraction: float) -> int:
    """Where the validation part of a text begins: at the start of a line or word, if there is one
    nearby."""
    if len(text) < CUT_CHARACTERS:
        return len(text)
    size = max(round(fraction * len(text)), min(TAIL_CHARACTERS, round(TAIL_SHARE * len(text))))
    place = len(text) - size
    for mark in ("\n", " "):
        near = text.find(mark, place, place + size // 2)
        if near >= 0:
            return near + 1
    return place


def token_tail_start(tokens: int, fraction: float) -> int:
    """Where the validation part of a record of so many tokens begins."""
    if tokens * CHARACTERS_A_TOKEN < CUT_CHARACTERS:
        return tokens
    least = min(TAIL_CHARACTERS // CHARACTERS_A_TOKEN, round(TAIL_SHARE * tokens))
    return tokens - max(round(fraction * tokens), least)


def validation_split_of(source: Source, fraction: float, seed: int = -1) -> ValidationSplit:
    """The rule for a source. Its documents are hashed until one is below the fraction; with a seed
    they are counted."""
    by_hash = ValidationSplit(fraction)
    if not fraction:
        return by_hash
    if seed >= 0:
        return ValidationSplit(fraction, seed=seed, drawn=drawn_of(source, fraction, seed))
    lowest_hash = 1.0
    lowest = ""
    count = 0
    for identity in source.identities():
        count += 1
        lowest_hash, lowest = min((lowest_hash, lowest), (hash_of(identity), identity))
        if count > HASHED_DOCUMENTS or (count >= FEW_DOCUMENTS and lowest_hash < fraction):
            return by_hash
    if 0 < count < FEW_DOCUMENTS and source.record_format.cut_for_validation:
        return ValidationSplit(fraction, tails=True)
    return ValidationSplit(fraction, lowest)


def drawn_of(source: Source, fraction: float, seed: int) -> frozenset[str]:
    """The identities of the documents that `datasets.train_test_split(test_size=fraction,
    seed=seed, shuffle=True)` puts into its test part. Empty documents count, as they do there."""
    count = sum(1 for _ in source.numbered())
    numbers = set(drawn_numbers(count, fraction, seed).tolist())
    drawn = set()
    for number, identity in enumerate(source.numbered()):
        if number in numbers:
            drawn.add(identity)
    return frozenset(drawn)


def drawn_numbers(count: int, fraction: float, seed: int) -> np.ndarray:
    """The numbers of the documents, of `count`, in the test part of train_test_split."""
    permutation = np.random.default_rng(seed).permutation(count)
    return permutation[: math.ceil(fraction * count)]
