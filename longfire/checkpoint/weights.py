"""Open a model wherever its weights are: in a run folder (any whole checkpoint, also while it
trains) or a Hugging Face folder."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from longfire import initialise
from longfire.checkpoint.folder import steps
from longfire.checkpoint.provenance import (
    LANGUAGE_MODELING,
    RUN_TOML,
    run_folder_of,
    step_of,
    task_of,
)
from longfire.checkpoint.restoring import OnDisk, load_model_weights, refuse_another_vocabulary
from longfire.config import settings, shipped
from longfire.config.model_config import ModelConfig
from longfire.config.paths import may_be_on_hub
from longfire.config.read_model import model_config_of, read_model_config
from longfire.config.rules.tasks import refuse_other_tasks
from longfire.config.run import Run
from longfire.config.transformers_config import TransformersConfig
from longfire.data import tokenizer_training
from longfire.data.text import shares, sources
from longfire.data.tokenizer import Tokenizer, from_folder
from longfire.device import choose_device, choose_dtype
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface import transformers_model
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.hub_models import model_folder
from longfire.huggingface.load import load_model, model_of
from longfire.listing import exists, is_folder
from longfire.model import Model
from longfire.ops.choice import choose, choose_where_nobody_has
from longfire.plugins import load_plugins

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Opened:
    """A model on its device with its tokenizer; run and step: the origin of a model of a run
    folder.

    A model of the transformers backend is a TransformersModel, which has the attributes of a Model
    that evaluation and generation use.
    """

    model: Model
    tokenizer: Tokenizer
    run: Run | None = None
    step: int = -1

    def fingerprint(self) -> str:
        """Of the weights as they are used: names and values; the same for a checkpoint and its fp32
        export."""
        return fingerprint_of(self.model)


def fingerprint_of(model: Model) -> str:
    """Of the names and values of a model's weights."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
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
    if isinstance(config, ModelConfig):
        model_config = config
    else:
        model_config = read_model_config(config_named(config))
    model_config = model_config_of(model_config.to_dict(), "ModelConfig")
    if not model_config.vocab_size:
        raise SettingsError(
            "vocab_size = 0 of the model's config leaves the vocabulary open: give build "
            "config.with_vocabulary(tokenizer.vocab_size)"
        )
    choose_where_nobody_has(torch.device(device))
    return initialise.build(model_config, seed, device, compute_dtype)


def config_named(name: str | Path) -> Path:
    """The file or folder of a model config. Raises SettingsError with the nearest name."""
    shipped_config = shipped.model_config(str(name))
    if exists(Path(name)) or shipped_config is None:
        return Path(name)
    return shipped_config


def load(
    folder: str | Path,
    step: int = -1,
    plugins: Sequence[str] = (),
) -> tuple[Model, Tokenizer]:
    """The model and the tokenizer of a run folder, of a folder of Hugging Face weights or of a name
    on the hub, on the device and in the compute type of the run, else on the best that is there.

    step: of a run, the step of the checkpoint; -1: of the newest complete one. plugins: your own
    Python files that the model's mixers come from; they are run. Raises CheckpointError,
    SettingsError or DataError naming what is missing.
    """
    if not exists(Path(folder)) and shipped.model_config(str(folder)):
        raise SettingsError(
            f"{folder} is a model config that comes with longfire, without weights: "
            f"longfire.build({str(folder)!r}) makes a fresh model of it"
        )
    opened = open_model(Path(folder), step, plugins=tuple(plugins))
    return opened.model, opened.tokenizer


def open_model(
    folder: Path,
    step: int = -1,
    plugins: tuple[str, ...] = (),
    training: settings.Training | None = None,
) -> Opened:
    """The model in a run folder (step -1: of the newest whole checkpoint), in a folder of Hugging
    Face weights, or of a name on the hub.

    On the device of `training` and in the compute type of the run. training: None for the run's
    own, or the best device that is there. plugins: the user's own files that its mixers come from
    (they are run). Raises CheckpointError, SettingsError or DataError naming what is missing.
    """
    if may_be_on_hub(str(folder)):
        folder = model_folder(str(folder))
    if not is_folder(folder):
        raise SettingsError(
            f"{folder}: no such folder; name a run folder, a folder of Hugging Face weights, or a "
            "model of the hub"
        )
    if not exists(folder / RUN_TOML):
        return open_weights(folder, step, plugins, training or settings.Training())
    run = run_of(folder, plugins)
    device, dtype = choose_place(training or run.training, run.model)
    checkpoints = run.folder / run.checkpoint.folder
    tokenizer = tokenizer_of(run)
    if step < 0:
        step, weights = newest_weights(checkpoints)
    else:
        weights = load_model_weights(checkpoints / f"step-{step}")
    refuse_another_vocabulary(checkpoints / f"step-{step}", tokenizer.vocabulary, tokenizer.where)
    config = run.model_config_after(step).with_vocabulary(tokenizer.vocab_size)
    refuse_not_finite(weights, str(checkpoints / f"step-{step}"))
    if isinstance(config, TransformersConfig):
        model = as_model(transformers_model.model_of(config, weights, device, dtype))
    else:
        model = model_of(config, weights, device, dtype)
    return Opened(model, tokenizer, run, step)


def open_weights(
    folder: Path,
    step: int,
    plugins: tuple[str, ...],
    training: settings.Training,
) -> Opened:
    """The model in a folder of Hugging Face weights. Raises as `open_model`."""
    check_weights_folder(folder, step)
    load_plugins(plugins)
    check_checksums(folder)
    device, dtype = choose_place(training, settings.Model())
    model, tokenizer = load_model(folder, device, dtype)
    refuse_not_finite(model.state_dict(), str(folder))
    return Opened(as_model(model), tokenizer)


