"""`longfire gpu-check` under the stand-in, every stage: that its code runs to its end on CUDA, and
what of graphs and waits there is to count. No number and no time of it means anything.

    python tests/null_gpu/start.py FOLDER tests/null_gpu/gpu_check.py OUTPUT [STAGE,...]
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import no_kernels

from longfire.gpu_check import short_run
from longfire.gpu_check.check import Check, chosen
from longfire.gpu_check.stage import Measure, Outcome, Work

MINUTES = 60
SLOWER = 10  # the host's code of CUDA on few cores, and compilers among it
COMMAND = Path(__file__).with_name("longfire_command.py")
REAL_COMMAND = short_run.command_of


def without_numbers(measure: Measure, work: Work) -> Outcome:
    """A stage whose kernels of fla are counted by name, and whose results count as finite; so are
    those of the processes that it starts."""
    with no_kernels.without_numbers(), patch.object(short_run, "command_of", command_of):
        return measure(work)


def command_of(work: Work, name: str, changes: dict[str, str]) -> list[str]:
    """`python -m longfire WORDS` as longfire_command.py runs it."""
    python, _, _, *words = REAL_COMMAND(work, name, changes)
    return [python, str(COMMAND), *words]


def main(output: Path, names: list[str]) -> int:
    """Run the stages at small sizes; the exit code of the check."""
    stages = []
    for stage in chosen(names):
        measure = partial(without_numbers, stage.measure)
        seconds = SLOWER * stage.seconds_small
        stages.append(replace(stage, measure=measure, seconds_small=seconds))
    return Check(output, MINUTES, is_small=True, stages=stages).run()


if __name__ == "__main__":
    words = sys.argv[2].split(",") if len(sys.argv) > 2 else []
    sys.exit(main(Path(sys.argv[1]), words))
