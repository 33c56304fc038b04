"""Text <-> ids. `bytes` is built in, `train` makes a byte-level BPE of the data, all others are
tokenizer.json files.

BOS and EOS are words with a name, which we put around each document; they are never guessed from
ids in the stream, and no document's text becomes one (`<eos>` in a text is five characters).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Words

from longfire.config import settings
from longfire.data import losses
from longfire.data.losses import Losses
from longfire.data.tokenizer_files import (
    CHAT,
    GENERATION,
    MORE_CHATS,
    CarriedFiles,
    ends_of,
    generation_config,
    json_of,
    read_carried,
    starts_with,
    with_bos_rule,
    within,
    written,
)
from longfire.data.tokens import checksum, locked
from longfire.data.validation import ValidationSplit, validation_split_of
from longfire.disk import write_whole
from longfire.errors import DataError, SettingsError

if TYPE_CHECKING:
    from longfire.data.text import (
        Source,
    )  # not at run time: tokenizing processes start faster without it

BOS, EOS = "<bos>", "<eos>"  # in the tokenizers that are made here
KNOWN_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "[BOS]")
KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "[EOS]")
PIECE = 500_000  # characters: longer texts are cut where that changes nothing (`cuts`)
AROUND = 2_000  # characters on both sides of a cut that are compared
CUTS_TRIED = 10  # places that fail one after another before a text stays whole
SMALLEST_TRAINED = 258  # the bytes, <bos> and <eos>
SAMPLE_PARTS = 64  # a sample to train on comes from at least so many files, if there are


class Tokenizer:
    """A tokenizer of the `tokenizers` library, and the names of its BOS and EOS ("" if it has
    none).

    carried: what else it came with, kept for those who export it.
    """

    def __init__(
        self,
        words: Words,
        bos: str = "",
        eos: str = "",
        where: str = "",
        carried: CarriedFiles | None = None,
    ) -> None:
        self.words, self.bos, self.eos, self.where = words, bos, eos, where
        words.no_padding()
        words.no_truncation()
        words.encode_special_tokens = (
            True  # special words in a text are encoded as the characters they are
        )
        self.vocab_size = max(words.get_vocab(with_added_tokens=True).values()) + 1
        self.carried = within(carried or CarriedFiles(), self.vocab_size)
        self.fingerprint = checksum(words.to_str().encode(), f"\0{bos}\0{eos}".encode())

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
        return load(settings.Tokenizer(path=str(path)), (), (), settings.Data())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of these texts, with `vocab_size` entries at most, `<bos>` and
        `<eos>` included; at least 258, the bytes and these two.

        Raises SettingsError for a smaller vocabulary.
        """
        if vocab_size < SMALLEST_TRAINED:
            raise SettingsError(
                f"vocab_size = {vocab_size}: at least {SMALLEST_TRAINED}, the bytes and two ends"
            )
        return train_tokenizer(texts, vocab_size)

    @property
    def bos_id(self) -> int | None:
        return self.words.token_to_id(self.bos) if self.bos else None

    @property
    def eos_id(self) -> int | None:
        return self.words.token_to_id(self.eos) if self.eos else None

    @cached_property
    def loses_nothing(self) -> bool:
        """Whether every text can be said: there is a token for each byte."""
        return losses.loses_nothing(self.words)

    @cached_property
    def unknown_id(self) -> int | None:
        return losses.unknown_id(self.words)

    def losses_of(self, texts: list[str], encoded: list[np.ndarray]) -> Losses:
        """What is lost of texts, whose ids are `encoded`, without BOS and EOS."""
        if self.loses_nothing:
            return Losses()
        return losses.losses_of(self.words, self.unknown_id, texts, encoded)

    @property
    def vocabulary(self) -> str:
        """A digest of what each id stands for. Unlike the fingerprint it does not depend on how a
        version of the library writes a tokenizer down, so that it may be compared years later."""
        entries = sorted(self.words.get_vocab(with_added_tokens=True).items())
        return checksum(json.dumps(entries).encode())[:32]

    @property
    def pad_id(self) -> int | None:
        """Of the padding token that its files name, else EOS."""
        named = self.carried.config.get("pad_token")
        return self.words.token_to_id(named) if isinstance(named, str) else self.eos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: EOS, and those that a generation_config.json beside it
        names."""
        return ends_of(self.carried, self.eos_id)

    @property
    def adds_bos(self) -> bool:
        """Whether its files say that a BOS begins every text."""
        return self.bos_id is not None and (
            self.carried.adds_bos or starts_with(self.words, self.bos_id)
        )

    @property
    def dtype(self) -> str:
        """The narrowest type that holds every id."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""
        return [ids.tolist() for ids in self.arrays(texts)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        """`encode_batch` as arrays of `dtype`. A long text goes in pieces: 50 MB at once would take
        6 GB and one core."""
        if any(len(text) > 2 * PIECE for text in texts):
            return [
                self._in_pieces(text) if len(text) > 2 * PIECE else self.arrays([text])[0]
                for text in texts
            ]
        return [
            np.array(e.ids, self.dtype)
            for e in self.words.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _in_pieces(self, text: str) -> np.ndarray:
        ends = [0, *self.cuts(text), len(text)]
        pieces = [text[start:end] for start, end in pairwise(ends)]
        if len(pieces) == 1:
            return np.array(
                self.words.encode_batch_fast([text], add_special_tokens=False)[0].ids, self.dtype
            )
        return np.concatenate(
            [ids for i in range(0, len(pieces), 8) for ids in self.arrays(pieces[i : i + 8])]
        )

    def cuts(self, text: str) -> Iterator[int]:
        """Places about PIECE characters apart where a text can be cut without changing its ids.

        That is after a line end between two characters that are no white space, if the text around
        the place gives the same ids whole and cut. Tokenizers that first split text by a pattern
        (all byte-level ones) pass nearly everywhere; one that marks the beginning of a text passes
        nowhere, and then the text stays whole.
        """
        place, failures = PIECE, 0
        while (
            failures < CUTS_TRIED and 0 < (place := text.find("\n", place) + 1) < len(text) - PIECE
        ):
            if text[place - 2].isspace() or text[place].isspace():
                continue
            left, right = text[place - AROUND : place], text[place : place + AROUND]
            whole, *halves = self.words.encode_batch_fast(
                [left + right, left, right], add_special_tokens=False
            )
            if whole.ids == halves[0].ids + halves[1].ids:
                yield place
                place, failures = place + PIECE, 0
            else:
                failures += 1

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; BOS, EOS and other special words are left out."""
        return self.words.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def save(self, folder: Path, adds_bos: bool | None = None) -> None:
        """tokenizer.json and what lies beside it, which `transformers.AutoTokenizer` and
        `from_folder` load.

        adds_bos: whether the files say that a BOS begins every text; None: as they say it now, and
        tokenizer.json as it is. Files that hold the same already are left alone. Raises DataError
        if the folder cannot be written.
        """
        words = self.words if adds_bos is None else with_bos_rule(self.words, self.bos, adds_bos)
        begins = self.adds_bos if adds_bos is None else adds_bos
        contents = {
            "tokenizer.json": words.to_str(pretty=True),
            **written(self.carried, self.bos, self.eos, begins),
        }
        generation = generation_config(self.carried, self.bos_id, self.eos_id, self.pad_id)
        contents[GENERATION] = json.dumps(generation, indent=2) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                (folder / name).parent.mkdir(exist_ok=True)
                if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode():
                    write_whole(folder / name, text.encode())
        except OSError as e:
            raise DataError(
                f"{folder}: the tokenizer cannot be saved ({e}); free some space or name another place"
            ) from e


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte in byte-level tokenizers -> the
    byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves,
    hidden = [
        byte for byte in range(256) if byte not in plain
    ]  # the others for the characters from 256 on
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


def bytes_tokenizer() -> Tokenizer:
    """Each byte of UTF-8 is a word of its own value; <bos> is 256 and <eos> is 257."""
    words = Words(models.BPE(byte_level_alphabet(), []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return Bytes(words, BOS, EOS, "bytes")


class Bytes(Tokenizer):
    """The same ids as the library gives for this tokenizer, without its detours."""

    loses_nothing = True

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting, of `vocab_size` words at most, <bos> and <eos>
    included; the same for the same texts."""
    words = Words(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=alphabet,
    )
    words.train_from_iterator(texts, trainer)
    return Tokenizer(words, BOS, EOS, "train")


def load(
    wanted: settings.Tokenizer,
    sources: "tuple[Source, ...]",
    shares: tuple[float, ...],
    data: settings.Data,
    note: Callable[[str], None] = print,
) -> Tokenizer:
    """The tokenizer that the settings name; `train` makes it from the sources, once.

    Raises DataError naming file and fix; also when add_bos or add_eos asks for a word that it has
    not.
    """
    path = Path(wanted.path).expanduser()
    if wanted.path == "bytes":
        tokenizer = bytes_tokenizer()
    elif wanted.path == "train":
        tokenizer = _trained(wanted, sources, shares, data, note)
    elif path.is_dir():
        tokenizer = from_folder(path)
    elif path.is_file():
        tokenizer = _from_file(path)
    elif wanted.path.startswith((".", "/", "~")) or wanted.path.endswith(".json"):
        raise DataError(f"tokenizer.path = {wanted.path!r}: no such file or folder")
    else:
        tokenizer = _from_hub(wanted.path)
    for key, kind, known in (
        ("add_bos", "bos", tokenizer.bos_id),
        ("add_eos", "eos", tokenizer.eos_id),
    ):
        if getattr(wanted, key) and known is None:
            raise DataError(
                f"tokenizer {tokenizer.where}: it has no {kind} token; set tokenizer.{key} = false, or name its "
                f"{kind}_token in a tokenizer_config.json beside its tokenizer.json"
            )
    return tokenizer


def from_folder(folder: Path) -> Tokenizer:
    """A tokenizer.json and the names beside it; files of other kinds through transformers. Raises
    DataError."""
    if (folder / "tokenizer.json").is_file():
        return _from_file(folder / "tokenizer.json")
    return _by_transformers(
        str(folder),
        f"{folder}: no tokenizer.json in this folder, and transformers finds no other",
        True,
    )


def _from_file(file: Path) -> Tokenizer:
    content = file.read_bytes()
    try:
        words = Words.from_buffer(content)
    except ValueError as e:
        raise DataError(
            f"{file}: not a tokenizer.json ({e}); name one, or the folder that holds it"
        ) from e
    tokenizer = Tokenizer(words, *_names(file.parent, words), str(file), read_carried(file.parent))
    own_bytes = bytes_tokenizer()
    if tokenizer.fingerprint != own_bytes.fingerprint:
        return tokenizer
    own_bytes.carried = tokenizer.carried
    return own_bytes


def _names(folder: Path, words: Words) -> tuple[str, str]:
    """(BOS, EOS) as the files beside tokenizer.json name them; without such files, the well-known
    names it has."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            config = json_of(folder / name)
            return tuple(_word(config, key, folder / name) for key in ("bos_token", "eos_token"))
    special = {
        token.content for token in words.get_added_tokens_decoder().values() if token.special
    }
    return tuple(
        next((word for word in known if word in special), "") for known in (KNOWN_BOS, KNOWN_EOS)
    )


def _word(config: dict, key: str, file: Path) -> str:
    """A token that a file names, as text or as an object with `content`; "" if it names none."""
    word = config.get(key)
    if isinstance(word, dict):
        word = word.get("content")
    if word is not None and not isinstance(word, str):
        raise DataError(
            f"{file}: {key} = {json.dumps(word)} must be one token, as text; further ends of a text belong into the "
            "eos_token_id of generation_config.json"
        )
    return word or ""


def _from_hub(name: str) -> Tokenizer:
    import huggingface_hub  # only those who name a tokenizer of the hub pay for the import
    from huggingface_hub.errors import HTTPError

    try:  # ask once, briefly: transformers would retry for most of a minute
        huggingface_hub.HfApi().model_info(name, timeout=10)
        offline = False
    except (HTTPError, OSError, ValueError):
        offline = True
    return _by_transformers(
        name,
        f"tokenizer.path = {name!r} is no file or folder here, and as a tokenizer of the hub it cannot be had",
        offline,
    )


def _by_transformers(name: str, failure: str, offline: bool) -> Tokenizer:
    from transformers import (
        AutoTokenizer,
    )  # seconds of imports, only where no tokenizer.json lies at hand

    try:
        theirs = AutoTokenizer.from_pretrained(name, local_files_only=offline)
        words = theirs.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise DataError(
            f"{failure} ({reason}); name a tokenizer.json or a folder that holds one"
        ) from e
    template = theirs.chat_template
    files = {CHAT: template} if isinstance(template, str) else {}
    if isinstance(template, dict):  # several, by name
        files = {
            CHAT if key == "default" else f"{MORE_CHATS}/{key}.jinja": text
            for key, text in template.items()
        }
    carried = CarriedFiles(files=files)
    if Path(name).is_dir():
        carried = read_carried(Path(name))
    return Tokenizer(
        Words.from_str(words.to_str()),
        theirs.bos_token or "",
        theirs.eos_token or "",
        name,
        carried,
    )


def _trained(
    wanted: settings.Tokenizer,
    sources: "tuple[Source, ...]",
    shares: tuple[float, ...],
    data: settings.Data,
    note: Callable[[str], None],
) -> Tokenizer:
    """`train`: kept beside the token stores under the address of what it was made from."""
    if wanted.train_vocab_size < 258:
        raise SettingsError(
            f"tokenizer.train_vocab_size = {wanted.train_vocab_size}: at least 258, the bytes and two ends"
        )
    made_of = [
        [[source.fingerprint, source.fields, share] for source, share in zip(sources, shares)],
        [data.validation_fraction, wanted.train_vocab_size, wanted.train_bytes],
    ]
    rules = [validation_split_of(source, data.validation_fraction) for source in sources]
    special = [[rule.options, source.split_documents] for rule, source in zip(rules, sources)]
    if any(options or splits for options, splits in special):
        made_of.append(special)
    folder = Path(data.folder) / f"tokenizer-{checksum(json.dumps(made_of).encode())[:16]}"
    with locked(folder, note):
        if not (folder / "tokenizer_config.json").exists():  # written last
            sizes = [int(share * wanted.train_bytes) for share in shares]
            texts = [t for part in zip(sources, sizes, rules) for t in sample(*part)]
            for source in sources:
                if change := source.changed(0, source.parts):
                    raise DataError(f"{change}; start again when nothing writes to it")
            made = train_tokenizer(texts, wanted.train_vocab_size)
            size = sum(len(text.encode()) for text in texts)
            asked = f" ({wanted.train_vocab_size} asked for: the text has no more)"
            fewer = asked if made.vocab_size < wanted.train_vocab_size else ""
            note(
                f"tokenizer: a vocabulary of {made.vocab_size}{fewer} from {size:,} bytes of text -> {folder}"
            )
            made.save(folder)
    return from_folder(folder)


def sample(source: "Source", size: int, validation_split: ValidationSplit) -> Iterator[str]:
    """About `size` characters of a source's training documents: from the start of at least 64 of
    its files, those chosen by a hash of their number; always the same."""
    order = sorted(range(source.parts), key=lambda part: checksum(f"sample {part}".encode()))
    for visited, part in enumerate(order):
        share = size // max(min(SAMPLE_PARTS, len(order)) - visited, 1)
        for document in source.part(part):
            if share <= 0:
                break
            text, _ = validation_split.parts(document)
            if text:
                yield text[:share]
                size, share = size - len(text[:share]), share - len(text)
        if size <= 0:
            return
