"""Text <-> ids. `bytes` is built in, others are found (tokenizer_sources.py) or trained.

BOS and EOS are named tokens, which longfire puts around each document. They are never guessed from
ids in the stream, and no document's text becomes one (`<eos>` in a text is five characters).
"""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from longfire.config import settings
from longfire.data import losses
from longfire.data.losses import Losses
from longfire.data.manifest import checksum
from longfire.data.token_templates import starts_with, with_bos_rule
from longfire.data.tokenizer_files import (
    GENERATION,
    CarriedFiles,
    ends_of,
    files_to_write,
    generation_config,
    within,
)
from longfire.data.tokenizer_sources import BOS, EOS, Found, find, in_folder
from longfire.disk import write_whole
from longfire.errors import DataError, SettingsError
from longfire.regular_files import read_regular

PIECE_CHARACTERS = 500_000  # longer texts are cut where that changes nothing (`cuts`)
COMPARED_CHARACTERS = 2_000  # on both sides of a cut
CUTS_TRIED = 10  # places that fail one after another before a text stays in one piece
PIECES_AT_ONCE = 8
MIN_VOCAB_SIZE = 258  # of a trained tokenizer: the bytes, <bos> and <eos>


class Tokenizer:
    """A tokenizer of the `tokenizers` library (`backend`), and the names of its BOS and EOS ("" if
    it has none).

    where: the file or name it comes from, for messages. carried: other files that it came with,
    kept for an export.
    """

    def __init__(
        self,
        backend: Backend,
        bos: str = "",
        eos: str = "",
        where: str = "",
        carried: CarriedFiles | None = None,
    ) -> None:
        self.backend = backend
        self.bos = bos
        self.eos = eos
        self.where = where
        backend.no_padding()
        backend.no_truncation()
        # Special tokens in a text are encoded as the characters they are.
        backend.encode_special_tokens = True
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.carried = within(carried or CarriedFiles(), self.vocab_size)
        self.fingerprint = checksum(backend.to_str().encode(), f"\0{bos}\0{eos}".encode())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """`bytes`, or the tokenizer of a tokenizer.json, of a folder that holds one (a run's
        `tokenizer`, an export), or of a name on the hub.

        Raises DataError naming the file, SettingsError for `train`, which needs text.
        """
        if str(path) == "train":
            raise SettingsError(
                "Tokenizer.load('train'): a tokenizer is trained on text: "
                "Tokenizer.train(texts, vocab_size)"
            )
        tokenizer = find_tokenizer(str(path))
        check_ends(tokenizer, settings.Tokenizer())
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of these texts, with `vocab_size` entries at most, `<bos>` and
        `<eos>` included; at least 258, the bytes and these two.

        Raises SettingsError for a smaller vocabulary.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise SettingsError(
                f"vocab_size = {vocab_size}: at least {MIN_VOCAB_SIZE}, the bytes and two ends"
            )
        return train_tokenizer(texts, vocab_size)

    @property
    def bos_id(self) -> int | None:
        if not self.bos:
            return None
        return self.backend.token_to_id(self.bos)

    @property
    def eos_id(self) -> int | None:
        if not self.eos:
            return None
        return self.backend.token_to_id(self.eos)

    @cached_property
    def loses_nothing(self) -> bool:
        """Whether every text can be encoded: there is a token for each byte."""
        return losses.loses_nothing(self.backend)

    @cached_property
    def unknown_id(self) -> int | None:
        return losses.unknown_id(self.backend)

    def losses_of(self, texts: list[str], encoded: list[np.ndarray]) -> Losses:
        """What is lost of texts, whose ids are `encoded`, without BOS and EOS."""
        if self.loses_nothing:
            return Losses()
        return losses.losses_of(self.backend, self.unknown_id, texts, encoded)

    @property
    def vocabulary(self) -> str:
        """A hash of the token of each id. Unlike the fingerprint it does not depend on how a
        version of the library writes a tokenizer to a file, so it may be compared years later."""
        entries = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        return checksum(json.dumps(entries).encode())[:32]

    @property
    def pad_id(self) -> int | None:
        """Of the padding token that its files name, else EOS."""
        name = self.carried.config.get("pad_token")
        if isinstance(name, str):
            return self.backend.token_to_id(name)
        return self.eos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: EOS, and those that a generation_config.json beside it
        names."""
        return ends_of(self.carried, self.eos_id)

    @property
    def adds_bos(self) -> bool:
        """Whether its files ask for a BOS before every text."""
        if self.bos_id is None:
            return False
        return self.carried.adds_bos or starts_with(self.backend, self.bos_id)

    @property
    def dtype(self) -> str:
        """The narrowest type that holds every id."""
        if self.vocab_size <= 2**16:
            return "uint16"
        return "uint32"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""
        return [ids.tolist() for ids in self.arrays(texts)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        """`encode_batch` as arrays of `dtype`. A long text is encoded in pieces: 50 MB at once
        would take 6 GB and one core."""
        if not any(is_long(text) for text in texts):
            return self._encode(texts)
        encoded = []
        for text in texts:
            encoded.append(self._in_pieces(text) if is_long(text) else self._encode([text])[0])
        return encoded

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of texts, each in one piece."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _in_pieces(self, text: str) -> np.ndarray:
        ends = [0, *self.cuts(text), len(text)]
        pieces = [text[start:end] for start, end in pairwise(ends)]
        if len(pieces) == 1:
            return self._encode(pieces)[0]
        encoded: list[np.ndarray] = []
        for first in range(0, len(pieces), PIECES_AT_ONCE):
            encoded += self.arrays(pieces[first : first + PIECES_AT_ONCE])
        return np.concatenate(encoded)

    def cuts(self, text: str) -> Iterator[int]:
        """Places about PIECE_CHARACTERS apart where a text can be cut without changing its ids.

        That is after a line end between two characters that are no white space, if the text around
        the place gives the same ids uncut and cut. Tokenizers that first split text by a pattern
        (all byte-level ones) pass nearly everywhere. One that marks the beginning of a text passes
        nowhere, and then the text stays in one piece.
        """
        place = PIECE_CHARACTERS
        failures = 0
        while failures < CUTS_TRIED:
            place = text.find("\n", place) + 1
            if not 0 < place < len(text) - PIECE_CHARACTERS:
                return
            if text[place - 2].isspace() or text[place].isspace():
                continue
            if self._can_cut(text, place):
                yield place
                place += PIECE_CHARACTERS
                failures = 0
            else:
                failures += 1

    def _can_cut(self, text: str, place: int) -> bool:
        left = text[place - COMPARED_CHARACTERS : place]
        right = text[place : place + COMPARED_CHARACTERS]
        both, first, second = self.backend.encode_batch_fast(
            [left + right, left, right], add_special_tokens=False
        )
        return both.ids == first.ids + second.ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; BOS, EOS and other special tokens are left out."""
        return self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def save(self, folder: Path, adds_bos: bool | None = None) -> None:
        """tokenizer.json and the files beside it, which `transformers.AutoTokenizer` and
        `from_folder` load.

        adds_bos: whether the files ask for a BOS before every text; None: as they do now, with
        tokenizer.json as it is. Files with the same content are not written again. Raises DataError
        if the folder cannot be written.
        """
        backend = self.backend
        if adds_bos is None:
            adds_bos = self.adds_bos
        else:
            backend = with_bos_rule(backend, self.bos, adds_bos)
        contents = {
            "tokenizer.json": backend.to_str(pretty=True),
            **files_to_write(self.carried, self.bos, self.eos, adds_bos),
        }
        generation = generation_config(self.carried, self.bos_id, self.eos_id, self.pad_id)
        contents[GENERATION] = json.dumps(generation, indent=2) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                write_changed(folder / name, text.encode())
        except OSError as error:
            raise DataError(
                f"{folder}: the tokenizer cannot be saved ({error}); free some space or name "
                "another place"
            ) from error


