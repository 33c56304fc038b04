"""The table of optimizers: the name that `optimizer.name` uses -> its rule, which is imported when
it is asked for. A file of `model.plugins` may add rules (plugins.py)."""

from importlib import import_module

from longfire.config import settings
from longfire.config.values import nearest
from longfire.errors import SettingsError
from longfire.optim.contract import OptimizerRule

OPTIMIZERS: dict[str, str | type[OptimizerRule]] = {
    "AdamW": "longfire.optim.adam:AdamW",
    "Adam": "longfire.optim.adam:Adam",
    "SGD": "longfire.optim.sgd:SGD",
    "LAMB": "longfire.optim.lamb:LAMB",
    "Adafactor": "longfire.optim.adafactor:Adafactor",
}


def rule_of(chosen: settings.Optimizer) -> OptimizerRule:
    """The rule that the settings name. Raises SettingsError for a name that is not in the table, or
    options that the rule does not have."""
    entry = OPTIMIZERS.get(chosen.name)
    if entry is None:
        raise SettingsError(
            f"optimizer.name = {chosen.name!r} must be one of {', '.join(OPTIMIZERS)}"
            f"{nearest(chosen.name, OPTIMIZERS)}, or be brought by a file of model.plugins"
        )
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(import_module(module), name)
    return entry(chosen)
