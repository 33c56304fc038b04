"""Hugging Face weights -> a run folder, from which train, eval, generate and export go on; written
aside, read again and compared with their own class before it appears under its name."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HTTPError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longfire.checkpoint.checkpoint import (
    COUNTERS,
    FORMAT,
    checksum,
    load_model_weights,
    settled,
    write_manifest,
)
from longfire.checkpoint.shards import shard_files
from longfire.checkpoint.weights import finite
from longfire.config import settings
from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.disk import put_in_place
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.check import Check, compare_imported
from longfire.huggingface.checksums import SUMS, check_checksums
from longfire.huggingface.families import family_of, ignored_line
from longfire.huggingface.load import model_config_in, read_weights
from longfire.huggingface.model_card import without_folders
from longfire.huggingface.tensors import layout
from longfire.plugins import load_plugins

Note = Callable[[str], None]
NOTE_SECONDS = 10  # between lines of progress where there is no terminal
PROBE_SECONDS = 10  # how long the hub may take to answer at all

# What is fetched of a repository. No code, and PyTorch's own files only where there is nothing
# else.
DESCRIBED = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    SUMS,
    "additional_chat_templates/*.jinja",
]
SAFE, BIN = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)

# How a run begins that goes on with a trained model: a fresh optimizer must not move it far before
# it knows its gradients.
SEQ_LEN, LEARNING_RATE, WARMUP_STEPS = 2048, 5e-5, 20
SHARD_BYTES = 1_000_000_000  # of a file of weights that are written as they are read


def adopt(source: str, folder: Path, note: Note = print, plugins: tuple[str, ...] = ()) -> Check:
    """Make `folder` a run whose step 0 is the model in `source`, a folder or a name on the hub;
    what was compared is returned.

    plugins: the user's own files that its mixers come from (they are run).

    Raises SettingsError naming what we cannot express, CheckpointError for weights that are
    damaged, missing, more than the model has, or other than their class computes with, DataError
    for the tokenizer. Nothing is left behind then.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SettingsError(f"{folder}: already there; name a new folder, or remove it")
    load_plugins(plugins)
    theirs = found(source, note)
    check_checksums(theirs, note, whole=Path(source).expanduser().is_dir())
    model_config, tokenizer = model_config_in(theirs), from_folder(theirs)
    for line in ignored_line(read_config(theirs), str(theirs)):
        note(line)
    for line in compare_words(tokenizer, model_config, theirs):
        note(line)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        run = new_run(theirs, source, folder, model_config, tokenizer, plugins)
        aside.mkdir(parents=True)
        run.write(aside)
        tokenizer.save(aside / run.tokenizer_folder.name)
        place = aside / run.checkpoint.folder / "step-0"
        read = shown(
            finite(read_weights(theirs, model_config), str(theirs)),
            count(theirs, model_config),
            note,
        )
        begin_with(read, place, vocabulary=tokenizer.vocabulary)
        check = compare_imported(load_model_weights(place), tokenizer, theirs, model_config)
        put_in_place(aside, folder)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder}: the run could not be written ({e}); nothing that was there has changed"
        ) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return check


