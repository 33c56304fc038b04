"""The state of a run on disk: whole or not there, safetensors and JSON only, loadable on another layout.

<run>/checkpoints/step-N/
  shard-*.safetensors   model/<name>, optimizer/<what>/<name>, rng/<device>: torch's distributed checkpoint format in safetensors
  state.json            step, rows consumed, tokens, format version
  manifest.json         size and checksum of each file above; written last

Step 0 may hold weights alone, those of a model from elsewhere (`begin_with`): there is no optimizer state yet to go on with.

A checkpoint is written beside its place, synced, and renamed once. What a kill leaves behind is never mistaken for one.
"""

import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from longfire import settings
from longfire.disk import put_in_place, sync
from longfire.errors import CheckpointError

FORMAT = 1  # of the folder; a newer one is refused, an older one would be converted here
MANIFEST, STATE, LEFT = "manifest.json", "state.json", "left"
SHARD_BYTES = 1_000_000_000  # of a file of weights that are written as they are read
COUNTERS = ("step", "rows_consumed", "tokens", "skipped_steps", "elapsed_seconds")


@dataclass
class State:
    """All that a step changes. The position in the data is one integer, so any number of processes can go on from it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    elapsed_seconds: float = 0.0

    def counters(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in COUNTERS}

    def tensors(self, weights_only: bool = False) -> dict[str, Tensor]:
        """Every tensor under a flat name that knows nothing of devices or layouts; not copied."""
        named = dict(self.model.named_parameters())
        tensors = {f"model/{name}": parameter.detach() for name, parameter in named.items()}
        if weights_only:
            return tensors
        for name, parameter in named.items():
            for what, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{what}/{name}"] = value
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        return tensors


@dataclass
class Checkpoints:
    """The checkpoints of one run. `note` tells what was saved, loaded, or found damaged."""

    folder: Path
    settings: settings.Checkpoint
    note: Callable[[str], None] = print
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int | None = None
    writing: Future | None = None
    host_copies: dict[str, Tensor] = field(default_factory=dict)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def due(self, state: State) -> bool:
        """Whether interval says to save after this step."""
        if not self.settings.enable_checkpoint or not self.settings.interval:
            return False
        if self.settings.interval_type == "seconds":
            return time.monotonic() - self.saved_at >= self.settings.interval
        return state.step % self.settings.interval == 0

    def save(self, state: State, *, last: bool = False) -> None:
        """Save the state as step-N, behind training if async_mode says so. Raises CheckpointError, also for the save before."""
        if not self.settings.enable_checkpoint:
            return
        self.wait()
        weights_only = last and self.settings.model_weights_only
        if state.step == self.saved_step and not weights_only:
            return  # the last step was due as well, or nothing was trained since the restore
        tensors, counters = state.tensors(weights_only), state.counters()
        self.saved_at, self.saved_step = time.monotonic(), state.step
        if self.settings.async_mode == "disabled":
            self.write(tensors, counters, weights_only)
        else:
            self.writing = self.thread.submit(self.write, self.copied(tensors), counters, weights_only)

    def wait(self) -> None:
        """Until the save that is under way is on disk. Raises its CheckpointError."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory that training cannot change; the buffers are kept for the next save."""
        pinned = self.settings.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        for name, tensor in tensors.items():
            if name not in self.host_copies:
                self.host_copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self.host_copies[name].copy_(tensor, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        return {name: self.host_copies[name] for name in tensors}

    def write(self, tensors: dict[str, Tensor], counters: dict[str, float], weights_only: bool) -> None:
        """Write aside, sync, check in, rename; then remove what keep_latest_k does not keep."""
        place = self.folder / f"step-{counters['step']}"
        aside = place.with_name(f"{place.name}.writing-{os.getpid()}")
        try:
            clean(self.folder)
            aside.mkdir(parents=True)
            write_tensors(tensors, aside)
            facts = {"format": FORMAT, "torch": torch.__version__, "weights_only": weights_only, **counters}
            (aside / STATE).write_text(json.dumps(facts, indent=1))
            write_manifest(aside)
            self.leave_later(counters["step"])
            put_in_place(aside, place)
            self.forget_old()
        except (OSError, dcp.CheckpointException) as error:
            shutil.rmtree(aside, ignore_errors=True)
            kept = ", ".join(f"step-{step}" for step in steps(self.folder)) or "none"
            raise CheckpointError(
                f"{place} could not be written: {reason(error)}. Checkpoints that are whole: {kept}. Free some space or mend the "
                "folder, then start again: the run goes on from the newest"
            ) from error

    def leave_later(self, step: int) -> None:
        """A checkpoint beyond the step that is being saved is damaged, or of the branch that load_step left. It is kept in `left/`,
        where no resume takes it for the newest and keep_latest_k does not count it."""
        for later in [name for name in steps(self.folder) if name > step]:
            place, left = self.folder / f"step-{later}", self.folder / LEFT / f"step-{later}"
            left.parent.mkdir(exist_ok=True)
            shutil.rmtree(left, ignore_errors=True)
            place.rename(left)
            self.note(f"{place} is later than step {step}, from which this run goes on: kept as {left}")

    def forget_old(self) -> None:
        """Keep the newest keep_latest_k and every milestone."""
        every = self.settings.milestone_interval
        if self.settings.keep_latest_k:
            for step in steps(self.folder)[: -self.settings.keep_latest_k]:
                if not (every and step % every == 0):
                    # at once: nobody who reads meanwhile finds a part of it
                    gone = self.folder / f"step-{step}.forgotten"
                    (self.folder / f"step-{step}").rename(gone)
                    shutil.rmtree(gone)

    def restore(self, state: State) -> bool:
        """Load load_step, or the newest whole checkpoint (naming damaged ones that are newer). False if there is none yet."""
        if not self.settings.enable_checkpoint:
            return False
        step = self.settings.load_step if self.settings.load_step >= 0 else newest(self.folder, self.note)
        if step is None:
            return False
        place = self.folder / f"step-{step}"
        load(state, place)
        self.saved_at, self.saved_step = time.monotonic(), state.step
        fresh = "" if state.optimizer.state else ", with a fresh optimizer"
        self.note(f"going on from {place}: {state.tokens:,} tokens seen, row {state.rows_consumed:,} is next{fresh}")
        return True


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order; what a kill left behind has another kind of name."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def newest(folder: Path, note: Callable[[str], None] = print) -> int | None:
    """The step of the newest whole checkpoint; None if there are none. Raises CheckpointError if there are only damaged ones."""
    recover(folder)
    damaged = []
    for step in reversed(steps(folder)):
        wrong = damage(folder / f"step-{step}")
        if wrong is None:
            return step
        damaged.append(wrong)
        note(f"{wrong}; looking for an older one")
    if damaged:
        raise CheckpointError(f"{folder} has no whole checkpoint: {'; '.join(damaged)}. Restore one from a copy, or remove the "
                              "folder to start anew")  # fmt: skip
    return None


def load(state: State, place: Path) -> None:
    """Read a whole checkpoint into the state, to the bit. Raises CheckpointError naming the file or tensor that is wrong."""
    facts = checked_facts(place)
    if facts["weights_only"] and facts["step"]:
        raise CheckpointError(f"{place} holds the model's weights only (checkpoint.model_weights_only) and cannot be resumed; export "
                              "it and start from it with model.weights")  # fmt: skip
    there = tensor_shapes(place)
    named = dict(state.model.named_parameters())
    check_names({name: shape for name, shape in there.items() if name.startswith("model/")},
                {f"model/{name}": parameter.shape for name, parameter in named.items()}, place)  # fmt: skip
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in there.items()}
    read_tensors(tensors, place)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"model/{name}"])
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition("/")
        if kind == "optimizer":
            what, _, name = rest.partition("/")
            parameter = named[name]
            # the step counter of fused kernels lives where the parameter does, that of the plain loop on the host
            device = parameter.device if value.dim() or state.optimizer.defaults.get("fused") else "cpu"
            state.optimizer.state[parameter][what] = value.to(device)
    if "rng/cpu" in tensors:
        torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    for name in COUNTERS:
        setattr(state, name, facts[name])


