"""The settings of a run in its folder: written before the first step, compared when the run is
resumed, and held by one process at a time."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import tomli_w

from longfire.aside import remove_abandoned, remove_all_abandoned
from longfire.checkpoint.provenance import RUN_TOML, TOKENIZER_FOLDER
from longfire.config import recipe as recipes
from longfire.config.init_rules import INIT_KEYS
from longfire.config.read_model import model_config_at
from longfire.config.run import DATA_JSON, ONCE, SAVED, Run
from longfire.disk import held, write_whole
from longfire.errors import CheckpointError, SettingsError
from longfire.listing import exists
from longfire.own_files import of_type, parse_toml, read_toml
from longfire.training.schedule import STEP_PLAN
from longfire.training.trackers import check_trackers

logger = logging.getLogger(__name__)

LOCK = "lock"
# Every setting by section and name, as TOML has it
Settings = dict[str, dict[str, object]]


@contextmanager
def begun(run: Run) -> Iterator[None]:
    """Hold the run folder while this process trains into it. The settings are saved there, and
    what differs from those saved before is logged.

    Two processes would mix their records and remove each other's unfinished checkpoints. Raises
    SettingsError if another one holds the folder, or if a tracker that the settings ask for is not
    installed, and as `save` does.
    """
    check_trackers(run.metrics)
    with ExitStack() as stack:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = held(run.folder / LOCK, lambda holder: refuse_another_process(run, holder))
            stack.enter_context(lock)
            refuse_links(run)
            remove_all_abandoned(run.folder)
            remove_abandoned(run.folder / run.checkpoint.folder)  # may be elsewhere
        except OSError as error:  # no permission to write, or a file system without locks
            raise unwritable(run.folder / LOCK, error) from error
        lines = changes(run)
        save(run)
        for line in lines:
            logger.info(line)
        yield


def refuse_links(run: Run) -> None:
    """Raises SettingsError where a folder that this run writes into is a link in the run folder: it
    may have come with a folder from elsewhere, and lead anywhere."""
    for name in (run.checkpoint.folder, TOKENIZER_FOLDER):
        path = run.folder / name
        if path.is_symlink() and not Path(name).is_absolute():
            raise SettingsError(
                f"{path} is a symbolic link, and is not written through: set checkpoint.folder to "
                "the absolute path that it leads to, or put a folder there"
            )


def refuse_another_process(run: Run, holder: str) -> None:
    """Raises SettingsError: `holder` trains into the folder."""
    raise SettingsError(
        f"job.dump_folder = {str(run.folder)!r} is being trained into by {holder}: wait for that "
        "run, stop it, or name another folder"
    ) from None


def save(run: Run) -> None:
    """Write config.json and run.toml, so that `longfire train <folder>/run.toml` starts the same
    run again.

    Raises SettingsError when the folder holds the checkpoints of a run with another model or
    another schedule of lengths, CheckpointError when it cannot be written.
    """
    refuse_another_model(run)
    refuse_another_schedule(run)
    write(run, run.folder)


def write(run: Run, folder: Path) -> None:
    """config.json and run.toml into this folder, each complete or as before. Raises
    CheckpointError."""
    config = run.known_model_config.to_dict()
    keep(folder / "config.json", json.dumps(config, indent=1) + "\n")
    keep(folder / RUN_TOML, SAVED + tomli_w.dumps(settings_to_save(run)))


def settings_to_save(run: Run) -> Settings:
    """Every setting as run.toml has it: the same from whatever folder it is read."""
    saved = run.settings()
    saved["model"]["config"] = "config.json"
    saved["model"]["weights"] = inside(run.folder, run.model.weights)
    if Path(run.tokenizer.path).absolute() == run.tokenizer_folder.absolute():
        saved["tokenizer"]["path"] = run.tokenizer_folder.name  # of an imported run
    saved["job"]["dump_folder"] = str(run.folder.absolute())
    saved["data"]["folder"] = str(Path(run.data.folder).absolute())
    for key in ONCE:
        section, _, name = key.partition(".")
        saved[section][name] = recipes.SETTINGS[key].default
    return saved


def previous_settings(run: Run) -> Settings:
    """The settings of the run in this folder, by section; empty where none has been started yet."""
    # an imported run has a checkpoint before it has been started
    was_started = exists(run.folder / DATA_JSON)
    if not was_started or not run.has_checkpoints or not exists(run.folder / RUN_TOML):
        return {}
    fix = "restore it from a copy, or name another job.dump_folder"
    return read_toml(run.folder / RUN_TOML, Settings, SettingsError, fix)


def changes(run: Run) -> list[str]:
    """A line for each setting that differs from those that the run was saved with. They are logged
    when it is resumed, since a mistake is easily made."""
    before = previous_settings(run)
    not_compared = {"job.dump_folder"}
    if run.training.max_seconds:
        not_compared.add(STEP_PLAN)
    # as TOML has it: lists, not tuples
    now = of_type(parse_toml(tomli_w.dumps(settings_to_save(run))), Settings)
    lines: list[str] = []
    for section, values in now.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if name not in before.get(section, {}) or key in not_compared:
                continue
            was = before[section][name]
            if value != was:
                lines.append(
                    f"changed since this run was last started: {key} = {value!r}, was {was!r}"
                )
    return lines


def refuse_another_model(run: Run) -> None:
    """Raises SettingsError when the folder holds checkpoints of another model. How parameters are
    initialised may differ."""
    config = run.folder / "config.json"
    if not exists(config) or not run.has_checkpoints:
        return
    there = model_config_at(config, run.model.backend).to_dict()
    here = run.known_model_config.to_dict()
    differs: list[str] = []
    for key in {**there, **here}:
        if there.get(key) != here.get(key) and key not in INIT_KEYS:
            differs.append(f"{key} is {there.get(key)} there and {here.get(key)} here")
    if differs:
        raise SettingsError(
            f"job.dump_folder = {str(run.folder)!r} holds checkpoints of another model: "
            f"{'; '.join(differs)}. Name another folder, or the model's own config (and "
            "model.rope_theta as the run was begun with)"
        )


def refuse_another_schedule(run: Run) -> None:
    """Raises SettingsError when the run was begun with another schedule of lengths: the order of
    the sequences of a stage depends on where the one before it ends."""
    before = previous_settings(run)
    there = before.get("training", {}).get("seq_len_schedule", [])
    here = list(run.training.seq_len_schedule)
    if before and here != there:
        raise SettingsError(
            f"training.seq_len_schedule = {here}, but the run in {run.folder} was begun with "
            f"{there}: continue with that, or begin another run from its weights "
            f"(model.weights = {str(run.folder)!r}, another job.dump_folder)"
        )


def inside(folder: Path, path: str) -> str:
    """A path as run.toml has it: relative where it is inside the run folder, so that both can be
    moved together."""
    place = Path(path).absolute()
    if path and folder.absolute() in place.parents:
        return place.relative_to(folder.absolute()).as_posix()
    return path


def keep(path: Path, text: str) -> None:
    """Write a file of the run folder: complete, or as before. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """The error that a file of the run folder cannot be written."""
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; free some space or name another "
        "job.dump_folder"
    )
