"""The table of the stages, in the order in which they run."""

from longfire.gpu_check import facts, graphs, op_checks, short_run, speed
from longfire.gpu_check.stage import Stage

STAGES: tuple[Stage, ...] = (
    facts.STAGE,
    *op_checks.STAGES,
    *graphs.STAGES,
    short_run.STAGE,
    *speed.STAGES,
    graphs.LAST,
)
