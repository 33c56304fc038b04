"""The table of the commands, by name and by what they are for."""

from collections.abc import Callable

from longfire.cli.bench import bench
from longfire.cli.convert import convert
from longfire.cli.doctor import doctor
from longfire.cli.eval import evaluate
from longfire.cli.export import export
from longfire.cli.generate import generate
from longfire.cli.gpu_check import gpu_check
from longfire.cli.import_ import adopt
from longfire.cli.init import init
from longfire.cli.plan import plan
from longfire.cli.prepare import prepare
from longfire.cli.report import report
from longfire.cli.train import train

Command = Callable[[list[str]], int]

GROUPS: dict[str, dict[str, Command]] = {
    "train a model": {"init": init, "prepare": prepare, "train": train},
    "use it": {"eval": evaluate, "generate": generate, "report": report},
    "Hugging Face weights": {"export": export, "import": adopt, "convert": convert},
    "devices": {"plan": plan, "bench": bench, "doctor": doctor, "gpu-check": gpu_check},
}
COMMANDS: dict[str, Command] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}
