"""Checkpoints with damaged bytes, and forged ones whose checksums are right."""

import json
import random
import shutil
from pathlib import Path

import torch

from longfire.checkpoint.folder import FORMAT, checksum, write_manifest
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.shards import BOXES, LocalTensor, write_shard
from longfire.parallel.sharding import TensorSlice
from tests.faults.damage import (
    Kind,
    files_of,
    flip_any,
    forge_json,
    odd_json,
    or_message,
    outside_of,
    put_instead,
)

WEIGHTS = {
    "model/a": torch.arange(24.0).reshape(4, 6),
    "model/b": torch.arange(5.0),
    "model/c": torch.tensor(3.0),
}
STATE_FACTS = {
    "format": FORMAT,
    "torch": "",
    "weights_only": False,
    "step": 4,
    "rows_consumed": 8,
    "tokens": 64,
    "skipped_steps": 0,
    "elapsed_seconds": 1.0,
    "plan": [[0, 4]],
    "plateau": [-1, None, 0, 0],
    "vocabulary": "",
    "uses_average": False,
}


def make_checkpoint(folder: Path) -> None:
    folder.mkdir()
    parts = [TensorSlice((0, 0), (2, 6), (0, 0)), TensorSlice((2, 0), (2, 6), (2, 0))]
    held_parts = {"model/a": LocalTensor(WEIGHTS["model/a"], (4, 6), parts)}
    whole = TensorSlice((0,), (5,), (0,))
    held_parts["model/b"] = LocalTensor(WEIGHTS["model/b"], (5,), [whole])
    held_parts["model/c"] = LocalTensor(WEIGHTS["model/c"], (), [TensorSlice((), (), ())])
    write_shard(held_parts, folder / "shard-00000-model.safetensors")
    state = LocalTensor(WEIGHTS["model/b"], (5,), [whole])
    write_shard({"optimizer/exp_avg/b": state}, folder / "shard-00000-optimizer.safetensors")
    seal(folder, STATE_FACTS)


def seal(folder: Path, facts: object) -> None:
    """state.json and a manifest whose checksums are right."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        files[path.name] = {"bytes": path.stat().st_size, "crc32": checksum(path)}
    write_manifest(folder, facts, files)


def forge_boxes(file: Path, chance: random.Random) -> None:
    """Another place, shape or name of a part in the header of a file."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    boxes = json.loads(header["__metadata__"][BOXES])
    header["__metadata__"][BOXES] = json.dumps(odd_json(boxes, chance))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def damage_checkpoint(folder: Path, chance: random.Random) -> None:
    way = chance.randrange(6)
    if way == 0:
        flip_any(folder, chance)
    elif way == 1:
        seal(folder, odd_json(STATE_FACTS, chance))
    elif way == 2:
        forge_boxes(chance.choice(sorted(folder.glob("*.safetensors"))), chance)
        seal(folder, STATE_FACTS)
    elif way == 3:
        forge_json(folder / "manifest.json", chance)
    elif way == 4:
        put_instead(chance.choice(files_of(folder)), outside_of(folder), chance)
    else:
        extra = folder / "shard-00001-optimizer.safetensors"
        shutil.copy(folder / "shard-00000-optimizer.safetensors", extra)


def read_checkpoint(folder: Path) -> None:
    def read() -> None:
        weights = load_model_weights(folder)
        names = {name.removeprefix("model/") for name in WEIGHTS}
        assert names >= set(weights), "a tensor that nobody wrote"
        forged = "optimizer/exp_avg/b"
        assert forged not in weights
        for name, tensor in weights.items():
            assert tensor.equal(WEIGHTS[f"model/{name}"]), f"{name} is another tensor"

    or_message(read)


CHECKPOINT_KIND = Kind(make_checkpoint, damage_checkpoint, read_checkpoint)
