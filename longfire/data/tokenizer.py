"""Text <-> ids. `bytes` is built in, `train` makes a byte-level BPE of the data, the rest is read from tokenizer.json files.

BOS and EOS are words with a name, put around each document by us; they are never guessed from ids in the stream, and a
document's text never becomes one (`<eos>` in a text is five characters).
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Words

from longfire import settings
from longfire.data.tokens import checksum, write_whole
from longfire.errors import DataError

BOS, EOS = "<bos>", "<eos>"  # names in the tokenizers that we make ourselves


class Tokenizer:
    """A tokenizer of the `tokenizers` library and the names of its BOS and EOS ("" if it has none)."""

    def __init__(self, words: Words, bos: str = "", eos: str = "", where: str = "") -> None:
        self.words, self.bos, self.eos, self.where = words, bos, eos, where
        words.no_padding()
        words.no_truncation()
        words.encode_special_tokens = True  # text is text
        self.vocab_size = max(words.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = checksum(words.to_str().encode(), f"\0{bos}\0{eos}".encode())

    @property
    def bos_id(self) -> int | None:
        return self.words.token_to_id(self.bos) if self.bos else None

    @property
    def eos_id(self) -> int | None:
        return self.words.token_to_id(self.eos) if self.eos else None

    @property
    def dtype(self) -> str:
        """The narrowest type that holds every id."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""
        return [e.ids for e in self.words.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; BOS and EOS and other special words are left out."""
        return self.words.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.eos}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{k: v for k, v in names.items() if v},
            "clean_up_tokenization_spaces": False,
        }
        write_whole(folder / "tokenizer.json", self.words.to_str(pretty=True).encode())
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())


def bytes_tokenizer() -> Tokenizer:
    """Each byte of UTF-8 is a word of its own value; <bos> is 256 and <eos> is 257."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: these bytes stand for themselves,
    hidden = [b for b in range(256) if b not in visible]  # the others for the letters from 256 on
    vocabulary = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    assert set(vocabulary) == set(letters)
    words = Words(models.BPE(vocabulary, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return Tokenizer(words, BOS, EOS, "bytes")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's splitting) of `vocab_size` words, <bos> and <eos> included; the same for the same texts."""
    words = Words(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words.train_from_iterator(texts, trainer)
    return Tokenizer(words, BOS, EOS, "train")


def from_folder(folder: Path) -> Tokenizer:
    """A tokenizer.json with the names in tokenizer_config.json beside it."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise DataError(f"{folder}: no tokenizer.json in this folder")
    config = (
        json.loads((folder / "tokenizer_config.json").read_text())
        if (folder / "tokenizer_config.json").exists()
        else {}
    )
    names = [config.get(k) or "" for k in ("bos_token", "eos_token")]
    return Tokenizer(
        Words.from_file(str(file)), *(n["content"] if isinstance(n, dict) else n for n in names), str(folder)
    )


def check_ends(tokenizer: Tokenizer, wanted: settings.Tokenizer) -> None:
    """Raises DataError when add_bos or add_eos asks for a word that the tokenizer has not."""
    for setting, name, id in (("add_bos", "bos_token", tokenizer.bos_id), ("add_eos", "eos_token", tokenizer.eos_id)):
        if getattr(wanted, setting) and id is None:
            raise DataError(
                f"tokenizer {tokenizer.where}: it has no {name}; set tokenizer.{setting} = false, or name its "
                f"{name} in tokenizer_config.json beside tokenizer.json"
            )


def load(wanted: settings.Tokenizer, sources, shares: tuple[float, ...], data: settings.Data, note=print) -> Tokenizer:
    """The tokenizer that the settings name; `train` reads its sample from the sources. Raises DataError naming the mend."""
    if wanted.path == "bytes":
        return bytes_tokenizer()
    if wanted.path == "train":
        return _trained(wanted, sources, shares, data, note)
    path = Path(wanted.path).expanduser()
    if not path.exists():
        raise DataError(f"tokenizer.path = {wanted.path!r}: no such file or folder")
    tokenizer = from_folder(path if path.is_dir() else path.parent)
    check_ends(tokenizer, wanted)
    return tokenizer


def _trained(wanted: settings.Tokenizer, sources, shares: tuple[float, ...], data: settings.Data, note) -> Tokenizer:
    made_of = [
        [s.fingerprint() for s in sources],
        shares,
        data.heldout_fraction,
        wanted.train_vocab_size,
        wanted.train_bytes,
    ]
    folder = Path(data.folder) / f"tokenizer-{checksum(json.dumps(made_of).encode())[:16]}"
    if not (folder / "tokenizer_config.json").exists():
        note(f"tokenizer: training {wanted.train_vocab_size} words on {wanted.train_bytes / 1e6:.0f} MB of text")
        texts = (d.text for s, share in zip(sources, shares) for d in _first(s, int(share * wanted.train_bytes)))
        train_tokenizer(texts, wanted.train_vocab_size).save(folder)
    return from_folder(folder)


def _first(source, size: int):
    for document in source.documents():
        yield document
        size -= len(document.text)
        if size <= 0:
            return