def check_weights_folder(folder: Path, step: int = -1) -> None:
    """Raises SettingsError for a folder that is no folder of Hugging Face weights of a language
    model, or a step, which only runs have."""
    run_folder = run_folder_of(folder)
    if run_folder:
        raise SettingsError(
            f"{folder} is a checkpoint of a run: name its run folder, {run_folder}; "
            f"--step {step_of(folder)} chooses the checkpoint"
        )
    if step >= 0:
        raise SettingsError(
            f"{folder}: --step {step} chooses a checkpoint of a run, but this is a folder of "
            "Hugging Face weights; leave --step out, or name the run folder"
        )
    if task_of(folder) != LANGUAGE_MODELING:
        raise SettingsError(
            f"{folder}: this command is for language models, and this is a model of images: "
            f"{commands_of_classifiers(folder)}"
        )


def as_model(model: Model | transformers_model.TransformersModel) -> Model:
    """The same, under the type that its users know (`Opened`)."""
    return cast(Model, model)


def choose_place(
    training: settings.Training,
    model: settings.Model,
    local_rank: int = 0,
) -> tuple[torch.device, torch.dtype]:
    """Device and compute type, after the kernels have been chosen for that device. local_rank: of
    this process on its machine."""
    device = choose_device(training, local_rank)
    choose(device, model.kernels)
    return device, choose_dtype(model, device)[0]


def newest_weights(checkpoints: Path) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of the newest complete checkpoint; the folder is only read."""
    return newest_readable(checkpoints, load_model_weights)


def weights_of_run(
    weights: Path,
    wanted: dict[str, torch.Size],
    without: Collection[str] = ("head.weight",),
) -> tuple[Path, Iterator[tuple[str, Tensor]]]:
    """The checkpoint that is meant by a run folder (its newest) or by a checkpoint in one, and
    (name, fp32 tensor) of each wanted parameter.

    wanted: name and shape of each parameter of the model. without: what the checkpoint may have
    beside them: a model that ties its head needs none. Raises CheckpointError, or SettingsError
    naming what differs.
    """
    if step_of(weights) is None:
        checkpoints = weights / Run.of_folder(weights).checkpoint.folder
        step, stored = newest_weights(checkpoints)
        place = checkpoints / f"step-{step}"
    else:
        place = weights
        stored = load_model_weights(place)
    there: dict[str, torch.Size] = {}
    for name, tensor in stored.items():
        if name in wanted or name not in without:
            there[name] = tensor.shape
    differs = sorted(name for name in {**wanted, **there} if wanted.get(name) != there.get(name))
    if differs:
        config = (run_folder_of(weights) or weights) / "config.json"
        raise SettingsError(
            f"model.weights = {str(weights)!r}: {', '.join(differs[:4])} of {place.name} are not "
            f"those of model.config; name the run's own, {config}, and its model.backend"
        )
    return place, ((name, stored[name]) for name in wanted)


def finite(weights: Iterable[tuple[str, Tensor]], where: str) -> Iterator[tuple[str, Tensor]]:
    """The same weights, each checked before it is given. Raises CheckpointError naming one that
    holds NaN or infinity: a model with such a weight gives NaN for every text."""
    for name, tensor in weights:
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise CheckpointError(
                f"{where}: {wrong:,} of {tensor.numel():,} numbers of {name} are NaN or "
                "infinite: the weights are broken, or their training diverged; take an earlier "
                "checkpoint, or fetch them again"
            )
        yield name, tensor


def refuse_not_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError as `finite`."""
    for _ in finite(weights.items(), where):
        pass


def weights_on_disk(checkpoints: Path, step: int) -> tuple[int, OnDisk]:
    """Step (-1: the newest) and weights of a checkpoint, none of which is in memory. Raises
    CheckpointError."""
    if step < 0:
        return newest_readable(checkpoints, OnDisk.at)
    return step, OnDisk.at(checkpoints / f"step-{step}")


def newest_readable(checkpoints: Path, read: Callable[[Path], Found]) -> tuple[int, Found]:
    """Step of the newest checkpoint that can be read, and what was read. A run that trains
    meanwhile may add and remove some: the folder is listed again after each that could not be
    read. Raises CheckpointError when none could."""
    errors: dict[int, str] = {}
    while True:
        untried = [step for step in steps(checkpoints) if step not in errors]
        if not untried:
            break
        step = untried[-1]
        try:
            return step, read(checkpoints / f"step-{step}")
        except (CheckpointError, OSError) as error:
            errors[step] = str(error)
            logger.info(f"{error}; looking for another one")
    reasons = f" ({'; '.join(errors.values())})" if errors else ""
    raise CheckpointError(
        f"{checkpoints}: there is no complete checkpoint{reasons}; train first, or name another "
        "run folder"
    )


def run_of(folder: Path, plugins: tuple[str, ...]) -> Run:
    """The run of a run folder, which is only read. Raises as `Run.of_folder`."""
    overrides = {"model.plugins": ",".join(plugins)} if plugins else {}
    run = Run.of_folder(folder, overrides)
    refuse_other_tasks(run, f"{folder}: this command", commands_of_classifiers(folder))
    return run


def commands_of_classifiers(folder: Path) -> str:
    """What can be done with a classifier, in words."""
    return (
        f"`longfire eval {folder}` measures its accuracy, `longfire eval {folder} --predict FILE` "
        "names the class of a file"
    )


def tokenizer_of(run: Run) -> Tokenizer:
    """The tokenizer that a run trains with: the copy in its folder, else the one that its settings
    name."""
    if is_folder(run.tokenizer_folder):
        return from_folder(run.tokenizer_folder)
    return tokenizer_training.load(run.tokenizer, sources(run.data), shares(run.data), run.data)
