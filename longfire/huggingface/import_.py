"""Hugging Face weights -> a run folder, which train, eval, generate and export can use. It is
written under a temporary name, read again and compared with their own class before it gets its own
name."""

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longfire.aside import folder_aside, remove_abandoned
from longfire.checkpoint.folder import FORMAT, Facts, checksum, settled, write_manifest
from longfire.checkpoint.provenance import IMAGES, task_of
from longfire.checkpoint.restoring import load_model_weights
from longfire.checkpoint.shards import shard_files
from longfire.checkpoint.weights import finite
from longfire.config import settings
from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run
from longfire.config.run_folder import write
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.disk import put_in_place
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.check import Check, compare_imported
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.families import family_of, ignored_line
from longfire.huggingface.hub_models import model_folder
from longfire.huggingface.load import model_config_in, read_weights
from longfire.huggingface.model_card import without_folders
from longfire.huggingface.tensors import layout
from longfire.listing import names_in
from longfire.plugins import load_plugins
from longfire.work_progress import WorkProgress

logger = logging.getLogger(__name__)
Weights = Iterator[tuple[str, Tensor]]  # (name, fp32)
# The settings of a run that continues with a trained model: a fresh optimizer must not move it far
# before it knows its gradients.
SEQ_LEN = 2048
LEARNING_RATE = 5e-5
WARMUP_STEPS = 20
SHARD_BYTES = 1_000_000_000  # of a file of weights, which are written as they are read


def import_hf(source: str, folder: Path, plugins: tuple[str, ...] = ()) -> Check:
    """Make `folder` a run whose step 0 is the model in `source`, a folder or a name on the hub.
    Returns what was compared.

    plugins: the user's own files that its mixers come from (they are run).

    Raises SettingsError naming what longfire cannot express, CheckpointError for weights that are
    damaged, missing, more than the model has, or other than their class computes with, DataError
    for the tokenizer. Nothing is left behind then.
    """
    folder = Path(folder)
    remove_abandoned(folder.parent, folder.name)
    if folder.exists() and not (folder.is_dir() and not names_in(folder)):
        raise SettingsError(f"{folder}: already there; name a new folder, or remove it")
    load_plugins(plugins)
    theirs = model_folder(source)
    if task_of(theirs) == IMAGES:
        raise SettingsError(
            f"{source}: a model of images needs no import, since a run is begun with its data: "
            f"`longfire train --job.task {IMAGES} --model.config {source} --model.weights {source} "
            f"--data.dataset FOLDER` trains it on, `longfire eval {source} --data FOLDER` "
            "evaluates it"
        )
    check_checksums(theirs, whole=Path(source).expanduser().is_dir())
    model_config = model_config_in(theirs)
    tokenizer = from_folder(theirs)
    for line in ignored_line(read_config(theirs), str(theirs)):
        logger.info(line)
    compare_vocabulary(tokenizer, model_config, theirs)
    try:
        with folder_aside(folder) as tmp_path:
            run = new_run(theirs, source, folder, model_config, tokenizer, plugins)
            write(run, tmp_path)
            tokenizer.save(tmp_path / run.tokenizer_folder.name)
            place = tmp_path / run.checkpoint.folder / "step-0"
            weights = finite(read_weights(theirs, model_config), str(theirs))
            weights = with_progress(weights, count_parameters(theirs, model_config))
            write_step_0(weights, place, vocabulary=tokenizer.vocabulary)
            check = compare_imported(load_model_weights(place), tokenizer, theirs, model_config)
            put_in_place(tmp_path, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the run could not be written ({error}); nothing that was there has changed"
        ) from error
    return check


def compare_vocabulary(tokenizer: Tokenizer, model_config: ModelConfig, where: Path) -> None:
    """Log where the embedding has rows without a token. Raises SettingsError when the tokenizer
    has tokens without a row."""
    tokens = tokenizer.vocab_size
    rows = model_config.vocab_size
    if tokens > rows:
        raise SettingsError(
            f"{where}: its tokenizer has {tokens:,} tokens, its embedding {rows:,} rows, so some "
            "texts have no vectors; these files do not belong together"
        )
    if tokens < rows:
        logger.info(
            f"the tokenizer has {tokens:,} tokens, the embedding {rows:,} rows: the last "
            f"{rows - tokens:,} are never read"
        )


def new_run(
    theirs: Path,
    source: str,
    folder: Path,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    plugins: tuple[str, ...] = (),
) -> Run:
    """The settings of the new run; data are named when it is trained. Raises SettingsError."""
    model_type = read_config(theirs)["model_type"]
    given = {
        "job.dump_folder": str(folder),
        "job.description": f"imported from {without_folders(source)} ({model_type})",
        "model.config": str(theirs),
        "model.weights": str(folder.absolute() / settings.Checkpoint().folder / "step-0"),
        "tokenizer.path": str(folder.absolute() / "tokenizer"),
        "tokenizer.add_bos": str(tokenizer.adds_bos).lower(),
        "tokenizer.add_eos": str(tokenizer.eos_id is not None).lower(),
        "training.seq_len": str(min(SEQ_LEN, model_config.max_position_embeddings or SEQ_LEN)),
        "optimizer.lr": str(LEARNING_RATE),
        "lr_scheduler.warmup_steps": str(WARMUP_STEPS),
    }
    if plugins:
        given["model.plugins"] = ",".join(str(Path(file).absolute()) for file in plugins)
    return Run.compose(None, given, planned=True)  # its weights do not exist yet


def write_step_0(
    weights: Iterable[tuple[str, Tensor]],
    place: Path,
    shard_bytes: int = SHARD_BYTES,
    vocabulary: str = "",
) -> None:
    """Write weights (name, fp32) as the checkpoint of step 0, as they come: at most `shard_bytes`
    of them are in memory, or one tensor.

    place: in a run folder that does not have its own name yet, so that nobody reads an incomplete
    checkpoint. vocabulary: of the tokenizer beside it. Raises OSError.
    """
    place.mkdir(parents=True)
    for number, shard in enumerate(shards_of(weights, shard_bytes), 1):
        save_file(shard, place / f"shard-{number:05d}.safetensors")
    files = {path.name: settled(path, checksum(path)) for path in shard_files(place)}
    facts: Facts = {
        "format": FORMAT,
        "torch": torch.__version__,
        "weights_only": True,
        "step": 0,
        "rows_consumed": 0,
        "tokens": 0,
        "skipped_steps": 0,
        "elapsed_seconds": 0,
        "vocabulary": vocabulary,
    }
    write_manifest(place, facts, files)


def shards_of(
    weights: Iterable[tuple[str, Tensor]],
    shard_bytes: int,
) -> Iterator[dict[str, Tensor]]:
    """The weights under the names of a checkpoint, in shards of at most `shard_bytes`, or of one
    tensor."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
            size = 0
        shard[f"model/{name}"] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def count_parameters(theirs: Path, model_config: ModelConfig) -> int:
    """Parameters of the model; a tied head is the embedding."""
    family = family_of(read_config(theirs), str(theirs))
    count = 0
    for stored in layout(family, model_config).values():
        count += math.prod(stored.shape)
    return count


def with_progress(weights: Weights, total: int) -> Weights:
    """The same weights, while their number is shown. total: all parameters."""
    with WorkProgress("import", total, "parameters") as progress:
        for name, tensor in weights:
            yield name, tensor
            progress.add(tensor.numel())