def begin_with(weights: Iterable[tuple[str, Tensor]], place: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write step 0 of weights alone (name, fp32), as they come: at most `shard_bytes` of them are in memory, or one tensor.

    `place` is a folder of a run that is not yet in its own place: nobody reads it before it is whole. Raises OSError.
    """
    place.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    shards = 0
    for name, tensor in chain(weights, [("", None)]):
        full = sum(t.numel() * t.element_size() for t in shard.values()) + (0 if tensor is None else tensor.nbytes)
        if shard and (tensor is None or full > shard_bytes):
            shards += 1
            save_file(shard, place / f"shard-{shards:05d}.safetensors")
            shard = {}
        if tensor is not None:
            shard[f"model/{name}"] = tensor
    facts = {"format": FORMAT, "torch": torch.__version__, "weights_only": True, **dict.fromkeys(COUNTERS, 0)}
    (place / STATE).write_text(json.dumps(facts, indent=1))
    write_manifest(place)


def load_model_weights(place: Path) -> dict[str, Tensor]:
    """The fp32 parameters of a whole checkpoint, by the model's own names. Raises CheckpointError."""
    checked_facts(place)
    shapes = {name: shape for name, shape in tensor_shapes(place).items() if name.startswith("model/")}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_tensors(tensors, place)
    return {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}


def checked_facts(place: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose every file has its size and checksum. Raises CheckpointError."""
    if not place.is_dir():
        known = ", ".join(map(str, steps(place.parent))) or "none"
        raise CheckpointError(f"{place}: no such checkpoint; the folder has steps {known}")
    wrong = damage(place)
    if wrong:
        raise CheckpointError(f"{wrong}; take another step (checkpoint.load_step = -1 takes the newest whole one)")
    facts = json.loads((place / STATE).read_text())
    if facts["format"] > FORMAT:
        raise CheckpointError(
            f"{place} has format {facts['format']}, this longfire reads up to {FORMAT}: install a newer one"
        )
    return facts


def damage(place: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    try:
        files = json.loads((place / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{place} is damaged: {MANIFEST} cannot be read ({error})"
    for name, fact in files.items():
        path = place / name
        if not path.is_file():
            return f"{place} is damaged: {name} is missing"
        if path.stat().st_size != fact["bytes"]:
            return f"{place} is damaged: {name} has {path.stat().st_size:,} bytes where {fact['bytes']:,} were written"
        if checksum(path) != fact["crc32"]:
            return f"{place} is damaged: the bytes of {name} are not those that were written (checksum)"
    return None


def checksum(path: Path) -> int:
    """CRC-32: against accidents, not adversaries (nothing in a checkpoint can run code), at over 1 GB/s."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """torch's distributed format with safetensors as its files: any layout can read it, and it holds no pickle.

    The weights lie in a file of their own, so that reading them does not read the optimizer.
    """
    files = {name: 1 if name.startswith("model/") else 2 for name in tensors}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with alone():
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def read_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors in place."""
    with alone():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def tensor_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Global shape and type of every tensor in a checkpoint, whatever its shards."""
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in metadata.items()}


@contextmanager
def alone() -> Iterator[None]:
    """torch warns that there is no process group; with one process that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def check_names(there: dict[str, tuple], here: dict[str, torch.Size], place: Path) -> None:
    """Raises CheckpointError naming a missing, extra or differently shaped tensor: the checkpoint is of another model."""
    wrong = [f"{name} is missing" for name in here if name not in there]
    wrong += [f"{name} has no place in this model" for name in there if name not in here]
    wrong += [f"{name} is {tuple(there[name][0])} there and {tuple(here[name])} here"
              for name in here if name in there and there[name][0] != here[name]]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{place} is of another model: {'; '.join(wrong[:3])}{more}. Name its own model.config, or another "
                              "job.dump_folder")  # fmt: skip


def write_manifest(folder: Path) -> None:
    """Size and checksum of every file, synced with the files: what the rename then makes whole."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "crc32": checksum(p)} for p in paths}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    for path in [*paths, folder / MANIFEST, folder]:
        sync(path)


def recover(folder: Path) -> None:
    """Put back what `put_in_place` had moved aside when it was killed."""
    for before in folder.glob("step-*.before"):
        place = before.with_suffix("")
        if place.exists():
            shutil.rmtree(before)
        else:
            before.rename(place)


def clean(folder: Path) -> None:
    """Remove what killed saves left behind. One process writes to a run folder at a time."""
    recover(folder)
    for leftover in [*folder.glob("step-*.writing-*"), *folder.glob("step-*.forgotten")]:
        shutil.rmtree(leftover)


def reason(error: BaseException) -> str:
    """One line: torch wraps the failures of all ranks into an exception of its own."""
    if isinstance(error, dcp.CheckpointException):
        error = next((pair[0] for pair in error.failures.values()), error)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
