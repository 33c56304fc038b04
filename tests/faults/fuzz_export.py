"""Exports with damaged config, index and weights."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

from longfire.config.config_file import read_config
from longfire.huggingface.weight_files import WeightFiles
from tests.faults.damage import (
    Kind,
    files_of,
    flip_bytes,
    forge_json,
    or_message,
    outside_of,
    put_instead,
)


def make_export(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    index = {"weight_map": {"b": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"b": torch.arange(5.0)}, folder / "model-00001-of-00001.safetensors")


def damage_export(folder: Path, chance: random.Random) -> None:
    file = chance.choice(files_of(folder))
    if chance.random() < 0.15:
        put_instead(file, outside_of(folder), chance)
    elif file.suffix == ".json" and chance.random() < 0.5:
        forge_json(file, chance)
    else:
        flip_bytes(file, chance)


def read_export(folder: Path) -> None:
    def read() -> None:
        read_config(folder)
        weights = WeightFiles(folder)
        for name in weights.tensors:
            weights.read(name)

    or_message(read)


EXPORT_KIND = Kind(make_export, damage_export, read_export)
