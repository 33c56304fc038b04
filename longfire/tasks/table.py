"""The table of tasks: the name that `job.task` uses -> its class, which is imported when it is
asked for. A file of `model.plugins` may add tasks (plugins.py)."""

from longfire.config.values import nearest
from longfire.errors import SettingsError
from longfire.lazy_table import LazyTable
from longfire.tasks.contract import Task

LANGUAGE_MODELING = "language_modeling"

TASKS: LazyTable[type[Task]] = LazyTable(
    {
        "image_classification": "longfire.tasks.image_classification:ImageClassification",
        LANGUAGE_MODELING: "longfire.tasks.language_modeling:LanguageModeling",
        "sequence_classification": (
            "longfire.tasks.sequence_classification:SequenceClassification"
        ),
    }
)


def task_named(name: str) -> type[Task]:
    """The task of job.task. Raises SettingsError for a name that is not in the table."""
    if name not in TASKS:
        raise SettingsError(
            f"job.task = {name!r} must be one of {', '.join(TASKS)}{nearest(name, TASKS)}, or be "
            "brought by a file of model.plugins"
        )
    return TASKS[name]
