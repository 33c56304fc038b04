"""Mixers, MLPs, optimizers and tasks from a user's own file: `model.plugins = ["mine.py"]` runs
the file and adds its tables MIXERS, MLPS, OPTIMIZERS and TASKS to ours.

A plugin is code, and runs with all rights of its user. So only a recipe or a command line that
names it makes it run; a run folder that merely mentions one is not enough (`run.of_folder`).
"""

import ast
import importlib.util
import inspect
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import ModuleType

from longfire.config.model_config import NO_MLP, ModelConfig
from longfire.errors import SettingsError
from longfire.mixers import MIXERS
from longfire.mixers.mixer import Mixer
from longfire.mlps import MLPS
from longfire.mlps.contract import MLP
from longfire.optim.contract import OptimizerRule
from longfire.optim.table import OPTIMIZERS
from longfire.tasks.contract import Task
from longfire.tasks.table import TASKS

# Attributes by which mixers looked at other tokens before `Sequence.ops`, and what to write now.
OLD_ATTRIBUTES = {
    "attend": "seq.ops.attention(q, k, v, ...)",
    "recur": "seq.ops.recurrence(op, ...) with an op of the class attribute `recurrences`",
    "convolve": "seq.ops.convolution(x, weight, bias, ...)",
    "shift": "seq.ops.token_shift(x, ...)",
}

_loaded: dict[Path, ModuleType] = {}


def load_plugins(files: tuple[str, ...]) -> None:
    """Run each file once in this process. Raises SettingsError naming the file and what is wrong
    with it."""
    for file in files:
        path = Path(file).resolve()
        if path not in _loaded:
            _loaded[path] = run_file(path)
            add_mixers(path, getattr(_loaded[path], "MIXERS", {}))
            add_mlps(path, getattr(_loaded[path], "MLPS", {}))
            add_optimizers(path, getattr(_loaded[path], "OPTIMIZERS", {}))
            add_tasks(path, getattr(_loaded[path], "TASKS", {}))


def run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SettingsError(f"model.plugins names {path}, but there is no such file")
    name = f"longfire_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(
            f"model.plugins names {path}, which is no Python file: its name must end with .py"
        )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise SettingsError(
            f"model.plugins: {path} failed when it was run: {type(e).__name__}: {e}"
        ) from e
    return module


def refuse_old_calls(mixer: type[Mixer]) -> None:
    """Raises SettingsError, with file and line, for calls such as self.recur(..., documents=...) in
    a mixer or in what it is derived from: mixers had such attributes before `seq.ops`."""
    theirs = [cls for cls in mixer.__mro__ if cls.__module__.split(".")[0] != "longfire"]
    for cls in theirs:
        try:
            lines, first = inspect.getsourcelines(cls)
        except (OSError, TypeError):  # of Python itself, or made without a file
            continue
        parsed = ast.parse(textwrap.dedent("".join(lines)))
        for call in (node for node in ast.walk(parsed) if isinstance(node, ast.Call)):
            name = old_attribute(call)
            if name:
                raise SettingsError(
                    f"{inspect.getsourcefile(cls)}:{first + call.lineno - 1}: self.{name} is no "
                    f"longer how a mixer looks at other tokens; call {OLD_ATTRIBUTES[name]} "
                    "(docs/mixers.md)"
                )


def old_attribute(call: ast.Call) -> str:
    """The one of OLD_ATTRIBUTES that is called, with documents; "" where none is."""
    called = ast.unparse(call.func)
    is_given_documents = any(keyword.arg == "documents" for keyword in call.keywords)
    name = called.removeprefix("self.")
    is_old = called != name and name in OLD_ATTRIBUTES
    if is_old and is_given_documents:
        return name
    return ""


def add_mixers(path: Path, table: object) -> None:
    """The plugin's mixers beside ours. Raises SettingsError for what is no mixer or has a name that
    is taken."""
    if not isinstance(table, dict):
        raise SettingsError(
            f"{path}: MIXERS must be a table of names and classes, as in "
            "longfire/mixers/__init__.py"
        )
    for name, mixer in table.items():
        if not (isinstance(mixer, type) and issubclass(mixer, Mixer) and hasattr(mixer, "Config")):
            raise SettingsError(
                f"{path}: MIXERS[{name!r}] is no class derived from longfire.mixers.mixer.Mixer "
                "with a Config"
            )
        if name in MIXERS:
            raise SettingsError(
                f"{path}: MIXERS[{name!r}]: the name is taken by {MIXERS[name].__module__}; "
                "choose another"
            )
        refuse_old_calls(mixer)
    MIXERS.update(table)


def add_mlps(path: Path, table: object) -> None:
    """The plugin's MLPs beside ours. Raises SettingsError for what is no MLP or has a name that is
    taken: by an MLP, a mixer or a key of the model, all of which share a config.json."""
    if not isinstance(table, dict):
        raise SettingsError(
            f"{path}: MLPS must be a table of names and classes, as in longfire/mlps/__init__.py"
        )
    taken = {*MLPS, *MIXERS, NO_MLP, *(field.name for field in fields(ModelConfig))}
    for name, mlp in table.items():
        if not (isinstance(mlp, type) and issubclass(mlp, MLP)):
            raise SettingsError(
                f"{path}: MLPS[{name!r}] is no class derived from longfire.mlps.contract.MLP"
            )
        if name in taken:
            raise SettingsError(f"{path}: MLPS[{name!r}]: the name is taken; choose another")
    MLPS.update(table)


def are_loaded(files: tuple[str, ...]) -> bool:
    """Whether these files were run in this process. (Who only prepares data runs none.)"""
    return all(Path(file).resolve() in _loaded for file in files)


def add_optimizers(path: Path, table: object) -> None:
    """The plugin's optimizers beside ours. Raises SettingsError for what is no rule of an optimizer
    or has a name that is taken."""
    if not isinstance(table, dict):
        raise SettingsError(
            f"{path}: OPTIMIZERS must be a table of names and classes, as in "
            "longfire/optim/table.py"
        )
    for name, rule in table.items():
        if not (isinstance(rule, type) and issubclass(rule, OptimizerRule)):
            raise SettingsError(
                f"{path}: OPTIMIZERS[{name!r}] is no class derived from "
                "longfire.optim.contract.OptimizerRule"
            )
        if name in OPTIMIZERS:
            raise SettingsError(
                f"{path}: OPTIMIZERS[{name!r}]: there is an optimizer of this name; choose another"
            )
    OPTIMIZERS.update(table)


def add_tasks(path: Path, table: object) -> None:
    """The plugin's tasks beside ours. Raises SettingsError for what is no task or has a name that
    is taken."""
    if not isinstance(table, dict):
        raise SettingsError(
            f"{path}: TASKS must be a table of names and classes, as in longfire/tasks/table.py"
        )
    for name, task in table.items():
        if not (isinstance(task, type) and issubclass(task, Task)):
            raise SettingsError(
                f"{path}: TASKS[{name!r}] is no class derived from longfire.tasks.contract.Task"
            )
        if name in TASKS:
            raise SettingsError(
                f"{path}: TASKS[{name!r}]: there is a task of this name; choose another"
            )
    TASKS.update(table)
