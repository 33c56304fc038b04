"""A seeded fuzzer of files: `python -m tests.faults.fuzz --kind checkpoint --cases 1000 --seed 7`.

Each case damages or forges one thing and lets longfire read it in this process. It survives where
the result is right, or an error of longfire says what is wrong, in time, nothing is left lying, and
nothing outside the folder has changed. What failed is kept as a folder, to be tried again by hand.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from longfire.checkpoint.best import read_losses
from longfire.checkpoint.folder import FORMAT, checksum, write_manifest
from longfire.checkpoint.provenance import recorded_tokenizer
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.shards import BOXES, LocalTensor, write_shard
from longfire.config import recipe as recipes
from longfire.config import settings
from longfire.config.config_file import read_config
from longfire.data.manifest import TRAIN
from longfire.data.prepare import prepare
from longfire.data.tokenizer_files import json_of as tokenizer_file
from longfire.data.tokens import TokenStore
from longfire.disk import held, write_whole
from longfire.errors import DataError
from longfire.huggingface.weight_files import WeightFiles
from longfire.parallel.sharding import TensorSlice
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
)
from tests.faults.fuzz_config import CONFIG_KIND
from tests.faults.fuzz_settings import SETTINGS_KIND

CASE_SECONDS = 120  # of a case that hangs: a busy machine may take 40 for a plan
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


class TooSlow(BaseException):
    """A case did not end in its time."""


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


# Checkpoints: damaged, and forged with right checksums


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
    way = chance.randrange(5)
    if way == 0:
        flip_any(folder, chance)
    elif way == 1:
        seal(folder, odd_json(STATE_FACTS, chance))
    elif way == 2:
        forge_boxes(chance.choice(sorted(folder.glob("*.safetensors"))), chance)
        seal(folder, STATE_FACTS)
    elif way == 3:
        forge_json(folder / "manifest.json", chance)
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


# Token stores


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
    flip_bytes(chance.choice([file for file in files_of(folder) if file.stat().st_size]), chance)


def read_store(folder: Path) -> None:
    def read() -> None:
        place = next(path for path in folder.iterdir() if (path / "manifest.json").exists())
        store = TokenStore(place)
        tokens = store.train.tokens(0, store.train.length)
        expected = (BASES["store"] / "base.expected").read_bytes()
        assert tokens.tobytes() == expected, f"other tokens than were written ({TRAIN})"
        store.verify()

    or_message(read)


# Exports: config, index and weights of a folder of Hugging Face


def make_export(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    index = {"weight_map": {"b": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"b": WEIGHTS["model/b"]}, folder / "model-00001-of-00001.safetensors")


def damage_export(folder: Path, chance: random.Random) -> None:
    file = chance.choice(files_of(folder))
    if file.suffix == ".json" and chance.random() < 0.5:
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


# Untrusted folders: links that lead out, FIFOs, sockets and devices where files are expected


def damage_untrusted(folder: Path, chance: random.Random) -> None:
    outside = folder.with_name(folder.name + ".outside")
    outside.write_text("theirs\n")
    names = [*(file.relative_to(folder) for file in files_of(folder)), Path("lock")]
    file = folder / chance.choice(names)
    file.unlink(missing_ok=True)
    way = chance.randrange(5)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.symlink_to(outside)
    elif way == 2:
        file.symlink_to("/dev/zero")
    elif way == 3:
        file.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()
            os.chdir(file.parent)
            opened.bind(file.name)
            os.chdir(here)


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


KINDS = {
    "run": Kind(make_run, damage_run, read_run),
    "toml": Kind(make_toml, flip_any, read_recipe),
    "checkpoint": Kind(make_checkpoint, damage_checkpoint, read_checkpoint),
    "store": Kind(make_store, damage_store, read_store),
    "export": Kind(make_export, damage_export, read_export),
    "untrusted": Kind(make_run, damage_untrusted, read_untrusted),
    "settings": SETTINGS_KIND,
    "config": CONFIG_KIND,
}
BASES: dict[str, Path] = {}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TooSlow inside when the time is over."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def failure_of(kind: Kind, folder: Path) -> str:
    """How a case did not survive; "" if it did."""
    try:
        with within(CASE_SECONDS):
            kind.read(folder)
    except (Exception, TooSlow):
        return traceback.format_exc()
    left = [path.name for path in folder.rglob("*.aside*")]
    return f"left lying: {left}" if left else ""


def fuzz(name: str, cases: int, seed: int, place: Path, kept: Path | None = None) -> list[str]:
    """Try the cases of a kind in a folder; how those failed that did not survive."""
    kind = KINDS[name]
    BASES[name] = place
    base = place / "base"
    kind.make(base)
    failures = []
    for number in range(cases):
        folder = place / "step-4"
        shutil.copytree(base, folder)
        kind.damage(folder, random.Random(f"{seed} {number}"))
        damaged = place / "damaged"
        if kept:
            shutil.copytree(folder, damaged, symlinks=True, copy_function=copy_if_regular)
        failure = failure_of(kind, folder)
        if failure:
            failures.append(f"{name}, seed {seed}, case {number}: {failure}")
        if failure and kept:
            shutil.move(damaged, kept / f"{name}-{seed}-{number}")
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.rmtree(folder)
    return failures


def copy_if_regular(source: str, target: str) -> None:
    """Copy a file; a FIFO or socket would be waited for."""
    if os.path.isfile(source):
        shutil.copy(source, target)


def main() -> int:
    """Print what was tried and what survived; the exit code is 1 where something did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), metavar="FOLDER")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        failures = fuzz(options.kind, options.cases, options.seed, Path(place), options.keep)
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    survived = options.cases - len(failures)
    print(f"{options.kind}: {options.cases} tried, {survived} survived, seed {options.seed}")
    if not failures and not any(options.keep.iterdir()):
        options.keep.rmdir()
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
