"""Where a run is, what it reports, and what of it is traced."""

from dataclasses import dataclass
from typing import Literal

from longfire.config.settings.declaration import NATURAL, POSITIVE, setting


@dataclass(frozen=True)
class Job:
    """Where the run lives, and what it is called."""

    dump_folder: str = setting(
        "runs/longfire", "the run folder: settings, metrics, checkpoints, report"
    )
    description: str = setting(
        "", "free text, kept in run.toml and shown in the report", is_prose=True
    )
    task: str = setting(
        "language_modeling",
        "what the model learns: language_modeling (the next token of text), image_classification "
        "(the class of an image), sequence_classification (the class of a text), or a task of a "
        "file of model.plugins",
    )
    task_options: tuple[str, ...] = setting(
        (), "settings of a plugin's task, comma-separated: name=value"
    )
    save_code: bool = setting(
        True,
        "keep in code/ of the run folder what git does not have of the code: the difference of "
        "longfire's checkout from its commit, plugins, the recipe; no secrets, nothing ignored",
    )
    print_args: bool = setting(False, "print every resolved setting at the start")


@dataclass(frozen=True)
class Metrics:
    """Console, TensorBoard, Weights & Biases, the report."""

    log_freq: int = setting(10, "print every so many steps; metrics.jsonl has every step", POSITIVE)
    accuracy: bool = setting(
        False,
        "record the share of labels that are the likeliest word (of equally likely ones the "
        "first), of each step and each evaluation; one more pass over logits",
    )
    norms_freq: int = setting(
        0,
        "every so many steps record the norm of each parameter, of its gradient and of its update; "
        "such a step holds the parameters twice; 0: never",
        NATURAL,
    )
    enable_tensorboard: bool = setting(False, "write TensorBoard events")
    save_tb_folder: str = setting("tensorboard", "folder inside the run folder")
    enable_wandb: bool = setting(False, "log to Weights & Biases (extra `wandb`)")
    wandb_project: str = setting("longfire", "project there")
    wandb_mode: Literal["online", "offline"] = setting(
        "online", "offline: only on disk, to be synced later"
    )
    disable_color_printing: bool = setting(False, "no colours, no live progress")
    report: bool = setting(True, "write report.html at the end")


@dataclass(frozen=True)
class Profiling:
    """Torch profiler traces and memory snapshots."""

    enable_profiling: bool = setting(False, "write torch profiler traces")
    save_traces_folder: str = setting("profile_traces", "folder inside the run folder")
    profile_freq: int = setting(10, "trace one step in so many", POSITIVE)
    enable_memory_snapshot: bool = setting(False, "write CUDA memory snapshots beside the traces")
    save_memory_snapshot_folder: str = setting("memory_snapshot", "folder inside the run folder")
