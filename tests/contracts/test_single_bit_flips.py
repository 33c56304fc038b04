"""A flipped bit is found in a token store, a checkpoint and an export, wherever it is: 220 of 220 in each.

Small JSON files are tried bit by bit, since a flip there may still be valid JSON.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from logged import logged_to

from longfire.checkpoint.folder import MANIFEST, STATE, damage
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config import settings as all_settings
from longfire.data.blocks import BLOCK_BYTES
from longfire.data.store_writer import StoreWriter
from longfire.data.token_record import TokenRecord
from longfire.data.tokenizer import bytes_tokenizer
from longfire.data.tokens import TokenStore
from longfire.errors import CheckpointError, DataError
from longfire.huggingface.checksums import CARD, check_checksums
from longfire.huggingface.export import export
from longfire.huggingface.families import config_from_hf
from longfire.initialise import build

FLIPS = 220
HEADER = {
    "source": {"name": "s", "entry": "s.txt", "fingerprint": "f"},
    "tokenizer": {"fingerprint": "t", "vocab_size": 300},
    "options": {},
    "dtype": "uint16",
}
SHAPE = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def undetected(folder: Path, read: Callable[[], object], files: list[Path]) -> list[str]:
    """Flips, half of them in files drawn alike and half by size, that `read` does not raise for."""
    draw = random.Random(0)
    sizes = [file.stat().st_size for file in files]
    chosen = draw.choices(files, k=FLIPS // 2) + draw.choices(files, sizes, k=FLIPS - FLIPS // 2)
    places = [(file, draw.randrange(8 * file.stat().st_size)) for file in chosen]
    missed = []
    for file, bit in places:
        flip(file, bit)
        try:
            read()
            missed.append(f"{file.relative_to(folder)}, bit {bit}")
        except (DataError, CheckpointError):
            pass
        flip(file, bit)
    read()
    return missed


def files_of(folder: Path, without: tuple[str, ...] = ()) -> list[Path]:
    found = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in without
    )
    return [path for path in found if path.stat().st_size]


def read_all(store: TokenStore) -> None:
    """As training and evaluation read: rows in any order, ends by search."""
    for stream in (store.train, store.validation):
        firsts = np.arange(0, stream.length - 1000, 997)
        stream.ends.searchsorted(np.random.default_rng(0).permutation(firsts))
        stream.sequences(firsts, 1000)
        stream.tokens(max(stream.length - 1000, 0), stream.length)
        stream.ends[:], stream.bytes[:]


def write_store(folder: Path) -> None:
    """Two shards of tokens of several blocks each, and a rest."""
    folder.mkdir()
    writer = StoreWriter(folder, HEADER, shard_tokens=2 * BLOCK_BYTES, shard_documents=2**14)
    draw = np.random.default_rng(0)
    for stream, documents in (("train", 20_000), ("heldout", 1000)):
        lengths = draw.integers(1, 18, documents)
        ids = draw.integers(0, 300, lengths.sum()).astype(np.uint16)
        writer.append(stream, TokenRecord(ids, lengths), lengths)
    writer.commit({"done": 1}, complete=True)
    writer.close()


def test_in_a_token_store_as_it_is_read(tmp_path):
    write_store(tmp_path / "s")
    files = files_of(tmp_path / "s", without=("lock",))
    assert {file.suffix for file in files} == {".bin", ".crc32", ".json"}
    assert undetected(tmp_path, lambda: read_all(TokenStore(tmp_path / "s")), files) == []


@pytest.mark.slow
def test_in_every_bit_of_a_stores_manifest(tmp_path):
    write_store(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    for bit in range(0, 8 * manifest.stat().st_size):
        flip(manifest, bit)
        with pytest.raises(DataError, match="delete the folder|prepare the data again"):
            TokenStore(tmp_path / "s")
        flip(manifest, bit)


def save_checkpoint(folder: Path) -> Path:
    model = build(config_from_hf(SHAPE, "here"), 0)
    state = State(model, torch.optim.AdamW(model.parameters()), step=1)
    model.logits(model(torch.arange(16)[None])).sum().backward()
    state.optimizer.step()
    saved = Checkpoints(folder, all_settings.Checkpoint(async_mode="disabled"))
    saved.save(state)
    return folder / "step-1"


def test_in_a_checkpoint(tmp_path):
    place = save_checkpoint(tmp_path)
    assert undetected(tmp_path, lambda: load_model_weights(place), files_of(place)) == []


@pytest.mark.slow
def test_in_every_bit_of_a_checkpoints_manifest(tmp_path):
    place = save_checkpoint(tmp_path)
    for name in (MANIFEST, STATE):
        for bit in range(8 * (place / name).stat().st_size):
            flip(place / name, bit)
            assert damage(place), f"{name}, bit {bit}"
            flip(place / name, bit)
    assert damage(place) is None


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    export(build(config_from_hf(SHAPE, "here"), 0), bytes_tokenizer(), folder)
    return folder


def test_in_an_export(exported, tmp_path):
    """Also in the model card, which is a warning and no error."""
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    said: list[str] = []
    check = lambda: check_checksums(folder)
    files = files_of(folder, without=(CARD,))
    assert {"config.json", "tokenizer.json", "model.safetensors", "SHA256SUMS"} <= {
        file.name for file in files
    }
    with logged_to(said):
        missed = undetected(folder, check, files)
        # A flip in the model card's own checksum is a warning too, where it leaves a digit.
        assert all(place.startswith("SHA256SUMS") for place in missed)
        assert len(said) == len(missed) and all(CARD in line for line in said)
        said.clear()
        flip(folder / CARD, 100)
        check()
    assert len(said) == 1 and CARD in said[0]