def is_long(text: str) -> bool:
    """Whether a text is encoded in pieces."""
    return len(text) > 2 * PIECE_CHARACTERS


def write_changed(file: Path, content: bytes) -> None:
    """Write a file unless it has this content."""
    file.parent.mkdir(exist_ok=True)
    if not file.is_file() or read_regular(file) != content:
        write_whole(file, content)


class Bytes(Tokenizer):
    """The same ids as the library gives for this tokenizer, computed directly."""

    loses_nothing = True

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte in byte-level tokenizers -> the
    byte."""
    # Printable characters stand for themselves, the characters from 256 on for the other bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        alphabet[chr(256 + i)] = byte
    return alphabet


def bytes_tokenizer() -> Tokenizer:
    """Each byte of UTF-8 is a token of its own value; <bos> is 256 and <eos> is 257."""
    backend = Backend(models.BPE(byte_level_alphabet(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return Bytes(backend, BOS, EOS, "bytes")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting, of `vocab_size` tokens at most, <bos> and <eos>
    included; the same for the same texts."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, BOS, EOS, "train")


def find_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer of a file, a folder or a name on the hub. Raises DataError."""
    if name == "bytes":
        return bytes_tokenizer()
    return tokenizer_of(find(name))


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: a tokenizer.json and the names beside it; files of other kinds
    through transformers. Raises DataError."""
    return tokenizer_of(in_folder(folder))


def tokenizer_of(found: Found) -> Tokenizer:
    """A tokenizer that was found. The files of `bytes` give its fast implementation."""
    tokenizer = Tokenizer(found.backend, found.bos, found.eos, found.where, found.carried)
    own_bytes = bytes_tokenizer()
    if tokenizer.fingerprint != own_bytes.fingerprint:
        return tokenizer
    own_bytes.carried = tokenizer.carried
    return own_bytes


def check_ends(tokenizer: Tokenizer, wanted: settings.Tokenizer) -> None:
    """Raises DataError where the settings ask for a BOS or EOS that a tokenizer does not have."""
    missing = []
    if wanted.add_bos and tokenizer.bos_id is None:
        missing.append("bos")
    if wanted.add_eos and tokenizer.eos_id is None:
        missing.append("eos")
    for kind in missing:
        raise DataError(
            f"tokenizer {tokenizer.where}: it has no {kind} token; set tokenizer.add_{kind} = "
            f"false, or name its {kind}_token in a tokenizer_config.json beside its tokenizer.json"
        )
