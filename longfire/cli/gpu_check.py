"""`longfire gpu-check`."""

import math
from collections.abc import Sequence
from pathlib import Path

from longfire.cli.arguments import Parser, comma_separated
from longfire.errors import SettingsError
from longfire.launch import stay_offline


def gpu_check(words: Sequence[str]) -> int:
    """Check and measure this machine's one GPU, stage by stage: numbers, graphs, curves, speed
    beside other libraries, memory.

    After each stage a row on the console and a JSON line in a file. Nothing is fetched. Exits with
    1 where something is wrong. Without a GPU: small sizes, which show that the code runs.
    """
    parser = Parser("gpu-check", gpu_check, "longfire gpu-check --minutes 20")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("gpu-check.jsonl"),
        metavar="FILE",
        help="where a JSON line after each stage is appended (default: gpu-check.jsonl)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        metavar="N",
        help="stages that would take longer than what is left of it are skipped (default: 20)",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="small sizes, of which no number says anything of speed",
    )
    parser.add_argument(
        "--only",
        type=comma_separated(str),
        default=(),
        metavar="STAGE,...",
        help="the stages whose names begin so, after the facts",
    )
    options = parser.parse_words(words)
    if not 0 < options.minutes < math.inf:
        raise SettingsError(f"--minutes = {options.minutes:g} must be above 0, and a number")
    stay_offline()
    from longfire.gpu_check.check import Check, chosen

    stages = chosen(options.only)
    return Check(options.output, options.minutes, options.small, stages).run()
