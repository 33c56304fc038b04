"""The table of the stages, in the order in which they run."""

from longfire.gpu_check import facts, graphs, op_checks, speed
from longfire.gpu_check.stage import Stage

STAGES: tuple[Stage, ...] = (
    facts.STAGE,
    *op_checks.STAGES,
    *graphs.STAGES,
    *speed.STAGES,
    graphs.LAST,
)
