"""Run folders and recipes with damaged bytes, types and values, and untrusted run folders: links that
lead out, FIFOs, sockets, devices and folders where files are expected."""

import json
import random
from pathlib import Path

from longfire.checkpoint.best import read_losses
from longfire.checkpoint.provenance import recorded_tokenizer
from longfire.config import recipe as recipes
from longfire.data.tokenizer_files import json_of as tokenizer_file
from longfire.disk import held, write_whole
from longfire.errors import DataError
from longfire.training.environment import write_environment
from longfire.training.records import RecordFile, last_records
from longfire.training.report_page import machine_of
from longfire.training.report_page import read as read_stories
from tests.faults.damage import (
    Kind,
    files_of,
    flip_any,
    flip_bytes,
    forge_json,
    odd_json,
    or_message,
    outside_of,
    put_instead,
)

# Run folders: what a start, a report and the readers of a run take from them


def make_run(folder: Path) -> None:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "run.toml").write_text('[training]\nsteps = 4\n[tokenizer]\npath = "bytes"\n')
    texts = {
        "environment.json": {
            "start_step": 0,
            "versions": {"torch": "2"},
            "cuda": None,
            "cpu": "x",
            "threads": 1,
            "earlier": [{}],
        },
        "data.json": {"text": "store"},
        "checkpoints/validation_losses.json": {"2": 1.5, "4": 1.25},
        "tokenizer/tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    lines = [{"step": step, "loss": 5.0 - step, "lr": 0.1} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def damage_run(folder: Path, chance: random.Random) -> None:
    file = chance.choice(files_of(folder))
    if file.suffix == ".json" and chance.random() < 0.6:
        forge_json(file, chance)
    elif file.suffix == ".jsonl" and chance.random() < 0.6:
        lines = file.read_text().splitlines()
        lines[chance.randrange(4)] = json.dumps(odd_json(json.loads(lines[0]), chance))
        file.write_text("\n".join(lines) + "\n")
    elif chance.random() < 0.1:
        (folder / "checkpoints/step-²").mkdir()
    else:
        flip_bytes(file, chance)


def read_run(folder: Path) -> None:
    recorded = [lambda: recorded_tokenizer(folder), lambda: read_losses(folder / "checkpoints")]
    recorded.append(lambda: tokenizer_file(folder / "tokenizer/tokenizer_config.json"))
    recorded.append(lambda: recipes.sections(recipes.read_toml(folder / "run.toml")))
    recorded.append(lambda: [machine_of(story) for story in read_stories([folder])])
    recorded.append(lambda: list(last_records(folder / "metrics.jsonl")))
    recorded.append(lambda: write_environment(folder, 1))
    recorded.append(lambda: add_record(folder / "metrics.jsonl"))
    for read in recorded:
        or_message(read)


def add_record(file: Path) -> None:
    records = RecordFile(file, 4)
    records.write(5, {"loss": 1.0})
    records.close()
    assert next(last_records(file))["step"] == 5


# TOML: a recipe, read strictly


def make_toml(folder: Path) -> None:
    folder.mkdir()
    (folder / "recipe.toml").write_text(
        '[training]\nsteps = 20\nseq_len = 64\n[optimizer]\nlr = 1e-3\n[data]\ndataset = ["a.txt"]\n'
        "[model]\nhidden_size = 16\n[model.attention]\nnum_heads = 2\n"
    )


def read_recipe(folder: Path) -> None:
    def read() -> None:
        given = recipes.read_toml(folder / "recipe.toml")
        recipes.sections(given)
        recipes.model_tables(given)

    or_message(read)


# Untrusted folders: links that lead out, FIFOs, sockets and devices where files are expected


def damage_untrusted(folder: Path, chance: random.Random) -> None:
    names = [*(file.relative_to(folder) for file in files_of(folder)), Path("lock")]
    put_instead(folder / chance.choice(names), outside_of(folder), chance)


def read_untrusted(folder: Path) -> None:
    read_run(folder)
    for write in (lambda: take_lock(folder / "lock"), lambda: write_whole(folder / "new", "x")):
        try:
            write()
        except OSError as error:
            assert error.strerror
    outside = folder.with_name(folder.name + ".outside")
    assert outside.read_text() == "theirs\n", "a file outside was written"


def take_lock(lock: Path) -> None:
    with held(lock, refuse):
        pass


def refuse(holder: str) -> None:
    raise DataError(holder)


RUN_KIND = Kind(make_run, damage_run, read_run)
TOML_KIND = Kind(make_toml, flip_any, read_recipe)
UNTRUSTED_KIND = Kind(make_run, damage_untrusted, read_untrusted)
