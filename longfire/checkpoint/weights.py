"""Open a model wherever its weights lie: in a run folder (any whole checkpoint, also while it
trains) or a Hugging Face folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from longfire import initialise, ops
from longfire.checkpoint.checkpoint import (
    OnDisk,
    checked_index,
    load_model_weights,
    refuse_another_vocabulary,
    steps,
)
from longfire.checkpoint.provenance import RUN_TOML, run_folder_of, step_of
from longfire.config import settings, shipped
from longfire.config.model_config import ModelConfig
from longfire.config.run import Run, model_config_of, read_model_config
from longfire.data import tokenizer_training
from longfire.data.text import shares, sources
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.device import choose_device, choose_dtype
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface import transformers_model
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.load import load_model, model_of
from longfire.model import Model
from longfire.plugins import load_plugins

Found = TypeVar("Found")


@dataclass(frozen=True)
class Opened:
    """A model on its device with its tokenizer; run and step: where it came from, if from a run
    folder."""

    model: Model | transformers_model.TransformersModel
    tokenizer: Tokenizer
    run: Run | None = None
    step: int = -1

    def fingerprint(self) -> str:
        """Of the weights as they are used: names and values; the same for a checkpoint and its fp32
        export."""
        digest = blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def build(
    config: ModelConfig | str | Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Model:
    """A fresh model. Each parameter begins by (seed, its name, its shape), so that the same seed
    gives the same model on every device. Parameters are float32; compute_dtype is the type of
    activations and matrix products.

    config: a ModelConfig, a config.json of ours or of a Hugging Face family, or the name of a
    config that comes with longfire, as "gla-340m". Raises SettingsError where it names an unknown
    mixer or a wrong setting, or leaves the size of the vocabulary open.
    """
    model_config = (
        config if isinstance(config, ModelConfig) else read_model_config(config_named(config))
    )
    model_config = model_config_of(model_config.to_dict(), "ModelConfig")
    if not model_config.vocab_size:
        raise SettingsError(
            "vocab_size = 0 of the model's config leaves the vocabulary open: give build "
            "config.with_vocabulary(tokenizer.vocab_size)"
        )
    ops.choose_where_nobody_has(torch.device(device))
    return initialise.build(model_config, seed, device, compute_dtype)


def config_named(name: str | Path) -> Path:
    """The file or folder of a model config. Raises SettingsError with the nearest name."""
    shipped_config = shipped.model_config(str(name))
    if Path(name).exists() or shipped_config is None:
        return Path(name)
    return shipped_config


def load(
    folder: str | Path, step: int = -1, plugins: Sequence[str] = ()
) -> tuple[Model | transformers_model.TransformersModel, Tokenizer]:
    """The model and the tokenizer of a run folder or of a folder of Hugging Face weights, on the
    device and in the compute type of the run, else on the best that is there.

    step: of a run, the step of the checkpoint; -1: of the newest complete one. plugins: your own
    Python files that the model's mixers come from; they are run. Raises CheckpointError,
    SettingsError or DataError naming what is missing.
    """
    if not Path(folder).exists() and shipped.model_config(str(folder)):
        raise SettingsError(
            f"{folder} is a model config that comes with longfire, without weights: "
            f"longfire.build({str(folder)!r}) makes a fresh model of it"
        )
    opened = open_model(Path(folder), step, plugins=tuple(plugins))
    return opened.model, opened.tokenizer


def open_model(
    folder: Path, step: int = -1, note: Callable[[str], None] = print, plugins: tuple[str, ...] = ()
) -> Opened:
    """The model in a run folder (step -1: of the newest whole checkpoint) or in a folder of Hugging
    Face weights.

    On the device and in the compute type of the run; elsewhere the best that is there. plugins: the
    user's own files that its mixers come from (they are run). Raises CheckpointError, SettingsError
    or DataError naming what is missing.
    """
    if not folder.is_dir():
        raise SettingsError(
            f"{folder}: no such folder; name a run folder, or a folder of Hugging Face weights"
        )
    if not (folder / RUN_TOML).exists():
        run_folder = run_folder_of(folder)
        if run_folder:
            raise SettingsError(
                f"{folder} is a checkpoint of a run: name its run folder, {run_folder}; --step {step_of(folder)} chooses the "
                "checkpoint"
            )
        if step >= 0:
            raise SettingsError(
                f"{folder}: --step {step} chooses a checkpoint of a run, but this is a folder of Hugging Face weights; leave "
                "--step out, or name the run folder"
            )
        load_plugins(plugins)
        check_checksums(folder, note)
        device, dtype = place(settings.Training(), settings.Model())
        model, tokenizer = load_model(folder, device, dtype)
        list(finite(model.state_dict().items(), str(folder)))
        return Opened(model, tokenizer)
    run = run_of(folder, plugins, note)
    device, dtype = place(run.training, run.model)
    checkpoints, tokenizer = run.folder / run.checkpoint.folder, tokenizer_of(run)
    if step < 0:
        step, weights = newest_weights(checkpoints, note)
    else:
        weights = load_model_weights(checkpoints / f"step-{step}")
    refuse_another_vocabulary(checkpoints / f"step-{step}", tokenizer.vocabulary, tokenizer.where)
    config = run.model_config_after(step).with_vocabulary(tokenizer.vocab_size)
    list(finite(weights.items(), str(checkpoints / f"step-{step}")))
    made = transformers_model.model_of if run.model.backend == "transformers" else model_of
    return Opened(made(config, weights, device, dtype), tokenizer, run, step)


def place(training: settings.Training, model: settings.Model) -> tuple[torch.device, torch.dtype]:
    """Device and compute type, with the kernels chosen."""
    device = choose_device(training)
    ops.choose(device, model.kernels)
    return device, choose_dtype(model, device)[0]


def newest_weights(
    checkpoints: Path, note: Callable[[str], None] = print
) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of the newest whole checkpoint, only read."""
    return newest_readable(checkpoints, load_model_weights, note)


