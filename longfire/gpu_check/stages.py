"""The table of the stages, in the order in which they run."""

from longfire.gpu_check import (
    facts,
    graphs,
    long_row,
    op_checks,
    saving,
    short_run,
    speed,
    step_profile,
)
from longfire.gpu_check.stage import Stage

STAGES: tuple[Stage, ...] = (
    facts.STAGE,
    *op_checks.STAGES,
    *graphs.STAGES,
    short_run.STAGE,
    *speed.STAGES,
    *step_profile.STAGES,
    saving.STAGE,
    *long_row.STAGES,
    graphs.LAST,
)
