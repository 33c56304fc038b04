"""The tokenizer that the settings name: `train` makes a byte-level BPE of the data, all others are
found (tokenizer_sources.py)."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from longfire.config import settings
from longfire.data.documents import Source
from longfire.data.manifest import checksum, locked
from longfire.data.records import Texts
from longfire.data.tokenizer import (
    MIN_VOCAB_SIZE,
    Tokenizer,
    check_ends,
    find_tokenizer,
    from_folder,
    train_tokenizer,
)
from longfire.data.tokenizer_files import CONFIG
from longfire.data.validation import ValidationSplit, validation_split_of
from longfire.errors import DataError, SettingsError

logger = logging.getLogger(__name__)

SAMPLE_PARTS = 64  # a sample to train on comes from at least so many files, if there are


def load(
    wanted: settings.Tokenizer,
    sources: Sequence[Source],
    shares: Sequence[float],
    data: settings.Data,
) -> Tokenizer:
    """The tokenizer that the settings name; `train` makes it from the sources, once.

    Raises DataError naming file and fix; also when add_bos or add_eos asks for a token that it does
    not have.
    """
    if wanted.path == "train":
        tokenizer = trained(wanted, sources, shares, data)
    else:
        tokenizer = find_tokenizer(wanted.path)
    check_ends(tokenizer, wanted)
    return tokenizer


def trained(
    wanted: settings.Tokenizer,
    sources: Sequence[Source],
    shares: Sequence[float],
    data: settings.Data,
) -> Tokenizer:
    """`train`: kept beside the token stores, under the address of what it was made from. Raises
    SettingsError and DataError."""
    if wanted.train_vocab_size < MIN_VOCAB_SIZE:
        raise SettingsError(
            f"tokenizer.train_vocab_size = {wanted.train_vocab_size}: at least {MIN_VOCAB_SIZE}, "
            "the bytes and two ends"
        )
    for source in sources:
        if source.record_format.name in ("tokens", "chat"):
            raise SettingsError(
                f"tokenizer.path = train: {source.entry} is read as {source.record_format.name} "
                "(data.record_format), which takes the tokenizer that its ids or its chat template "
                "belong to: name that one"
            )
    splits = []
    for source in sources:
        splits.append(validation_split_of(source, data.validation_fraction, data.validation_seed))
    address = address_of(wanted, sources, shares, splits, data)
    folder = Path(data.folder) / f"tokenizer-{address}"
    with locked(folder):
        if not (folder / CONFIG).exists():  # written last
            train_into(folder, wanted, sources, shares, splits)
    return from_folder(folder)


def address_of(
    wanted: settings.Tokenizer,
    sources: Sequence[Source],
    shares: Sequence[float],
    splits: Sequence[ValidationSplit],
    data: settings.Data,
) -> str:
    """A hash of all that a trained tokenizer is made from. Options that were added later are part
    of it only where they are used."""
    contents: list[object] = []
    options: list[object] = []
    is_special = False
    for source, share, split in zip(sources, shares, splits):
        contents.append([source.fingerprint, source.record_format.fields, share])
        own = [split.options, source.split_documents]
        if not isinstance(source.record_format, Texts):
            own.append(repr(source.record_format))
        options.append(own)
        is_special = is_special or bool(split.options or any(own[1:]))
    made_from: list[object] = [
        contents,
        [data.validation_fraction, wanted.train_vocab_size, wanted.train_bytes],
    ]
    if is_special:
        made_from.append(options)
    return checksum(json.dumps(made_from).encode())[:16]


def train_into(
    folder: Path,
    wanted: settings.Tokenizer,
    sources: Sequence[Source],
    shares: Sequence[float],
    splits: Sequence[ValidationSplit],
) -> None:
    """Train a tokenizer on a sample of the sources and save it."""
    texts: list[str] = []
    for source, share, split in zip(sources, shares, splits):
        texts += sample(source, int(share * wanted.train_bytes), split)
    for source in sources:
        change = source.changed(0, source.parts)
        if change:
            raise DataError(f"{change}; start again when nothing writes to it")
    tokenizer = train_tokenizer(texts, wanted.train_vocab_size)
    size = sum(len(text.encode()) for text in texts)
    fewer = ""
    if tokenizer.vocab_size < wanted.train_vocab_size:
        fewer = f" ({wanted.train_vocab_size} asked for: the text has no more)"
    logger.info(
        f"tokenizer: a vocabulary of {tokenizer.vocab_size}{fewer} from {size:,} bytes of text -> "
        f"{folder}"
    )
    tokenizer.save(folder)


def sample(source: Source, size: int, validation_split: ValidationSplit) -> Iterator[str]:
    """About `size` characters of a source's training documents, always the same ones: from the
    start of at least 64 of its files, chosen by a hash of their numbers."""
    order = sorted(range(source.parts), key=lambda part: checksum(f"sample {part}".encode()))
    for visited, part in enumerate(order):
        share = size // max(min(SAMPLE_PARTS, len(order)) - visited, 1)
        for document in source.part(part):
            if share <= 0:
                break
            text, _ = validation_split.parts(document)
            if text:
                yield text[:share]
                size -= len(text[:share])
                share -= len(text)
        if size <= 0:
            return
