"""Checkpoints and the export."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, setting


@dataclass(frozen=True)
class Checkpoint:
    """When to save, what to keep, the export at the end."""

    enable_checkpoint: bool = setting(True, "save checkpoints and resume from the newest whole one")
    folder: str = setting("checkpoints", "folder inside the run folder")
    interval_type: Literal["steps", "seconds"] = setting("steps", "unit of interval")
    interval: int = setting(500, "save every so many steps or seconds; 0: only at the end", NATURAL)
    milestone_interval: int = setting(
        0, "save at every so many steps too, and keep these checkpoints for ever; 0: none", NATURAL
    )
    keep_latest_k: int = setting(
        5,
        "keep the newest k besides milestones and step 0; 0: keep all. Checkpoints that were "
        "saved under 0, or by a longfire whose default that was, are never removed",
        NATURAL,
    )
    keep_best_k: int = setting(
        0,
        "keep the k of the lowest validation loss besides: each step that is evaluated is saved "
        "too; 0: none",
        NATURAL,
    )
    load_step: int = setting(
        -1,
        "go back to this step, once: a run that has gone on from there, and has saved since, "
        "resumes from its newest checkpoint, whatever this says. Not kept in run.toml. -1: the "
        "newest whole checkpoint",
        "[-1, inf)",
    )
    load_step_again: bool = setting(
        False,
        "go back to load_step although this run has gone back to it before, and has saved "
        "since. Not kept in run.toml",
    )
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = setting(
        "async",
        "write behind training; async_with_pinned_mem: on CUDA by way of pinned memory, for whose "
        "copies the device waits and not the host; disabled: training waits until the checkpoint "
        "is on disk",
    )
    create_seed_checkpoint: bool = setting(
        False, "save step 0 and stop: the same start for several runs"
    )
    model_weights_only: bool = setting(
        False, "the last checkpoint holds the model's weights only (cannot be resumed)"
    )
    export: bool = setting(
        False, "at the end also write Hugging Face weights to <run>/hf, and check them"
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "type of exported weights"
    )
