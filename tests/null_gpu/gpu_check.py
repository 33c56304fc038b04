"""`longfire gpu-check` under the stand-in, every stage: that its code runs to its end on CUDA, and
what of graphs and waits there is to count. No number and no time of it means anything.

    python tests/null_gpu/start.py FOLDER tests/null_gpu/gpu_check.py OUTPUT [STAGE,...]

It ends with 0 if every stage ran to its end and found nothing wrong but numbers.
"""

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import no_kernels

from longfire.gpu_check import short_run
from longfire.gpu_check.check import Check, chosen
from longfire.gpu_check.stage import Measure, Outcome, Work
from longfire.json_types import JsonObject

MINUTES = 60
SLOWER = 10  # the host's code of CUDA on few cores, and compilers among it
COMMAND = Path(__file__).with_name("longfire_command.py")
REAL_COMMAND = short_run.command_of
# Stages that compare numbers, and the end of what they call wrong where nothing is computed
OF_NUMBERS = ("facts", "ops at small sizes", "ops at recipe sizes", "quickstart", "checkpoint")
NUMBER = re.compile(
    r"( inf| nan| [0-9.]+e[+-][0-9]+|nothing was learned|after it was read back|its code runs)$"
)
# Its reference selects tokens by what was computed, so that sizes are numbers too.
SIZED_BY_NUMBERS = "linear_cross_entropy, l2 warp"


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
    """Run the stages at small sizes; 0 if they ran to their end."""
    stages = []
    for stage in chosen(names):
        measure = partial(without_numbers, stage.measure)
        seconds = SLOWER * stage.seconds_small
        stages.append(replace(stage, measure=measure, seconds_small=seconds))
    check = Check(output, MINUTES, is_small=True, stages=stages)
    check.run()
    wrong = []
    for line in check.lines:
        for problem in problems_of_code(line):
            wrong.append(f"{line['stage']}: {line['state']}: {problem}")
    print("\n".join(wrong) or "every stage ran to its end; what is called wrong above are numbers")
    return int(bool(wrong))


def problems_of_code(line: JsonObject) -> list[str]:
    """What a stage found wrong and no number explains."""
    problems = [str(problem) for problem in line["problems"]]
    if line["state"] == "ok":
        return problems
    if line["state"] != "wrong" or line["stage"] not in OF_NUMBERS:
        return problems or [str(line["row"])]
    found = []
    for problem in problems:
        explained = NUMBER.search(problem) or problem.startswith(SIZED_BY_NUMBERS)
        if not explained:
            found.append(problem)
    return found


if __name__ == "__main__":
    words = sys.argv[2].split(",") if len(sys.argv) > 2 else []
    sys.exit(main(Path(sys.argv[1]), words))
