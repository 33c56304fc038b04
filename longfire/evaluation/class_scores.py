"""`longfire eval` of a classifier: loss and accuracy on validation records, on one process or
several; and the classes of single files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from longfire.checkpoint.provenance import RUN_TOML, classes_of_run, run_folder_of, task_of
from longfire.checkpoint.restoring import load_model_weights, refuse_another_vocabulary
from longfire.checkpoint.weights import (
    choose_place,
    fingerprint_of,
    newest_weights,
    refuse_not_finite,
)
from longfire.config.config_file import read_config
from longfire.config.options import Scoring
from longfire.config.run import Run
from longfire.errors import DataError, SettingsError
from longfire.evaluation.scores import write_json
from longfire.huggingface.checksums import check_checksums
from longfire.huggingface.load import load_weights, model_config_in, model_of
from longfire.huggingface.vit import class_names
from longfire.huggingface.vit_images import image_settings_in
from longfire.launch import StopRequest, World
from longfire.messages import log_in_first_process, visible
from longfire.model import Model
from longfire.parallel.axes import AXES
from longfire.parallel.mesh import joined
from longfire.plain_console import plain_console
from longfire.tasks.class_losses import TOP
from longfire.tasks.classification import ClassificationTask
from longfire.tasks.contract import Results
from longfire.tasks.table import task_named

READ = ("data", "predict", "json")  # of the options of `longfire eval`


@dataclass(frozen=True)
class Classifier:
    """What is evaluated: the settings that say how records are read, the names of the classes, and
    the weights. step: of a run; -1: of a folder of Hugging Face weights."""

    run: Run
    task: type[ClassificationTask]
    classes: tuple[str, ...]
    weights: dict[str, Tensor]
    step: int

    @property
    def title(self) -> str:
        """The step, for headings."""
        return f"step {self.step}" if self.step >= 0 else "Hugging Face weights"


def main(
    folder: Path,
    scoring: Scoring,
    step: int,
    plugins: tuple[str, ...],
    world: World,
) -> int:
    """Score the classifier in a run folder or a folder of Hugging Face weights, or name the classes
    of files. Raises SettingsError, DataError, CheckpointError."""
    refuse_unread(scoring)
    log_in_first_process(world.is_first)
    if (folder / RUN_TOML).is_file():
        opened = of_run(folder, step, plugins)
    else:
        opened = of_weights(folder, scoring, step)
    run = opened.run
    device, dtype = choose_place(run.training, run.model, world.local_rank)
    degrees = {**dict.fromkeys(AXES, 1), "dp_replicate": world.size}
    with joined(world, degrees, run.comm, device) as mesh:
        task = opened.task(run, mesh, StopRequest())
        with records(task, opened, scoring):
            with mesh.raise_on_all_ranks():
                refuse_others(opened, task)
                model = model_of(task.model_config, opened.weights, device, dtype).eval()
            weights = fingerprint_of(model)
            found: dict[str, object]
            if scoring.predict:
                with mesh.raise_on_all_ranks():
                    predicted = predictions(task, model, scoring.predict)
                found = {"predictions": predicted}
                shown: str | Table = lines_of_predictions(predicted)
            else:
                results = task.measured(model)
                refuse_nothing(results, folder)
                found = {"sources": results}
                shown = table_of_results(results)
    if world.is_first:
        print(f"weights {weights}, {opened.title}")
        plain_console(soft_wrap=True).print(shown)
        if scoring.json:
            about = {"folder": str(folder), "step": opened.step, "weights": weights}
            write_json(Path(scoring.json), {**about, **found})
    return 0


def refuse_unread(scoring: Scoring) -> None:
    """Raises SettingsError for an option that only language models have."""
    for field in fields(Scoring):
        value = getattr(scoring, field.name)
        if field.name not in READ and value != field.default:
            raise SettingsError(
                f"--{field.name} is for language models, and this is a classifier, which is "
                "evaluated on the records of --data, or of its run: leave it out"
            )
    if scoring.predict and scoring.data:
        raise SettingsError(
            "--data measures accuracy, --predict names the classes of files: ask for one of them"
        )


def refuse_nothing(results: Results, folder: Path) -> None:
    """Raises DataError where there were no validation records."""
    if not results:
        raise DataError(
            f"{folder}: no record was held out of this run's data, so there is nothing to "
            f"evaluate: name records that it has not seen, `longfire eval {folder} --data FOLDER`"
        )


def of_run(folder: Path, step: int, plugins: tuple[str, ...]) -> Classifier:
    """The classifier of a run folder, which is only read. step: -1: its newest whole checkpoint."""
    overrides = {"model.plugins": ",".join(plugins)} if plugins else {}
    run = Run.of_folder(folder, overrides)
    task = classification_task(run.job.task)
    checkpoints = run.folder / run.checkpoint.folder
    if step < 0:
        step, weights = newest_weights(checkpoints)
    else:
        weights = load_model_weights(checkpoints / f"step-{step}")
    refuse_not_finite(weights, str(checkpoints / f"step-{step}"))
    return Classifier(run, task, classes_of_run(folder), weights, step)


def of_weights(folder: Path, scoring: Scoring, step: int) -> Classifier:
    """The classifier of a folder of Hugging Face weights."""
    if run_folder_of(folder):
        raise SettingsError(f"{folder} is a checkpoint of a run: name its run folder, and --step")
    if step >= 0:
        raise SettingsError(
            f"{folder}: --step {step} chooses a checkpoint of a run, but this is a folder of "
            "Hugging Face weights; leave --step out, or name the run folder"
        )
    if not scoring.data and not scoring.predict:
        raise SettingsError(
            "a folder of Hugging Face weights does not say which records were held out: name some "
            "with --data, or files to classify with --predict"
        )
    check_checksums(folder)
    name = task_of(folder)
    config = model_config_in(folder)
    weights = load_weights(folder, config)
    refuse_not_finite(weights, str(folder))
    given = {
        "job.task": name,
        "model.config": str(folder),
        "data.dataset": ",".join(scoring.data) or str(folder),
        **image_settings_in(folder),
    }
    run = Run.compose(None, given, trains=False)
    classes = class_names(read_config(folder), config.num_classes)
    return Classifier(run, classification_task(name), classes, weights, -1)


def classification_task(name: str) -> type[ClassificationTask]:
    """The task of this name. Raises SettingsError where it is not one of classes."""
    task = task_named(name)
    if not issubclass(task, ClassificationTask):
        raise SettingsError(
            f"longfire eval evaluates language models and classifiers, but not job.task = "
            f"{name!r}: `longfire train` measures what it measures"
        )
    return task


@contextmanager
def records(task: ClassificationTask, opened: Classifier, scoring: Scoring) -> Iterator[None]:
    """The task with the records that are evaluated: those of --data, else the validation records
    of the run. With --predict without any."""
    entries: Sequence[str] = scoring.data or opened.run.data.validation
    if scoring.predict:
        entries = ()
    if entries or scoring.predict:
        with task.opened_for_evaluation(entries, opened.classes):
            yield
        return
    with task.opened():
        yield


def refuse_others(opened: Classifier, task: ClassificationTask) -> None:
    """Raises SettingsError where the data have other classes than the model, CheckpointError where
    its tokenizer is another one."""
    folder = opened.run.folder
    if task.classes != opened.classes:
        raise SettingsError(
            f"data.dataset has the classes {', '.join(task.classes[:TOP])} ({len(task.classes)}), "
            f"but the run in {folder} was trained with {', '.join(opened.classes[:TOP])} "
            f"({len(opened.classes)}): name records of these with --data"
        )
    if opened.step >= 0:
        place = folder / opened.run.checkpoint.folder / f"step-{opened.step}"
        refuse_another_vocabulary(place, task.vocabulary, "that of the run folder")


@torch.no_grad()
def predictions(
    task: ClassificationTask, model: Model, files: Sequence[str]
) -> dict[str, dict[str, float]]:
    """File -> the likeliest classes, at most five, and their probabilities; the likeliest first."""
    size = task.run.training.batch_size
    device = next(model.parameters()).device
    found: dict[str, dict[str, float]] = {}
    for first in range(0, len(files), size):
        part = files[first : first + size]
        batch = task.batch_of_files([Path(file).expanduser() for file in part])
        probabilities_BN = task.logits(model, batch.to(device))[:, : len(task.classes)].softmax(-1)
        best = probabilities_BN.topk(min(TOP, len(task.classes)))
        for file, values, numbers in zip(part, best.values.tolist(), best.indices.tolist()):
            names = [task.classes[number] for number in numbers]
            found[file] = dict(zip(names, values))
    return found


def table_of_results(results: Results) -> Table:
    """A line for each source."""
    table = Table("source")
    for name in ("loss (nats a record)", "accuracy@1", f"accuracy@{TOP}", "records"):
        table.add_column(name, justify="right")
    for source, numbers in results.items():
        top = f"{numbers['accuracy_5']:.4f}" if "accuracy_5" in numbers else ""
        table.add_row(
            source,
            f"{numbers['loss']:.4f}",
            f"{numbers['accuracy']:.4f}",
            top,
            f"{numbers['records']:,.0f}",
        )
    return table


def lines_of_predictions(predicted: dict[str, dict[str, float]]) -> str:
    """A line for each file: its likeliest class, and the next ones."""
    lines: list[str] = []
    for file, classes in predicted.items():
        shown = [f"{name} {value:.4f}" for name, value in classes.items()]
        lines.append(f"{visible(file)}: {visible(', '.join(shown))}")
    return "\n".join(lines)
