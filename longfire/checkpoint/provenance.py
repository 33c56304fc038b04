"""Where weights and token ids come from: the run folder that weights are in, the tokenizer beside
them, and in what two tokenizers differ.

    beside = tokenizer_beside(Path("runs/a"))       a run folder, a checkpoint in one, or Hugging
                                                    Face weights; None where there is none
    difference(beside.load(), tokenizer)            "" where the same text gives the same ids
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from longfire.config import settings
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokenizer_training import load
from longfire.errors import SettingsError
from longfire.listing import is_file, is_folder, paths_in
from longfire.own_files import json_of, read_json, read_toml

RUN_TOML = "run.toml"
CONFIG_JSON = "config.json"  # of a folder of Hugging Face weights
CLASSES_JSON = "classes.json"  # of a run folder: the names of the classes by their numbers
TOKENIZER_FOLDER = "tokenizer"  # of a run folder
# One of these is in every folder that holds a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)
# The parts of a tokenizer.json that decide which ids a text has, besides its vocabulary.
RULES = ("normalizer", "pre_tokenizer", "model")
VIT = "vit"  # the model_type of models of images
IMAGES = "image_classification"
LANGUAGE_MODELING = settings.Job.task
WITH_OWN_ENDS = ("chat", "tokens")  # record formats whose records have BOS and EOS of their own


class SavedTokenizer(TypedDict, total=False):
    """The keys of [tokenizer] that are read of a run.toml."""

    path: str
    add_bos: bool
    add_eos: bool


class SavedJob(TypedDict, total=False):
    """The keys of [job] that are read of a run.toml."""

    task: str


class SavedRun(TypedDict, total=False):
    """What of a run.toml is read here."""

    tokenizer: SavedTokenizer
    job: SavedJob


class SavedConfig(TypedDict, total=False):
    """What of a config.json is read here."""

    model_type: str


@dataclass(frozen=True)
class Beside:
    """The tokenizer beside weights: as tokenizer.path names it, and how the documents
    began and ended that the weights were trained on."""

    path: str
    add_bos: bool
    add_eos: bool

    def load(self) -> Tokenizer:
        """Raises DataError naming the file that cannot be read."""
        wanted = settings.Tokenizer(
            path=self.path,
            add_bos=False,
            add_eos=False,
        )
        return load(wanted, (), (), settings.Data())


def run_folder_of(weights: Path) -> Path | None:
    """The run folder that these weights are, or that this checkpoint is in; None for others.
    Raises SettingsError for the folder of all checkpoints of a run."""
    if is_file(weights / RUN_TOML):
        return weights
    checkpoints = paths_in(weights, "step-*")
    if checkpoints and is_file(weights.absolute().parent / RUN_TOML):
        raise SettingsError(
            f"{weights} holds all checkpoints of a run: name the run folder, {weights.parent}, "
            f"for the newest one, or one of them, as {checkpoints[-1]}"
        )
    is_export = is_file(weights / "config.json")  # a run folder may hold exports named step-N
    if step_of(weights) is None or is_export:
        return None
    return next(
        (folder for folder in weights.absolute().parents if is_file(folder / RUN_TOML)),
        None,
    )


def task_of(folder: Path) -> str:
    """The job.task of the model in a run folder, or in a folder of Hugging Face weights, of which
    those of images are classifiers. Raises SettingsError for a damaged file."""
    if is_file(folder / RUN_TOML):
        run = read_toml(folder / RUN_TOML, SavedRun, SettingsError, "restore it from a copy")
        return run.get("job", {}).get("task", LANGUAGE_MODELING)
    if not is_file(folder / CONFIG_JSON):
        return LANGUAGE_MODELING
    config = read_json(folder / CONFIG_JSON, SavedConfig, SettingsError, "restore it from a copy")
    return IMAGES if config.get("model_type") == VIT else LANGUAGE_MODELING


def classes_of_run(folder: Path) -> tuple[str, ...]:
    """The names of the classes that the run in a folder was trained with, by their numbers. Raises
    SettingsError."""
    fix = "restore it from a copy, or train the run for one step more"
    return tuple(read_json(folder / CLASSES_JSON, list[str], SettingsError, fix))


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint by the name of its folder, step-N; None for other folders."""
    number = checkpoint.name.removeprefix("step-")
    is_checkpoint = checkpoint.name.startswith("step-") and number.isascii() and number.isdigit()
    if is_checkpoint:
        return int(number)
    return None


