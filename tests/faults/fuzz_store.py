"""Token stores with damaged bytes."""

import random
from pathlib import Path

from longfire.config import settings
from longfire.data.manifest import TRAIN
from longfire.data.prepare import prepare
from longfire.data.tokens import TokenStore
from tests.faults.damage import Kind, files_of, flip_bytes, or_message, outside_of, put_instead


def make_store(folder: Path) -> None:
    folder.mkdir()
    text = folder.with_name(folder.name + ".txt")
    text.write_text("a few words of text\n" * 200)
    data = settings.Data(dataset=(str(text),), folder=str(folder))
    with prepare(data, settings.Tokenizer(path="bytes")) as prepared:
        store = prepared.stores[0]
        expected = store.train.tokens(0, store.train.length)
        folder.with_suffix(".expected").write_bytes(expected.tobytes())
    text.unlink()


def damage_store(folder: Path, chance: random.Random) -> None:
    file = chance.choice([file for file in files_of(folder) if file.stat().st_size])
    if chance.random() < 0.15:
        put_instead(file, outside_of(folder), chance)
    else:
        flip_bytes(file, chance)


def read_store(folder: Path) -> None:
    def read() -> None:
        place = next(path for path in folder.iterdir() if (path / "manifest.json").exists())
        store = TokenStore(place)
        tokens = store.train.tokens(0, store.train.length)
        expected = (folder.parent / "base.expected").read_bytes()
        assert tokens.tobytes() == expected, f"other tokens than were written ({TRAIN})"
        store.verify()

    or_message(read)


STORE_KIND = Kind(make_store, damage_store, read_store)