def weights_of_run(
    weights: Path, wanted: dict[str, torch.Size]
) -> tuple[Path, Iterator[tuple[str, Tensor]]]:
    """The checkpoint that a run folder or a checkpoint in it means, and (name, fp32 tensor) of each
    parameter that is wanted, by name and shape. Raises CheckpointError, or SettingsError naming
    what differs."""
    if step_of(weights) is None:
        checkpoints = weights / Run.of_folder(weights).checkpoint.folder
        step, found = newest_weights(checkpoints)
        place = checkpoints / f"step-{step}"
    else:
        place = weights
        found = load_model_weights(place)
    there = {
        name: tensor.shape
        for name, tensor in found.items()
        if name in wanted or name != "head.weight"
    }
    differs = sorted(name for name in {**wanted, **there} if wanted.get(name) != there.get(name))
    if differs:
        config = (run_folder_of(weights) or weights) / "config.json"
        raise SettingsError(
            f"model.weights = {str(weights)!r}: {', '.join(differs[:4])} of {place.name} are not those of model.config; name the "
            f"run's own, {config}, and its model.backend"
        )
    return place, ((name, found[name]) for name in wanted)


def finite(weights: Iterable[tuple[str, Tensor]], where: str) -> Iterator[tuple[str, Tensor]]:
    """The same weights, each looked at as it passes. Raises CheckpointError naming one that holds
    NaN or infinity: a model that begins with it gives NaN for every text."""
    for name, tensor in weights:
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise CheckpointError(
                f"{where}: {wrong:,} of {tensor.numel():,} numbers of {name} are NaN or infinite: the weights are broken, or their "
                "training diverged; take an earlier checkpoint, or fetch them again"
            )
        yield name, tensor


def weights_on_disk(checkpoints: Path, step: int) -> tuple[int, OnDisk]:
    """Step (-1: the newest) and weights of a checkpoint, none of which is in memory. Raises
    CheckpointError."""
    step, index = (
        newest_readable(checkpoints, checked_index)
        if step < 0
        else (step, checked_index(checkpoints / f"step-{step}"))
    )
    return step, OnDisk(index)


def newest_readable(
    checkpoints: Path, read: Callable[[Path], Found], note: Callable[[str], None] = print
) -> tuple[int, Found]:
    """Step of the newest checkpoint that can be read, and what was read. A run that trains
    meanwhile may add and remove some: the folder is looked at again after each that could not be
    read. Raises CheckpointError when none could."""
    tried: dict[int, str] = {}
    while left := [step for step in steps(checkpoints) if step not in tried]:
        try:
            return left[-1], read(checkpoints / f"step-{left[-1]}")
        except (CheckpointError, OSError) as e:
            tried[left[-1]] = str(e)
            note(f"{e}; looking for another one")
    raise CheckpointError(
        f"{checkpoints}: no whole checkpoint is there"
        + (f" ({'; '.join(tried.values())})" if tried else "")
        + "; train first, or name another run folder"
    )


def run_of(folder: Path, plugins: tuple[str, ...], note: Callable[[str], None] = print) -> Run:
    """The run in a folder, for those who only read it. Raises as `Run.of_folder`."""
    return Run.of_folder(folder, {"model.plugins": ",".join(plugins)} if plugins else {}, note=note)


def tokenizer_of(run: Run) -> Tokenizer:
    """The tokenizer that a run trains with: the copy in its folder, else as its settings name
    it."""
    if run.tokenizer_folder.is_dir():
        return from_folder(run.tokenizer_folder)
    return tokenizer_training.load(run.tokenizer, sources(run.data), shares(run.data), run.data)
