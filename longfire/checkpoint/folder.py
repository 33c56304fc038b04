"""One checkpoint as a folder: its files and names, and whether it is complete.

<run>/checkpoints/step-N/
  shard-R-model.safetensors      model/<name>: slices of the parameters of process R (shards.py)
  shard-R-optimizer.safetensors  optimizer/<what>/<name>, rng/<device>
  state.json                     step, sequences consumed, tokens, format version
  manifest.json                  size and checksum of each file above; written last

Step 0 may hold weights alone, those of a model from elsewhere (huggingface/import_.py): there is no
state of an optimizer yet.
"""

import json
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError

from longfire.checkpoint.shards import SUFFIX, Entry, LocalTensor, read_index, write_shard
from longfire.checkpoint.slices import first_wrong
from longfire.disk import sync
from longfire.errors import CheckpointError
from longfire.listing import exists, is_file, is_folder, paths_in
from longfire.own_files import json_of, problem_of, read_json
from longfire.parallel.mesh import ALONE, Mesh
from longfire.regular_files import IrregularFileError, open_regular, read_regular
from longfire.training.plateau import Plateau
from longfire.training.schedule import Planned

# Of the folder; a newer one is refused. Format 1 had whole tensors in files of other names, and is
# read all the same.
FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
OTHER_STEP = "take another step (checkpoint.load_step)"
LEFT = "left"  # the folder of checkpoints that are later than the step a run went back to


class FileFacts(TypedDict):
    """What the manifest holds of a file."""

    bytes: int
    crc32: int


class Manifest(TypedDict):
    """manifest.json: every other file of a checkpoint."""

    files: dict[str, FileFacts]


class Marker(TypedDict, total=False):
    """What a process says of its part of a checkpoint: what it wrote, or why it could not."""

    files: dict[str, FileFacts]
    error: str


class Format(TypedDict):
    """What of state.json every version has."""

    format: int


class Counted(Format):
    """What every checkpoint has in state.json."""

    weights_only: bool
    step: int
    rows_consumed: int
    tokens: int
    skipped_steps: int
    elapsed_seconds: float


class Facts(Counted, total=False):
    """state.json: the counters of a state, and how it was saved."""

    torch: str
    plan: Sequence[Planned]
    went_back_to: int
    plateau: Plateau
    keep_latest_k: int
    vocabulary: str
    uses_average: bool


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order. What a kill leaves behind has other names. Raises
    CheckpointError where the folder is there and cannot be read: the run would begin anew."""
    try:
        places = [path for path in paths_in(folder, "step-*") if is_folder(path)]
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {problem_of(error)}; there may be checkpoints in it"
        ) from error
    found: list[int] = []
    for place in places:
        digits = place.name.removeprefix("step-")
        if digits.isascii() and digits.isdigit():
            found.append(int(digits))
    return sorted(found)


def tmp_path_of(place: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return place.with_name(f"{place.name}.writing")


def marker_of(rank: int) -> str:
    """The marker by which a process declares that its part is written, or why not."""
    return f"rank-{rank:05d}.json"


def facts_of(place: Path) -> Facts:
    """state.json. Raises CheckpointError if a newer longfire wrote it, and where a key is missing
    or of another type."""
    file = place / STATE
    written_in = read_json(file, Format, CheckpointError, OTHER_STEP)["format"]
    if written_in > FORMAT:
        raise CheckpointError(
            f"{place} has format {written_in}, this longfire reads up to {FORMAT}: "
            "install a newer one"
        )
    facts = read_json(file, Facts, CheckpointError, OTHER_STEP)
    wrong = impossible(facts, place)
    if wrong:
        raise CheckpointError(f"{file}: {wrong}; {OTHER_STEP}")
    return facts


def impossible(facts: Facts, place: Path) -> str:
    """The counter that no run can have; "" where there is none."""
    counters: dict[str, float] = {
        "format": facts["format"] - 1,
        "step": facts["step"],
        "rows_consumed": facts["rows_consumed"],
        "tokens": facts["tokens"],
        "skipped_steps": facts["skipped_steps"],
        "elapsed_seconds": facts["elapsed_seconds"],
    }
    for name, value in counters.items():
        if not 0 <= value < math.inf:
            return f"{name} is out of its range"
    if place.name != f"step-{facts['step']}" and place.name.startswith("step-"):
        return f"it is of step {facts['step']}, in the folder {place.name}"
    return ""


def checked_facts(place: Path, mesh: Mesh = ALONE) -> Facts:
    """state.json of a checkpoint whose every file has its size and checksum. Raises
    CheckpointError."""
    if not is_folder(place):
        known = ", ".join(map(str, steps(place.parent))) or "none"
        raise CheckpointError(f"{place}: no such checkpoint; the folder has steps {known}")
    wrong = damage(place, mesh)
    if wrong:
        raise CheckpointError(
            f"{wrong}; take another step (checkpoint.load_step = -1 takes the newest complete one)"
        )
    return facts_of(place)


def checked_index(place: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint that was found complete. Raises CheckpointError."""
    checked_facts(place)
    return index_of(place)


