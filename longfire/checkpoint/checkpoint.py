"""The state of a run on disk: complete or absent, safetensors and JSON only, loadable on another
layout.

<run>/checkpoints/step-N/
  shard-R-model.safetensors      model/<name>: slices of parameters, those of process R (checkpoint/shards.py)
  shard-R-optimizer.safetensors  optimizer/<what>/<name>, rng/<device>
  state.json                     step, rows consumed, tokens, format version
  manifest.json                  size and checksum of each file above; written last

Step 0 may hold weights alone, those of a model from elsewhere (`huggingface/import_.py`): there is no
optimizer state yet to go on with.

A checkpoint is written beside its place, synced, and renamed once. Every process writes its files
and then a mark, process 0 checks in what all marks say: so nothing is sent between processes while
training goes on. What a kill leaves behind is never mistaken for a checkpoint.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longfire.checkpoint.shards import SUFFIX, Entry, Held, Reader, holes, read_index, write_shard
from longfire.config import settings
from longfire.disk import put_in_place, sync, write_whole
from longfire.errors import CheckpointError, first_line
from longfire.optim.state import (
    refuse_another_optimizer,
    refuse_undeclared_state,
    states_of,
    whole_state,
)
from longfire.parallel.axes import SHARDS
from longfire.parallel.mesh import ALONE, Mesh
from longfire.parallel.sharding import WHOLE, global_shape, local, sharding_of, slices_of
from longfire.training.schedule import Plan, Planned

FORMAT = 2  # of the folder; a newer one is refused. Format 1 had whole tensors in other file names and is read as it is
MANIFEST, STATE, LEFT = "manifest.json", "state.json", "left"
MARK_SECONDS = 0.02  # between looks for the marks of other processes
COUNTERS = ("step", "rows_consumed", "tokens", "skipped_steps", "elapsed_seconds")


@dataclass
class State:
    """All that a step changes. The position in the data is one integer, so any number of processes
    can resume from it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    rows_consumed: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    elapsed_seconds: float = 0.0  # of training: steps, and the evaluations and saves between them
    plan: Plan = ()  # of its steps, where they are planned (training/schedule.py)
    went_back_to: int = -1  # the step that checkpoint.load_step went back to last
    mesh: Mesh = ALONE  # where model and optimizer lie
    read: Event | None = (
        None  # set when a save behind training has read everything: until then no tensor may change
    )

    def wait_for_snapshot(self) -> None:
        """Wait until a save has read what the optimizer is about to change: most of it was copied
        while the step computed."""
        if self.read:
            self.read.wait()
            self.read = None

    def counters(self) -> dict[str, Any]:
        """What state.json holds of it."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {**counters, "plan": self.plan, "went_back_to": self.went_back_to}

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

    def held(self, weights_only: bool = False) -> dict[str, Held]:
        """The same as slices of whole tensors. Not copied."""
        return {
            name: self.part(name, tensor) for name, tensor in self.tensors(weights_only).items()
        }

    def part(self, name: str, tensor: Tensor) -> Held:
        """What of a tensor is on this process: the state of an optimizer lies as its parameter does, unless
        its rule declares it whole."""
        spec = WHOLE if self.is_whole(name, tensor) else sharding_of(self.model, parameter_of(name))
        return Held(local(tensor), tuple(global_shape(tensor, spec)), slices_of(tensor, spec))

    def is_whole(self, name: str, tensor: Tensor) -> bool:
        """Whether every process that holds anything of a tensor holds all of it."""
        kind, what, *_ = name.split("/")
        if kind == "optimizer" and what in whole_state(self.optimizer):
            return True
        return kind == "rng" or not tensor.dim()

    def written(self, weights_only: bool = False) -> dict[str, Held]:
        """What this process writes: each slice of the run is written by one of those that hold
        it."""
        refuse_undeclared_state(self.optimizer)
        if self.mesh.rank("dp_replicate"):
            return {}
        held = self.held(weights_only)
        return {name: part for name, part in held.items() if self.writes(name, part)}

    def writes(self, name: str, held: Held) -> bool:
        """Whether this process, one of the first replica, writes what it holds of a tensor."""
        if name.startswith("rng/"):
            return self.mesh.rank() == 0
        spec = sharding_of(self.model, parameter_of(name))
        first_of_split = not self.mesh.rank("tp")
        if spec.is_copy or not (spec.split or first_of_split):
            return False
        first_of_shards = not self.mesh.rank(*SHARDS)
        return not self.is_whole(name, held.tensor) or (first_of_shards and first_of_split)


@dataclass
class Checkpoints:
    """The checkpoints of one run. `note` tells what was saved, loaded, or found damaged. `due`,
    `save`, `wait` and `restore` are
    collective: all processes of the mesh call them at the same step.

    patience_seconds: how long process 0 waits for the files of the others (0: for ever).
    vocabulary: a digest of what the ids of the run stand for, which each checkpoint keeps
    (data/tokenizer.py). attempt: which start of the run this is, where a launcher starts all again
    after one has died.
    """

    folder: Path
    settings: settings.Checkpoint
    note: Callable[[str], None] = print
    mesh: Mesh = ALONE
    patience_seconds: float = 3600
    vocabulary: str = ""
    attempt: int = 0
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
            return self.mesh.broadcast_object(
                time.monotonic() - self.saved_at >= self.settings.interval
            )
        return state.step % self.settings.interval == 0

    def save(self, state: State, *, last: bool = False) -> None:
        """Save the state as step-N, behind training if async_mode says so. Raises CheckpointError,
        also for the save before."""
        if not self.settings.enable_checkpoint:
            return
        self.wait()
        weights_only = last and self.settings.model_weights_only
        if state.step == self.saved_step and not weights_only:
            return  # the last step was due as well, or nothing was trained since the restore
        place = self.folder / f"step-{state.step}"
        with self.mesh.raise_on_all_ranks():
            if self.mesh.rank() == 0:
                with self.describe(place):
                    clean(self.folder)
                    tmp_path_of(place).mkdir(parents=True)
        with self.mesh.raise_on_all_ranks():
            if not tmp_path_of(place).is_dir():
                raise CheckpointError(
                    f"{tmp_path_of(place)} is not there on this machine: job.dump_folder must lie on a file system that all machines see"
                )
        held, counters = state.written(weights_only), state.counters()
        self.saved_at, self.saved_step = time.monotonic(), state.step
        if self.settings.async_mode == "disabled":
            with self.mesh.raise_on_all_ranks():
                self.write(held, counters, weights_only)
        elif next(state.model.parameters()).is_cuda:
            self.writing = self.thread.submit(self.write, self.copied(held), counters, weights_only)
        else:
            state.read = Event()
            self.writing = self.thread.submit(
                self.copy_and_write, held, counters, weights_only, state.read
            )

    def wait(self) -> None:
        """Until the save that is under way is on disk. Raises its CheckpointError, in every
        process."""
        writing, self.writing = self.writing, None
        if writing:
            with self.mesh.raise_on_all_ranks():
                writing.result()

    def copied(self, held: dict[str, Held]) -> dict[str, Held]:
        """Copies in host memory that training cannot change; the buffers are kept for the next
        save."""
        pinned = self.settings.async_mode == "async_with_pinned_mem" and torch.cuda.is_available()
        for name, (tensor, _, _) in held.items():
            if name not in self.host_copies:
                self.host_copies[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=pinned
                )
            self.host_copies[name].copy_(tensor, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        return {name: part._replace(tensor=self.host_copies[name]) for name, part in held.items()}

    def copy_and_write(
        self, held: dict[str, Held], counters: dict[str, Any], weights_only: bool, read: Event
    ) -> None:
        """Both behind training, which goes on to compute gradients meanwhile (State.wait_for_snapshot)."""
        try:
            held = self.copied(held)
        finally:
            read.set()
        self.write(held, counters, weights_only)

    def write(self, held: dict[str, Held], counters: dict[str, Any], weights_only: bool) -> None:
        """Write this process's files and its mark; process 0 then checks all in, renames, and
        removes what is not kept."""
        place = self.folder / f"step-{counters['step']}"
        aside, rank = tmp_path_of(place), self.mesh.rank()
        with self.describe(place):
            try:
                files = write_tensors(held, aside, rank)
            except Exception as error:
                for path in aside.glob(f"shard-{rank:05d}-*"):
                    path.unlink()  # the disk may be full, and the mark, for which process 0 waits, needs room
                write_whole(aside / marker_of(rank), json.dumps({"error": str(error)}))
                raise
            if rank:
                write_whole(aside / marker_of(rank), json.dumps({"files": files}))
                return
            files |= self.files_of_others(aside)
            facts = {
                "format": FORMAT,
                "torch": torch.__version__,
                "weights_only": weights_only,
                **counters,
            }
            facts["keep_latest_k"] = self.settings.keep_latest_k
            facts["vocabulary"] = self.vocabulary
            write_manifest(aside, facts, files)
            self.set_aside_later(counters["step"])
            put_in_place(aside, place)
            self.prune_old()

    def files_of_others(self, aside: Path) -> dict[str, dict[str, int]]:
        """What the marks of all other processes say they wrote. Raises OSError if one failed, or
        none comes for too long."""
        begun, files, missing = time.monotonic(), {}, set(range(1, self.mesh.size()))
        while missing:
            for rank in sorted(missing):
                mark = aside / marker_of(rank)
                if mark.exists():
                    said = json.loads(mark.read_text())
                    if "error" in said:
                        raise OSError(f"process {rank}: {said['error']}")
                    files |= said["files"]
                    missing.remove(rank)
            if self.patience_seconds and time.monotonic() - begun > self.patience_seconds:
                raise OSError(
                    f"the files of process(es) {sorted(missing)} did not come in {self.patience_seconds:g} s"
                )
            time.sleep(MARK_SECONDS if missing else 0)
        return files

    @contextmanager
    def describe(self, place: Path) -> Iterator[None]:
        """An OSError inside becomes a CheckpointError that says what is whole and what to do."""
        try:
            yield
        except OSError as error:
            if (
                self.mesh.size() == 1
            ):  # else others may still write there; the next start removes it
                shutil.rmtree(tmp_path_of(place), ignore_errors=True)
            kept = ", ".join(f"step-{step}" for step in steps(self.folder)) or "none"
            raise CheckpointError(
                f"{place} could not be written: {first_line(error)}. Checkpoints that are whole: {kept}. Free some space or fix the "
                "folder, then start again: the run resumes from the newest"
            ) from error

    def set_aside_later(self, step: int) -> None:
        """A checkpoint beyond the step that is being saved is damaged, or of the branch that
        load_step left. It is kept in `left/`, where no resume takes it for the newest and
        keep_latest_k does not count it."""
        for later in [name for name in steps(self.folder) if name > step]:
            place, left = self.folder / f"step-{later}", self.folder / LEFT / f"step-{later}"
            left.parent.mkdir(exist_ok=True)
            shutil.rmtree(left, ignore_errors=True)
            place.rename(left)
            self.note(
                f"{place} is later than step {step}, from which this run goes on: kept as {left}"
            )

    def prune_old(self) -> None:
        """Keep the newest keep_latest_k, every milestone, what was saved when all were to be kept,
        and step 0, from which other runs may begin."""
        every = self.settings.milestone_interval
        if self.settings.keep_latest_k:
            for step in steps(self.folder)[: -self.settings.keep_latest_k]:
                place = self.folder / f"step-{step}"
                if step and not (every and step % every == 0) and may_be_pruned(place):
                    # at once: nobody who reads meanwhile finds a part of it
                    gone = self.folder / f"step-{step}.forgotten"
                    place.rename(gone)
                    shutil.rmtree(gone)

    def restore(self, state: State) -> bool:
        """Load load_step, or the newest whole checkpoint (naming damaged ones that are newer).
        False if there is none yet.

        Raises CheckpointError, also for a checkpoint whose ids mean other text than those of the
        run.
        """
        if not self.settings.enable_checkpoint:
            return False
        try:
            step = self.step_to_load()
            if step is None:
                return False
            place = self.folder / f"step-{step}"
            goes_back = step == self.settings.load_step
            load(state, place, self.mesh, looked_at=not goes_back)
            refuse_another_vocabulary(place, self.vocabulary, "tokenizer.path")
        except CheckpointError as error:
            error.reported_elsewhere |= (
                self.mesh.rank() > 0
            )  # all processes looked, and found the same
            raise
        if goes_back:
            state.went_back_to = step
        self.saved_at, self.saved_step = time.monotonic(), state.step
        fresh = "" if state.optimizer.state else ", with a fresh optimizer"
        self.note(
            f"weights: resuming from {place}: {state.tokens:,} tokens seen, row {state.rows_consumed:,} is next{fresh}"
        )
        return True

    def step_to_load(self) -> int | None:
        """load_step where this run has not gone on from there yet, else the newest whole
        checkpoint; None if there is none.

        A start goes back once: the same command after a stop, and the restart of a launcher, go on
        from what was saved since. What went back and was stopped before its first save goes back
        anew.
        """
        asked = self.settings.load_step
        if asked < 0:
            return newest(self.folder, self.note, self.mesh)
        is_asked_again = self.settings.load_step_again and not self.attempt
        if is_asked_again or not any(self.went_back(step, asked) for step in steps(self.folder)):
            return asked
        step = newest(self.folder, self.note, self.mesh)
        again = "" if self.attempt else "; to go back once more, add --checkpoint.load_step_again"
        self.note(
            f"checkpoint.load_step = {asked} was done before, and this run has gone on to step {step}{again}"
        )
        return step

    def went_back(self, step: int, asked: int) -> bool:
        """Whether a checkpoint was saved after the run had gone back to the step that is asked
        for."""
        try:
            return (
                step > asked
                and facts_of(self.folder / f"step-{step}").get("went_back_to", -1) == asked
            )
        except (OSError, ValueError, KeyError):
            return False


def parameter_of(name: str) -> str:
    """Whose tensor this is: model/<parameter>, optimizer/<what>/<parameter>."""
    return name.rpartition("/")[2]


def may_be_pruned(place: Path) -> bool:
    """Whether a checkpoint was saved by a run that keeps the newest only. One that cannot be read
    is left to its owner."""
    try:
        return bool(json.loads((place / STATE).read_text()).get("keep_latest_k"))
    except (OSError, ValueError):
        return False


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order; what a kill left behind has another kind of
    name."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def tmp_path_of(place: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return place.with_name(f"{place.name}.writing")


def marker_of(rank: int) -> str:
    """The file by which a process says that its part is written, or why not."""
    return f"rank-{rank:05d}.json"


def newest(folder: Path, note: Callable[[str], None] = print, mesh: Mesh = ALONE) -> int | None:
    """The step of the newest whole checkpoint; None if there are none. Raises CheckpointError if
    there are only damaged ones. Collective over the mesh: each process looks at its share of the
    files."""
    with mesh.raise_on_all_ranks():
        if mesh.rank() == 0:
            recover(folder)
    damaged = []
    for step in reversed(mesh.broadcast_object(steps(folder))):
        wrong = damage(folder / f"step-{step}", mesh)
        if wrong is None:
            return step
        damaged.append(wrong)
        note(f"{wrong}; looking for an older one")
    if damaged:
        raise CheckpointError(
            f"{folder} has no whole checkpoint: {'; '.join(damaged)}. Restore one from a copy, or remove the "
            "folder to start anew"
        )
    return None


def load(state: State, place: Path, mesh: Mesh = ALONE, looked_at: bool = False) -> None:
    """Read what of a whole checkpoint is on this process into the state, to the bit, whatever layout wrote
    it. Collective over the mesh.

    looked_at: `newest` has just found its files whole. Raises CheckpointError naming the file or
    tensor that is wrong.
    """
    facts = facts_of(place) if looked_at else checked_facts(place, mesh)
    if facts["weights_only"] and facts["step"]:
        raise CheckpointError(
            f"{place} holds the model's weights only (checkpoint.model_weights_only) and cannot be resumed; export "
            "it and start from it with model.weights"
        )
    with mesh.raise_on_all_ranks():
        index = index_of(place)
    mine = dict(state.model.named_parameters())
    held = {f"model/{name}": state.part(f"model/{name}", p.detach()) for name, p in mine.items()}
    here = {}
    for some in mesh.all_gather_object({name: part.shape for name, part in held.items()}):
        here |= some  # with a pipeline each process holds some of the names
    check_names(
        {name: entry.shape for name, entry in index.items() if name.startswith("model/")},
        here,
        place,
    )
    with mesh.raise_on_all_ranks(), Reader(index) as reader, torch.no_grad():
        refuse_another_optimizer(state.optimizer, index, mine, place)
        for name, part in held.items():
            reader.fill(part, name)
        for name, what, parameter in states_of(index, mine):
            state.optimizer.state[parameter][what] = moment(reader, state, name, parameter)
        if "rng/cpu" in index:
            torch.set_rng_state(reader.whole("rng/cpu"))
        if "rng/cuda" in index and torch.cuda.is_available():
            torch.cuda.set_rng_state(reader.whole("rng/cuda"))
    for name in COUNTERS:
        setattr(state, name, facts[name])
    state.plan = tuple(Planned(*entry) for entry in facts.get("plan", ()))
    state.went_back_to = facts.get("went_back_to", -1)


def moment(reader: Reader, state: State, name: str, parameter: nn.Parameter) -> Tensor:
    """What the optimizer keeps under this name: as its parameter lies, or whole."""
    entry = reader.index[name]
    if not entry.shape:
        # the step counter of fused kernels lives where the parameter does, that of the plain loop
        # on the host
        return reader.whole(name).to(
            parameter.device if state.optimizer.defaults.get("fused") else "cpu"
        )
    if name.split("/")[1] in whole_state(state.optimizer):
        return reader.whole(name).to(parameter.device)
    value = torch.empty_like(parameter, dtype=entry.dtype)
    reader.fill(state.part(name, value), name)
    return value


def load_model_weights(place: Path) -> dict[str, Tensor]:
    """The fp32 parameters of a whole checkpoint, by the model's own names. Raises
    CheckpointError."""
    return dict(OnDisk(checked_index(place)))


class OnDisk(Mapping[str, Tensor]):
    """The parameters of a checkpoint by the model's own names, each read when it is asked for."""

    def __init__(self, index: dict[str, Entry]) -> None:
        self.reader = Reader(index)
        self.names = [name.removeprefix("model/") for name in index if name.startswith("model/")]

    def __getitem__(self, name: str) -> Tensor:
        return self.reader.whole(f"model/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def checked_index(place: Path) -> dict[str, Entry]:
    """Every tensor of a whole checkpoint. Raises CheckpointError."""
    checked_facts(place)
    return index_of(place)


def index_of(place: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint, in the files that its manifest names: the run may just be
    forgetting it. Raises CheckpointError if a part of one is nowhere."""
    try:
        files = json.loads((place / MANIFEST).read_text())["files"]
        index = read_index(
            place / name
            for name in sorted(files)
            if name == Path(name).name and name.endswith(SUFFIX)
        )
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place} is damaged: {error}") from error
    if missing := holes(index):
        raise CheckpointError(
            f"{place} is damaged: parts of {', '.join(missing[:3])} lie in no file"
        )
    return index


def checked_facts(place: Path, mesh: Mesh = ALONE) -> dict[str, Any]:
    """state.json of a checkpoint whose every file has its size and checksum. Raises
    CheckpointError."""
    if not place.is_dir():
        known = ", ".join(map(str, steps(place.parent))) or "none"
        raise CheckpointError(f"{place}: no such checkpoint; the folder has steps {known}")
    wrong = damage(place, mesh)
    if wrong:
        raise CheckpointError(
            f"{wrong}; take another step (checkpoint.load_step = -1 takes the newest whole one)"
        )
    return facts_of(place)


def facts_of(place: Path) -> dict[str, Any]:
    """state.json. Raises CheckpointError if a newer longfire wrote it."""
    facts = json.loads((place / STATE).read_text())
    if facts["format"] > FORMAT:
        raise CheckpointError(
            f"{place} has format {facts['format']}, this longfire reads up to {FORMAT}: install a newer one"
        )
    return facts


def refuse_another_vocabulary(place: Path, vocabulary: str, named: str) -> None:
    """Raises CheckpointError when a checkpoint was trained with other ids than those of this
    vocabulary; `named`: what it is of."""
    recorded = facts_of(place).get("vocabulary")
    if recorded and vocabulary and recorded != vocabulary:
        raise CheckpointError(
            f"{place} was trained with another tokenizer than {named}: the same ids mean other text. Take the tokenizer that it was "
            "trained with, or begin another run from its weights (model.weights, another job.dump_folder)"
        )


def damage(place: Path, mesh: Mesh = ALONE) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole. Each process of the
    mesh looks at its share."""
    try:
        files = json.loads((place / MANIFEST).read_text())["files"]
        wrong = next(
            filter(
                None,
                (
                    damage_of(place, *file)
                    for file in list(files.items())[mesh.rank() :: mesh.size()]
                ),
            ),
            None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = f"{place} is damaged: {MANIFEST} cannot be read ({error})"
    return next(filter(None, mesh.all_gather_object(wrong)), None)


def damage_of(place: Path, name: str, fact: dict[str, int]) -> str | None:
    path = place / name
    if not path.is_file():
        return f"{place} is damaged: {name} is missing"
    if path.stat().st_size != fact["bytes"]:
        return f"{place} is damaged: {name} has {path.stat().st_size:,} bytes where {fact['bytes']:,} were written"
    if checksum(path) != fact["crc32"]:
        return f"{place} is damaged: the bytes of {name} are not those that were written (checksum)"
    return None


def checksum(path: Path) -> int:
    """CRC-32: against accidents, not adversaries (nothing in a checkpoint can run code), at over 1
    GB/s."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def write_tensors(held: dict[str, Held], folder: Path, rank: int) -> dict[str, dict[str, int]]:
    """Write a process's files, synced, and return their sizes and checksums. The weights lie in a
    file of their own, so that reading them does not read the optimizer. Raises OSError."""
    files = {}
    for kind in ("model", "optimizer"):
        part = {
            name: one
            for name, one in held.items()
            if name.startswith("model/") is (kind == "model") and one.slices
        }
        if part:
            path = folder / f"shard-{rank:05d}-{kind}.safetensors"
            files[path.name] = settled(path, write_shard(part, path))
    return files


def settled(path: Path, crc32: int) -> dict[str, int]:
    """What the manifest says of a file, which is on disk from now on."""
    sync(path)
    return {"bytes": path.stat().st_size, "crc32": crc32}


def check_names(there: dict[str, tuple], here: dict[str, tuple], place: Path) -> None:
    """Raises CheckpointError naming a missing, extra or differently shaped tensor: the checkpoint
    is of another model."""
    wrong = [f"{name} is missing" for name in here if name not in there]
    wrong += [f"{name} has no place in this model" for name in there if name not in here]
    wrong += [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{place} is of another model: {'; '.join(wrong[:3])}{more}. Name its own model.config, or another "
            "job.dump_folder"
        )


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, int]]) -> None:
    """state.json, and last size and checksum of every file, all synced: what the rename then makes
    whole."""
    (folder / STATE).write_text(json.dumps(facts, indent=1))
    files = {**files, STATE: settled(folder / STATE, checksum(folder / STATE))}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    for mark in folder.glob("rank-*.json"):
        mark.unlink()
    for path in (folder / MANIFEST, folder):
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
    for leftover in [*folder.glob("step-*.writing*"), *folder.glob("step-*.forgotten")]:
        shutil.rmtree(leftover)