def tokenizer_beside(weights: Path) -> Beside | None:
    """The tokenizer of the run that these weights are from, or the one in their own folder; None
    where there is none. Raises DataError where it cannot be read."""
    run_folder = run_folder_of(weights)
    if run_folder:
        return tokenizer_of_run(run_folder)
    if not any(is_file(weights / name) for name in TOKENIZER_FILES):
        return None
    tokenizer = Beside(str(weights), False, False).load()
    return Beside(str(weights), tokenizer.adds_bos, tokenizer.eos_id is not None)


def tokenizer_of_run(run_folder: Path) -> Beside | None:
    """The copy in a run folder; `bytes` needs none. None where the copy is missing."""
    recorded = recorded_tokenizer(run_folder)
    copy = run_folder / TOKENIZER_FOLDER
    if is_folder(copy):
        path = str(copy)
    elif recorded.path == "bytes":
        path = "bytes"
    else:
        return None
    return Beside(path, recorded.add_bos, recorded.add_eos)


def recorded_tokenizer(run_folder: Path) -> Beside:
    """That of a run.toml; the defaults where it says nothing."""
    defaults = settings.Tokenizer()
    run = read_toml(run_folder / RUN_TOML, SavedRun, SettingsError, "restore it from a copy")
    given = run.get("tokenizer", {})
    return Beside(
        path=given.get("path", defaults.path),
        add_bos=given.get("add_bos", defaults.add_bos),
        add_eos=given.get("add_eos", defaults.add_eos),
    )


def difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """What makes the same text have other ids with `ours` than with `theirs`; "" if nothing does.

    What is put around a text (BOS, EOS) and how ids become text again is not compared.
    """
    there = theirs.backend.get_vocab(with_added_tokens=True)
    here = ours.backend.get_vocab(with_added_tokens=True)
    if len(there) != len(here):
        return f"it has {len(there):,} entries, this one {len(here):,}"
    if there != here:
        token, number = min(there.items() - here.items(), key=lambda entry: entry[1])
        now = ours.backend.id_to_token(number)
        return f"id {number} is {token!r} there and {now!r} here"
    rules_there = json_of(theirs.backend.to_str(), dict[str, object])
    rules_here = json_of(ours.backend.to_str(), dict[str, object])
    differ = [rule for rule in RULES if rules_there[rule] != rules_here[rule]]
    if differ:
        return f"the entries are the same, but its {' and '.join(differ)} cut texts otherwise"
    return ""


def tokenizer_line(
    tokenizer: Tokenizer, wanted: settings.Tokenizer, record_formats: tuple[str, ...] = ()
) -> str:
    """What a run prints of its tokenizer: name, size, and what stands around each document.
    record_formats: of its sources, as data.record_format names them."""
    if record_formats and set(record_formats) <= set(WITH_OWN_ENDS):
        names = " and ".join(sorted(set(record_formats)))
        return (
            f"tokenizer: {wanted.path}, {tokenizer.vocab_size:,} entries, no BOS or EOS is added "
            f"to records of {names}"
        )
    bos = f"BOS {tokenizer.bos} before each document" if wanted.add_bos else "no BOS"
    eos = f"EOS {tokenizer.eos} after each" if wanted.add_eos else "no EOS"
    return f"tokenizer: {wanted.path}, {tokenizer.vocab_size:,} entries, {bos}, {eos}"
