"""When a run is evaluated on validation records, where results go, and what follows from them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from longfire.checkpoint.saving import Checkpoints
from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.evaluation.evaluate import EvaluationStopped
from longfire.optim import averages_in_place
from longfire.parallel.apply import reshard
from longfire.tasks.contract import Results, Task
from longfire.training.plateau import after_validation
from longfire.training.reporting import QuietReport, Report
from longfire.training.schedule import by_steps

logger = logging.getLogger(__name__)


def is_due(interval: int, step: int) -> bool:
    """Whether something that is done every `interval` steps (0: never) follows this step."""
    return interval > 0 and step % interval == 0


def validate(
    state: State,
    run: Run,
    task: Task,
    report: Report | QuietReport,
    checkpoints: Checkpoints,
) -> Results | None:
    """The numbers of each validation source, which the report records as eval/<source>/loss ...;
    None where a stop was requested before the end. The checkpoints note the loss of all.
    Collective."""
    try:
        with evaluated_weights(state, run):
            results = task.evaluate(state)
    except EvaluationStopped:
        logger.info(
            f"the evaluation of step {state.step} was stopped; it is done when the run is resumed"
        )
        return None
    if results:
        checkpoints.note_loss(state.step, loss_of_all(results))
        report.record(state.step, fields_of(results))
        count_for_plateau(state, run, loss_of_all(results))
    return results


@contextmanager
def evaluated_weights(state: State, run: Run) -> Iterator[None]:
    """Inside, the model has the weights that are evaluated: with eval.ema the averages."""
    if run.uses_average:
        state.wait_for_snapshot()
        reshard(state.model)
    with averages_in_place(state.optimizer, run.uses_average):
        yield


def fields_of(results: Results) -> dict[str, float]:
    """The results as fields of one record: eval/<source>/<number>."""
    fields: dict[str, float] = {}
    for source, numbers in results.items():
        for name, value in numbers.items():
            fields[f"eval/{source}/{name}"] = value
    return fields


def loss_of_all(results: Results) -> float:
    """The loss of all validation tokens, or records, of all sources: its mean over them."""
    total_loss = 0.0
    total = 0.0
    for numbers in results.values():
        count = numbers["tokens"] if "tokens" in numbers else numbers["records"]
        total_loss += numbers["loss"] * count
        total += count
    return total_loss / total


def count_for_plateau(state: State, run: Run, loss: float) -> None:
    """With the schedule `plateau`: count a validation by eval.interval, on all processes alike, and
    log that it lowers the learning rate. Collective."""
    if run.lr_scheduler.name != "plateau" or not is_due(run.eval.interval, state.step):
        return
    before = state.plateau
    loss = state.mesh.broadcast_object(loss)
    state.plateau = after_validation(before, state.step, loss, run.lr_scheduler)
    was = by_steps(state.step, 0, run.lr_scheduler, before.drops)
    share = by_steps(state.step, 0, run.lr_scheduler, state.plateau.drops)
    if share < was:
        best = state.plateau.best
        lowest = f"is still {best:.4f}" if best is not None else "is not finite"
        logger.info(
            f"step {state.step}: the learning rate is lowered to {share:.3g} of its peak, since "
            f"the lowest validation loss {lowest}"
        )


def is_missing(run: Run, state: State, report: Report | QuietReport) -> bool:
    """Whether the run resumes from a step whose evaluation was due and was not finished (a step is
    saved before it is evaluated), or is not counted in the checkpoint by the schedule `plateau`.
    Collective."""
    is_evaluated_step = state.step > 0 and is_due(run.eval.interval, state.step)
    is_counted = run.lr_scheduler.name != "plateau" or state.plateau.step == state.step
    is_there = report.has_evaluation and is_counted
    return state.mesh.broadcast_object(is_evaluated_step and not is_there)
