"""Trackers of experiments: TensorBoard and Weights & Biases."""

import importlib
import importlib.util
import time
from pathlib import Path
from typing import Protocol

from longfire import launch
from longfire.config import settings
from longfire.disk import write_whole
from longfire.errors import SettingsError
from longfire.json_types import JsonObject
from longfire.own_files import read_toml_note
from longfire.regular_files import read_regular
from longfire.training.records import Values

RUN_TOML = "run.toml"
WANDB_ID = "wandb-id.txt"


class Tracker(Protocol):
    """Takes the records of a run."""

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


def check_trackers(metrics: settings.Metrics) -> None:
    """Raises SettingsError if a tracker that the settings ask for cannot be imported: before any
    data or device is touched."""
    asked: list[tuple[str, str, str, str]] = []
    if metrics.enable_wandb:
        asked.append(("metrics.enable_wandb", "wandb", "wandb", "pip install 'longfire[wandb]'"))
    if metrics.enable_tensorboard:
        key = "metrics.enable_tensorboard"
        install = "pip install tensorboard"
        asked.append((key, "tensorboard", "torch.utils.tensorboard", install))
    for key, package, module, install in asked:
        if importlib.util.find_spec(package) is None:
            raise SettingsError(
                f"{key} = true, but the package {package} is not installed: {install}, or set "
                f"{key} to false"
            )
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise SettingsError(
                f"{key} = true, but the package {package} cannot be imported ({error}): "
                f"{install}, or set {key} to false"
            ) from error


class TensorBoard:
    """Every number of a record as a scalar of the same name; those of a resumed run that are later
    than its start are hidden."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: Values) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """The same on Weights & Biases; a resumed run is the same run there, by an id in the run
    folder."""

    def __init__(self, folder: Path, metrics: settings.Metrics) -> None:
        import wandb

        kept = folder / WANDB_ID
        if not kept.exists():
            write_whole(kept, f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        options = {
            "project": metrics.wandb_project,
            "mode": metrics.wandb_mode,
            "id": read_regular(kept).decode(errors="replace"),
            "name": folder.name,
        }
        self.run = wandb.init(
            dir=str(folder),
            config=settings_of(folder),
            resume="allow",
            **{**options, **launch.wandb_run()},
        )
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Values) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


def settings_of(folder: Path) -> dict[str, object]:
    """The resolved settings of a run folder; empty if it has none, and, with a warning, where they
    cannot be read."""
    return read_toml_note(folder / RUN_TOML, JsonObject) or {}
