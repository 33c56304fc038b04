"""Which plans a rule is refused under: an axis that no test proves for it."""

from collections.abc import Iterator, Mapping

from longfire.config.settings import Optimizer as Settings
from longfire.optim.contract import Needs
from longfire.optim.table import rule_of

# Axes along which a process has only a part of what an update needs: FSDP2 cuts parameters by rows,
# tensor parallelism cuts some by rows and some by columns.
CUTS = {Needs.NUMBERS: set(), Needs.ROWS: {"tp"}, Needs.MATRIX: {"dp_shard", "cp", "tp"}}
DATA = {"dp_replicate", "dp_shard"}  # axes that are as long as the processes that were started


def refusals(chosen: Settings, asked: Mapping[str, str]) -> Iterator[str]:
    """What of a plan this optimizer cannot be used with, each with the setting and the fix.

    asked: axes of the plan that have several processes -> the setting that says so, with its value.
    Raises SettingsError for an optimizer that is not known.
    """
    rule = rule_of(chosen)
    name = f"optimizer.name = {chosen.name!r}"
    for axis, setting in asked.items():
        if axis in rule.proven_axes:
            continue
        if axis in CUTS[rule.needs]:
            why = f"{name} needs {rule.needs}, but {setting} cuts parameters into parts"
        else:
            why = f"{name} has no test that proves it with {setting}"
        if axis == "dp_shard" and "dp_replicate" in rule.proven_axes:
            fix = "replicate the model (parallelism.data_parallel_replicate_degree)"
        elif axis in DATA:
            fix = "start one process"
        else:
            fix = "set it to 1"
        yield f"{why}: {fix}, or take optimizer.name = 'AdamW'"
