"""What is refused of a run about its task: settings that the task does not read, plans that are not
proven for it, and what it refuses itself."""

from collections.abc import Iterator

from longfire.config.recipe import SETTINGS
from longfire.config.rules.model import LANGUAGE_MODELING, degree_of
from longfire.config.run_settings import RunSettings
from longfire.errors import SettingsError


def of_task(run: RunSettings) -> Iterator[str]:
    """The task is known, and can do what the settings ask for."""
    if run.job.task == LANGUAGE_MODELING:  # the other files of this package are its rules
        if run.job.task_options:
            yield (
                f"job.task_options = {','.join(run.job.task_options)!r} is for a task of a plugin, "
                f"but job.task = {run.job.task!r}: leave it out"
            )
        return
    from longfire import plugins  # they need torch
    from longfire.tasks.contract import read_task_options
    from longfire.tasks.table import task_named

    if not plugins.are_loaded(run.model.plugins):
        return  # who only prepares data runs no plugin, which may bring the task
    try:
        task = task_named(run.job.task)
        read_task_options(task, run.job)
    except SettingsError as error:
        yield str(error)
        return
    for axis, degree in run.degrees.items():
        if degree > 1 and axis not in task.proven_axes:
            proven = ", ".join(sorted(task.proven_axes)) or "none"
            yield (
                f"{degree_of(run, axis)}: no test has compared the gradients of job.task = "
                f"{run.job.task!r} with those of one process along {axis} (of its axes: {proven}): "
                "set it to 1"
            )
    for key in sorted(unread_by(task.unread)):
        section, name = key.split(".", 1)
        value = getattr(getattr(run, section), name)
        if value != SETTINGS[key].default:
            yield f"{key} = {value!r} is not read by job.task = {run.job.task!r}: leave it out"
    yield from task.refusals(run)


def unread_by(entries: tuple[str, ...]) -> set[str]:
    """The keys that these entries name: keys, or whole sections."""
    keys: set[str] = set()
    for key in SETTINGS:
        if key in entries or key.partition(".")[0] in entries:
            keys.add(key)
    return keys


def refuse_other_tasks(run: RunSettings, what: str, instead: str = "") -> None:
    """Raises SettingsError where the task of a run is not language modelling; what: that only
    language models have. instead: a command that this task has."""
    if run.job.task != LANGUAGE_MODELING:
        instead = instead or "`longfire train` trains and evaluates it"
        raise SettingsError(
            f"{what} is for language models, but job.task = {run.job.task!r}: {instead}"
        )