def index_of(place: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint, in the files that its manifest names: the run may be removing
    it just now. Raises CheckpointError if a part of one is in no file."""
    try:
        names = sorted(files_of(place))
        shards = [name for name in names if name.endswith(SUFFIX)]
        index = read_index(place / name for name in shards)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{place} is damaged: {error}") from error
    wrong = first_wrong(index)
    if wrong:
        raise CheckpointError(f"{place} is damaged: {wrong}")
    return index


def files_of(place: Path) -> dict[str, FileFacts]:
    """The files of a checkpoint, as its manifest names them: all that are there. Raises OSError or
    ValueError."""
    files = json_of(read_regular(place / MANIFEST), Manifest)["files"]
    for name in files:
        if name != Path(name).name:
            raise ValueError(f"{name!r} is not the name of a file in the folder")
    if STATE not in files:
        raise ValueError(f"it does not name {STATE}")
    for path in paths_in(place, f"*{SUFFIX}"):
        if path.name not in files:
            raise ValueError(f"it does not name {path.name}, which is there")
    return files


def damage(place: Path, mesh: Mesh = ALONE) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is complete. Collective over the
    mesh: each process examines its share of the files.

    Raises CheckpointError where a file that is there cannot be read: it may be whole, and an older
    checkpoint in its place would lose what was trained since.
    """
    with mesh.raise_on_all_ranks():
        wrong = damage_here(place, mesh)
    return next(filter(None, mesh.all_gather_object(wrong)), None)


def damage_here(place: Path, mesh: Mesh) -> str | None:
    """The same of the files that this process examines."""
    try:
        files = list(files_of(place).items())
        for name, fact in files[mesh.rank() :: mesh.size()]:
            wrong = damage_of_file(place, name, fact)
            if wrong:
                return wrong
    except OSError as error:
        if may_be_whole(error):
            raise CheckpointError(
                f"{error.filename or place} {problem_of(error)}. The checkpoint may be whole, so "
                f"no other is taken in its place. Try again, or move {place} to another folder"
            ) from error
        return f"{place} is damaged: {MANIFEST} {problem_of(error)}"
    except ValueError as error:
        return f"{place} is damaged: {MANIFEST} cannot be read ({problem_of(error)})"
    return None


def may_be_whole(error: OSError) -> bool:
    """Whether a file is there that could not be read now, of which nothing more is known."""
    return not isinstance(error, FileNotFoundError | NotADirectoryError | IrregularFileError)


def damage_of_file(
    place: Path,
    name: str,
    fact: FileFacts,
) -> str | None:
    """What is wrong with one file of a checkpoint; None if it has its size and checksum."""
    path = place / name
    if not is_file(path):
        return f"{place} is damaged: {name} is missing"
    if path.stat().st_size != fact["bytes"]:
        return (
            f"{place} is damaged: {name} has {path.stat().st_size:,} bytes where "
            f"{fact['bytes']:,} were written"
        )
    if checksum(path) != fact["crc32"]:
        return f"{place} is damaged: the bytes of {name} are not those that were written (checksum)"
    return None


def checksum(path: Path) -> int:
    """CRC-32: against accidents, not adversaries (nothing in a checkpoint can run code), at over 1
    GB/s."""
    value = 0
    with open_regular(path) as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def write_tensors(
    held: dict[str, LocalTensor],
    folder: Path,
    rank: int,
) -> dict[str, FileFacts]:
    """Write the files of a process, synced, and return their sizes and checksums. The weights have
    a file of their own, so that reading them does not read the optimizer. Raises OSError."""
    files: dict[str, FileFacts] = {}
    for kind in ("model", "optimizer"):
        part: dict[str, LocalTensor] = {}
        for name, tensor in held.items():
            if name.startswith("model/") is (kind == "model") and tensor.slices:
                part[name] = tensor
        if part:
            path = folder / f"shard-{rank:05d}-{kind}.safetensors"
            files[path.name] = settled(path, write_shard(part, path))
    return files


def settled(path: Path, crc32: int) -> FileFacts:
    """Sync a file to disk; its entry in the manifest."""
    sync(path)
    return {"bytes": path.stat().st_size, "crc32": crc32}


def write_manifest(
    folder: Path,
    facts: Facts,
    files: Mapping[str, FileFacts],
) -> None:
    """Write state.json, then the manifest with size and checksum of every file, all synced: the
    folder is then ready to be renamed."""
    (folder / STATE).write_text(json.dumps(facts, indent=1))
    all_files = {**files, STATE: settled(folder / STATE, checksum(folder / STATE))}
    (folder / MANIFEST).write_text(json.dumps({"files": all_files}, indent=1))
    for mark in paths_in(folder, "rank-*.json"):
        mark.unlink()
    for path in (folder / MANIFEST, folder):
        sync(path)


def recover(folder: Path) -> None:
    """Put back what `put_in_place` had moved aside when it was killed."""
    for before in paths_in(folder, "step-*.before"):
        place = before.with_suffix("")
        if exists(place):
            shutil.rmtree(before)
        else:
            before.rename(place)


def clean(folder: Path) -> None:
    """Remove what a kill has left of unfinished saves and removals. One process writes to a run
    folder at a time."""
    recover(folder)
    for path in [*paths_in(folder, "step-*.writing*"), *paths_in(folder, "step-*.forgotten")]:
        shutil.rmtree(path)
