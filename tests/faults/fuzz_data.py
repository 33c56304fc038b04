"""Data files of every kind with odd texts and damage, compared with an independent plain reader.

A case is one source (`texts.SUFFIX`), a tokenizer.json or an image. Where the plain reader gets
documents, longfire gets the same or refuses the file by its name; where it gets none, longfire
refuses the file too. What nothing has damaged is always read.
"""

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from PIL import Image

from longfire.config import settings
from longfire.data.prepare import prepare
from longfire.data.tokenizer import bytes_tokenizer
from longfire.errors import DataError
from longfire.images.decoding import decode
from tests.faults.damage import Kind, flip_bytes

EOS = 257  # of the bytes tokenizer
PIECES = (
    "a few words",
    "größe",
    "\u2028",
    "\f",
    "\r",
    "\x00",
    "😀",
    "\ufeff",
    "\u0301",
    '"',
    "\\",
    "\ud7ff",
    "w" * 3000,
)
# Lines that no valid file of texts has, or few have
ODD_LINES = (
    b'{"text": 5}',
    b'{"text": null}',
    b'{"text": ["a"]}',
    b'{"text": "\\ud800"}',
    b'{"text": "a", "text": "b"}',
    b'{"other": "a"}',
    b'{"text": "a"} {"text": "b"}',
    b"[]",
    b"5",
    b'{"text": "a\x00b"}',
    b'{"text": "' + b"x" * 300_000 + b'"}',
    b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'\xff\xfe{"text": "a"}',
    b'{"text": 1' + b"0" * 5000 + b"}",
    b"",
    b"\r",
)
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".arrow")
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def make_data(folder: Path) -> None:
    folder.mkdir()
    bytes_tokenizer().backend.save(str(folder / "tokenizer.json"))


def damage_data(folder: Path, chance: random.Random) -> None:
    """Write a source, an image or a tokenizer, and, mostly, damage it."""
    subject = chance.random()
    if subject < 0.1:
        write_image(folder, chance)
    elif subject < 0.2:
        write_source(folder, chance, ".jsonl", "")
        flip_bytes(folder / "tokenizer.json", chance)
        (folder / "other-tokenizer").touch()
    else:
        suffix = chance.choice(SUFFIXES)
        packing = "" if suffix in (".parquet", ".arrow") else chance.choice(list(PACKINGS))
        file = write_source(folder, chance, suffix, packing)
        if chance.random() < 0.6:
            flip_bytes(file, chance)
            (folder / "damaged").touch()
        elif chance.random() < 0.1:
            file.write_bytes(b"")
            (folder / "damaged").touch()


def write_image(folder: Path, chance: random.Random) -> None:
    pixels = np.frombuffer(chance.randbytes(75), np.uint8).reshape(5, 5, 3)
    kind = chance.choice(("png", "jpeg", "webp", "bmp"))
    Image.fromarray(pixels).save(folder / f"image.{kind}")
    flip_bytes(folder / f"image.{kind}", chance)


def write_source(folder: Path, chance: random.Random, suffix: str, packing: str) -> Path:
    texts = []
    for _ in range(chance.randrange(1, 6)):
        texts.append("".join(chance.choices(PIECES, k=chance.randrange(1, 5))))
    file = folder / f"texts{suffix}{packing}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), file)
    elif suffix == ".arrow":
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        content = text_of(texts, suffix, chance, folder)
        file.write_bytes(PACKINGS[packing](content))
    return file


def text_of(texts: list[str], suffix: str, chance: random.Random, folder: Path) -> bytes:
    """The bytes of a text format, of JSON lines sometimes with an odd line."""
    if suffix == ".txt":
        return "".join(texts).encode()
    if suffix == ".json":
        return json.dumps([{"text": text} for text in texts]).encode()
    lines = [json.dumps({"text": text}).encode() for text in texts]
    if chance.random() < 0.3:
        lines.insert(chance.randrange(len(lines) + 1), chance.choice(ODD_LINES))
        (folder / "damaged").touch()
    return b"\n".join(lines) + b"\n"


def plain_documents(file: Path) -> list[str]:
    """What the file holds, as the standard readers say. Raises any error."""
    if file.suffix == ".parquet":
        return pq.read_table(file)["text"].to_pylist()
    if file.suffix == ".arrow":
        return pa.ipc.open_stream(file.read_bytes()).read_all()["text"].to_pylist()
    content = file.read_bytes()
    assert content, "a file of no bytes is refused"
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    elif file.suffix == ".bz2":
        content = bz2.decompress(content)
    elif file.suffix == ".xz":
        content = lzma.decompress(content)
    elif file.suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True)
        content = stream.read()
    if ".txt" in file.name:
        return [content.decode("utf-8-sig")]
    if ".jsonl" in file.name:
        lines = [line for line in content.split(b"\n") if line.strip()]
        return [text_of_record(json.loads(line.decode("utf-8-sig"))) for line in lines]
    value = json.loads(content.decode("utf-8-sig"))
    return [text_of_record(record) for record in (value if isinstance(value, list) else [value])]


def text_of_record(record: dict[str, object]) -> str:
    text = record["text"]
    if text is None:
        return ""
    assert isinstance(text, str), "no text"
    text.encode()
    return text


def read_data(folder: Path) -> None:
    images = list(folder.glob("image.*"))
    if images:
        read_image(images[0])
        return
    file = next(folder.glob("texts.*"))
    try:
        read = prepared_documents(file, folder)
    except DataError as error:
        names = (file.name, "tokenizer.json")
        assert any(name in str(error) for name in names), f"no file is named: {error}"
        is_damaged = (folder / "damaged").exists() or (folder / "other-tokenizer").exists()
        assert is_damaged or has_no_text(file), f"a whole file was refused: {error}"
        return
    if not (folder / "other-tokenizer").exists():
        try:
            expected = [text for text in plain_documents(file) if text]
        except Exception as error:
            raise AssertionError(f"read, and a plain reader cannot: {error!r}") from error
        assert sorted(read) == sorted(expected), f"{len(read)} documents, not {len(expected)}"


def has_no_text(file: Path) -> bool:
    """Whether a source has no document with text, which is refused."""
    return not any(plain_documents(file))


def read_image(file: Path) -> None:
    content = file.read_bytes()
    try:
        image = decode(content, 3, 10_000, file.name)
    except DataError as error:
        assert file.name in str(error), f"no file is named: {error}"
        return
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(np.asarray(image), expected), "another image than Pillow's"


def prepared_documents(file: Path, folder: Path) -> list[str]:
    """The texts of the store that the file becomes. Raises DataError."""
    path = "bytes"
    if (folder / "other-tokenizer").exists():
        path = str(folder / "tokenizer.json")
    data = settings.Data(
        dataset=(str(file),),
        folder=str(folder / "stores"),
        validation_fraction=0.0,
        num_workers=1,
        streaming=False,
    )
    with prepare(data, settings.Tokenizer(path=path)) as prepared:
        store = prepared.stores[0]
        tokens = store.train.tokens(0, store.train.length)
    texts = []
    for document in np.split(tokens, np.flatnonzero(tokens == EOS) + 1):
        if len(document):
            texts.append(bytes(document[:-1].astype(np.uint8)).decode(errors="replace"))
    return texts


DATA_KIND = Kind(make_data, damage_data, read_data)
