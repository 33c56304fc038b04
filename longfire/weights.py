"""Open a model wherever its weights lie: in a run folder (any whole checkpoint, also while it trains) or a Hugging Face folder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from longfire import ops, settings
from longfire.checkpoint import checked_facts, index_of, load_model_weights, steps
from longfire.data import tokenizer as tokenizers
from longfire.data.text import shares, sources
from longfire.data.tokenizer import Tokenizer
from longfire.device import choose_device, choose_dtype
from longfire.errors import CheckpointError, SettingsError
from longfire.hub import foreign
from longfire.hub.load import load_model, model_of
from longfire.model import Model
from longfire.run import RUN_TOML, Run
from longfire.shards import Reader


@dataclass(frozen=True)
class Opened:
    """A model on its device with its tokenizer; run and step: where it came from, if from a run folder."""

    model: Model | foreign.Foreign
    tokenizer: Tokenizer
    run: Run | None = None
    step: int = -1

    def fingerprint(self) -> str:
        """Of the weights as they are used: names and values; the same for a checkpoint and its fp32 export."""
        digest = blake2b(digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def open_model(
    folder: Path, step: int = -1, note: Callable[[str], None] = print, plugins: tuple[str, ...] = ()
) -> Opened:
    """The model in a run folder (step -1: of the newest whole checkpoint) or in a folder of Hugging Face weights.

    On the device and in the compute type of the run; elsewhere the best that is there. plugins: the user's own files that its
    mixers come from (they are run). Raises CheckpointError, SettingsError or DataError naming what is missing.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder; name a run folder, or a folder of Hugging Face weights")
    if not (folder / RUN_TOML).exists():
        if step >= 0:
            raise SettingsError(
                f"{folder}: --step {step} chooses a checkpoint of a run, but this is a folder of Hugging Face weights; leave "
                "--step out, or name the run folder"
            )
        device, dtype = place(settings.Training(), settings.Model())
        return Opened(*load_model(folder, device, dtype))
    run = Run.of_folder(folder, {"model.plugins": ",".join(plugins)} if plugins else {}, note=note)
    device, dtype = place(run.training, run.model)
    checkpoints, tokenizer = run.folder / run.checkpoint.folder, tokenizer_of(run)
    if step < 0:
        step, weights = newest_weights(checkpoints, note)
    else:
        weights = load_model_weights(checkpoints / f"step-{step}")
    shape = run.shape.with_vocabulary(tokenizer.vocab_size)
    made = foreign.model_of if run.model.backend == "transformers" else model_of
    return Opened(made(shape, weights, device, dtype), tokenizer, run, step)


def place(training: settings.Training, model: settings.Model) -> tuple[torch.device, torch.dtype]:
    """Device and compute type, with the kernels chosen."""
    device = choose_device(training)
    ops.choose(device, model.kernels)
    return device, choose_dtype(model, device)[0]


def newest_weights(checkpoints: Path, note: Callable[[str], None] = print) -> tuple[int, dict[str, Tensor]]:
    """Step and weights of the newest whole checkpoint, only read. A run that trains meanwhile may add and remove some: the
    folder is looked at again after each that could not be read. Raises CheckpointError when none could."""
    tried: dict[int, str] = {}
    while left := [step for step in steps(checkpoints) if step not in tried]:
        try:
            return left[-1], load_model_weights(checkpoints / f"step-{left[-1]}")
        except (CheckpointError, OSError) as e:
            tried[left[-1]] = str(e)
            note(f"{e}; looking for another one")
    raise CheckpointError(
        f"{checkpoints}: no whole checkpoint is there" + (f" ({'; '.join(tried.values())})" if tried else "")
        + "; train first, or name another run folder"
    )  # fmt: skip


@contextmanager
def weights_on_disk(checkpoints: Path, step: int) -> Iterator[tuple[int, "OnDisk"]]:
    """Step (-1: the newest) and weights of a checkpoint, none of which is in memory. Raises CheckpointError."""
    step = newest_step(checkpoints) if step < 0 else step
    checked_facts(checkpoints / f"step-{step}")
    with Reader(index_of(checkpoints / f"step-{step}")) as reader:
        yield step, OnDisk(reader)


def newest_step(checkpoints: Path) -> int:
    """Raises CheckpointError if there is none."""
    if not (found := steps(checkpoints)):
        raise CheckpointError(f"{checkpoints}: no whole checkpoint is there; train first, or name another run folder")
    return found[-1]


class OnDisk(Mapping[str, Tensor]):
    """Parameters by the model's own names, each read when it is asked for."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.names = [name.removeprefix("model/") for name in reader.index if name.startswith("model/")]

    def __getitem__(self, name: str) -> Tensor:
        return self.reader.whole(f"model/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def tokenizer_of(run: Run) -> Tokenizer:
    """The tokenizer that a run trains with: the copy in its folder, else as its settings name it."""
    if run.tokenizer_folder.is_dir():
        return tokenizers.from_folder(run.tokenizer_folder)
    return tokenizers.load(run.tokenizer, sources(run.data), shares(run.data), run.data)
