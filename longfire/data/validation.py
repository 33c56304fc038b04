"""Which text of a source is held out of training: whole documents by a hash, or the tails of a few
long ones.

    validation_split = validation_split_of(source, fraction)
    train_text, validation_text = validation_split.parts(document)

The same documents give the same rule, whatever the number of processes.

Many documents: those whose identity hashes below the fraction. So few that none does: the one with
the lowest hash. Fewer than FEW_DOCUMENTS: the end of each, since a whole one would be too much.
Nothing is ever in both parts.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # not at run time: tokenizing processes start faster without them
    from longfire.data.formats import Document
    from longfire.data.text import Source

FEW_DOCUMENTS = 8  # fewer than so many are cut
CUT_CHARACTERS = 1000  # a shorter document is not cut
TAIL_CHARACTERS = 50_000  # a tail has at least so many,
TAIL_SHARE = 0.1  # if that is at most this share of the document
TAILS = (
    f"tails of at least {TAIL_CHARACTERS} characters or {TAIL_SHARE:g}"  # in the address of a store
)
LOOKED_AT = 10_000  # documents, of which one will have been held out, or of a larger source will be


def hash_of(identity: str) -> float:
    """A number from 0 to 1 that depends on the identity of a document alone (52 bits of a hash)."""
    return (
        int(blake2b(identity.encode(errors="surrogateescape"), digest_size=16).hexdigest()[:13], 16)
        / 2**52
    )


def held_out(identity: str, fraction: float) -> bool:
    """Whether a document is held out of training: by a hash of its identity alone, so whatever the
    order, the number of workers and how much of the source has been read."""
    return hash_of(identity) < fraction


@dataclass(frozen=True)
class ValidationSplit:
    """The rule for one source. lowest: the identity of the document that is held out since no hash
    is below the fraction; tails: the end of each document is held out instead."""

    fraction: float
    lowest: str = ""
    tails: bool = False

    def parts(self, document: "Document") -> tuple[str, str]:
        """The text to train on and the text that is held out; either may be empty."""
        text = document.text
        if self.tails:
            place = tail_of(text, self.fraction)
            return text[:place], text[place:]
        if document.identity == self.lowest or held_out(document.identity, self.fraction):
            return "", text
        return text, ""

    @property
    def options(self) -> dict[str, str]:
        """What the address of a token store says of it: nothing where the fraction says all."""
        if self.tails:
            return {"held_out": TAILS}
        return {"held_out": self.lowest} if self.lowest else {}


def tail_of(text: str, fraction: float) -> int:
    """Where the validation tail of a text begins: at the start of a line or word, if there is one
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


def validation_split_of(source: "Source", fraction: float) -> ValidationSplit:
    """The rule for a source; its documents are looked at until one is held out by its hash."""
    rule, lowest, count = ValidationSplit(fraction), (1.0, ""), 0
    for identity in source.identities() if fraction else ():
        count += 1
        lowest = min(lowest, (hash_of(identity), identity))
        if count > LOOKED_AT or (count >= FEW_DOCUMENTS and lowest[0] < fraction):
            return rule
    if 0 < count < FEW_DOCUMENTS:
        return ValidationSplit(fraction, tails=True)
    return ValidationSplit(fraction, lowest[1])
