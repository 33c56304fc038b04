"""What a run does after its last step: what its task writes then (export, sample), the report page,
and the list of its outputs."""

import logging
from pathlib import Path

from longfire.checkpoint.best import best_steps, read_losses
from longfire.checkpoint.state import State
from longfire.config.run import RUN_TOML, Run
from longfire.errors import SettingsError, UserError
from longfire.optim import averages_in_place
from longfire.tasks.contract import Results, Task
from longfire.training.records import METRICS
from longfire.training.report_page import html

logger = logging.getLogger(__name__)


def finish(run: Run, state: State, task: Task, results: Results) -> None:
    """Do what the settings ask for at the end. Where several processes trained, process 0 does it,
    with the model of the last checkpoint.

    The run itself is complete and saved: whatever fails here, the rest is done, and the last lines
    list the outputs. The first UserError is raised after them.
    """
    outputs = {"settings": run.folder / RUN_TOML, "metrics": run.folder / METRICS}
    if run.checkpoint.enable_checkpoint:
        outputs["checkpoint"] = run.folder / run.checkpoint.folder / f"step-{state.step}"
    outputs |= best_checkpoint(run)
    for source, numbers in results.items():
        logger.info(task.result_line(source, numbers))
    failures: list[UserError] = []
    try:
        with averages_in_place(
            state.optimizer, run.uses_average and state.mesh.has_whole_parameters
        ):
            for part in (task.write_export, task.write_sample):
                try:
                    outputs |= part(state)
                except UserError as error:
                    failures.append(error)
        try:
            outputs |= write_report(run)
        except UserError as error:
            failures.append(error)
    finally:
        logger.info(outputs_text(outputs))
    for failure in failures[1:]:
        logger.info(f"failed after the last step: {failure}")
    if failures:
        raise failures[0]


def best_checkpoint(run: Run) -> dict[str, Path]:
    """With checkpoint.keep_best_k: the checkpoint of the lowest validation loss, which is logged.
    Returns the outputs."""
    folder = run.folder / run.checkpoint.folder
    if not (run.checkpoint.enable_checkpoint and run.checkpoint.keep_best_k):
        return {}
    best = best_steps(folder, 1)
    if not best:
        return {}
    loss = read_losses(folder)[best[0]]
    logger.info(f"best checkpoint: step {best[0]:,}, validation loss {loss:.4f}")
    return {"best checkpoint": folder / f"step-{best[0]}"}


def outputs_text(outputs: dict[str, Path]) -> str:
    """The paths of what the run has written, a line each."""
    width = max(map(len, outputs))
    lines = ["", "Outputs:"]
    for name, path in outputs.items():
        lines.append(f"  {name:<{width}}  {path}")
    return "\n".join(lines)


def write_report(run: Run) -> dict[str, Path]:
    """With metrics.report: the report page. Returns the outputs."""
    if not run.metrics.report:
        return {}
    try:
        html([run.folder], run.folder / "report.html")
    except SettingsError as error:  # matplotlib is an extra: the run has not failed without it
        logger.info(f"no report.html: {error}")
        return {}
    return {"report": run.folder / "report.html"}
