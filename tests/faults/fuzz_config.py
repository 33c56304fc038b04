"""A config.json of each Hugging Face family with odd keys, types and sizes: read, and planned where it is read."""

import json
import random
from pathlib import Path

from longfire.config.read_model import read_model_config
from longfire.errors import UserError
from longfire.huggingface.families import FAMILIES, config_from_hf
from longfire.huggingface.family_writing import config_of, normalised
from tests.faults.damage import ODD_VALUES, Kind, flip_bytes, odd_json
from tests.faults.fuzz_settings import SIZES, command

VOCABULARY = 64
LAYERS = 2  # planning many takes longer than reading them
RECIPE = """[training]
steps = 20
seq_len = 64
[model]
config = "config.json"
[data]
dataset = ["text.txt"]
[tokenizer]
path = "bytes"
"""
STRANGE_KEYS = ("rope_thetas", "größe", "", "auto_map", "quantization_config", "rope_scaling")


def make_config(folder: Path) -> None:
    """A recipe, and a config of each family with all of its keys, which a case chooses from."""
    folder.mkdir()
    (folder / "text.txt").write_text("a few words of text\n" * 20)
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "families").mkdir()
    for name, family in FAMILIES.items():
        layers = next(key.theirs for key in family.keys if key.ours == "num_hidden_layers")
        few = {"model_type": name, layers: LAYERS}
        shape = normalised(config_from_hf(few, name))
        config = config_of(family, name, shape, VOCABULARY)
        (folder / f"families/{name}.json").write_text(json.dumps(config))


def damage_config(folder: Path, chance: random.Random) -> None:
    """Choose a family; one to three places of its config become odd."""
    file = chance.choice(sorted((folder / "families").iterdir()))
    config = json.loads(file.read_text())
    for _ in range(chance.randint(1, 3)):
        if not isinstance(config, dict) or not config:
            break
        way = chance.randrange(4)
        if way == 0:
            config = odd_json(config, chance)
        elif way == 1:
            config[chance.choice(STRANGE_KEYS)] = chance.choice(ODD_VALUES)
        else:
            change_size(config, chance)
    target = folder / "config.json"
    target.write_text(json.dumps(config))
    if chance.random() < 0.1:
        flip_bytes(target, chance)


def change_size(config: dict[str, object], chance: random.Random) -> None:
    """Another number for a key that has one."""
    numbers = [key for key, value in config.items() if isinstance(value, int | float)]
    if numbers:
        config[chance.choice(numbers)] = chance.choice(SIZES)


def read_config_of_family(folder: Path) -> None:
    try:
        read_model_config(folder / "config.json")
    except UserError as error:
        assert str(error), "an error without a message"
        return
    command(["plan", "recipe.toml", "--alternatives", "0"], folder)


CONFIG_KIND = Kind(make_config, damage_config, read_config_of_family)