def found(source: str, note: Note) -> Path:
    """The folder that holds the source: itself, or where the hub's files lie. Raises SettingsError
    when it is neither."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise SettingsError(
            f"{source}: no such folder; name one that holds config.json and weights, or a model of the hub"
        )
    note(f"{source} is no folder here: fetching it from the hub")
    try:
        fetched = Path(snapshot(source, [*DESCRIBED, *SAFE]))
        if not any(fetched.glob("*.safetensors")):
            fetched = Path(snapshot(source, [*DESCRIBED, *BIN]))
    except (HTTPError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise SettingsError(
            f"{source} is no folder here, and as a model of the hub it cannot be had ({reason}); check the name and the network, "
            "or fetch its files on a machine that has one (`hf download`) and name their folder"
        ) from e
    return fetched


def snapshot(source: str, patterns: list[str]) -> str:
    return huggingface_hub.snapshot_download(
        source, allow_patterns=patterns, etag_timeout=PROBE_SECONDS
    )


def compare_words(tokenizer: Tokenizer, model_config: ModelConfig, where: Path) -> Iterator[str]:
    """What is to be told of the tokenizer beside the embedding. Raises SettingsError when it has
    words without a row."""
    words, rows = tokenizer.vocab_size, model_config.vocab_size
    if words > rows:
        raise SettingsError(
            f"{where}: its tokenizer has {words:,} words, its embedding {rows:,} rows, so some texts have no vectors; these "
            "files do not belong together"
        )
    if words < rows:
        yield f"the tokenizer has {words:,} words, the embedding {rows:,} rows: the last {rows - words:,} are never read"


def new_run(
    theirs: Path,
    source: str,
    folder: Path,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    plugins: tuple[str, ...] = (),
) -> Run:
    """The settings that the run begins with; data are named when it is trained. Raises
    SettingsError."""
    said = {
        "job.dump_folder": folder,
        "job.description": f"imported from {without_folders(source)} ({read_config(theirs)['model_type']})",
        "model.config": theirs,
        "model.weights": folder.absolute() / settings.Checkpoint().folder / "step-0",
        "tokenizer.path": folder.absolute() / "tokenizer",
        "tokenizer.add_bos": tokenizer.adds_bos,
        "tokenizer.add_eos": tokenizer.eos_id is not None,
        "training.seq_len": min(SEQ_LEN, model_config.max_position_embeddings or SEQ_LEN),
        "optimizer.lr": LEARNING_RATE,
        "lr_scheduler.warmup_steps": WARMUP_STEPS,
    }
    if plugins:
        said["model.plugins"] = ",".join(str(Path(file).absolute()) for file in plugins)
    given = {
        key: str(value).lower() if value in (True, False) else str(value)
        for key, value in said.items()
    }
    return Run.compose(None, given, planned=True)  # its weights are not there yet


def begin_with(
    weights: Iterable[tuple[str, Tensor]],
    place: Path,
    shard_bytes: int = SHARD_BYTES,
    vocabulary: str = "",
) -> None:
    """Write step 0 of weights alone (name, fp32), as they come: at most `shard_bytes` of them are
    in memory, or one tensor.

    `place` is a folder of a run that is not yet in its own place: nobody reads it before it is
    whole. vocabulary: of the tokenizer beside it. Raises OSError.
    """
    place.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    shards = 0
    for name, tensor in chain(weights, [("", None)]):
        full = sum(t.numel() * t.element_size() for t in shard.values()) + (
            0 if tensor is None else tensor.nbytes
        )
        if shard and (tensor is None or full > shard_bytes):
            shards += 1
            save_file(shard, place / f"shard-{shards:05d}.safetensors")
            shard = {}
        if tensor is not None:
            shard[f"model/{name}"] = tensor
    files = {path.name: settled(path, checksum(path)) for path in shard_files(place)}
    facts = {
        "format": FORMAT,
        "torch": torch.__version__,
        "weights_only": True,
        **dict.fromkeys(COUNTERS, 0),
    }
    facts["vocabulary"] = vocabulary
    write_manifest(place, facts, files)


def count(theirs: Path, model_config: ModelConfig) -> int:
    """Parameters of the model; a tied head is the embedding."""
    family = family_of(read_config(theirs), str(theirs))
    return sum(math.prod(stored.shape) for stored in layout(family, model_config).values())


def shown(
    weights: Iterator[tuple[str, Tensor]], total: int, note: Note
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, with their number told as they pass: a bar on a terminal, else a line now
    and then."""
    console = Console(stderr=True)
    columns = (
        TextColumn("import"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task, done, told = bar.add_task("", total=total), 0, time.monotonic()
        for name, tensor in weights:
            yield name, tensor
            done += tensor.numel()
            said = f"{done / 1e6:,.0f} of {total / 1e6:,.0f}M parameters"
            bar.update(task, completed=done, description=said)
            if bar.disable and time.monotonic() - told > NOTE_SECONDS:
                told = time.monotonic()
                note(f"import: {said}")
