"""The table of commands: the word -> its function; a file each. What a command needs is imported inside it, so that --help is
instant."""

from collections.abc import Callable

from longfire.commands.bench import bench
from longfire.commands.convert import convert
from longfire.commands.doctor import doctor
from longfire.commands.eval import evaluate
from longfire.commands.export import export
from longfire.commands.generate import generate
from longfire.commands.import_ import adopt
from longfire.commands.init import init
from longfire.commands.plan import plan
from longfire.commands.prepare import prepare
from longfire.commands.report import report
from longfire.commands.train import train

Command = Callable[[list[str]], int]

GROUPS: dict[str, dict[str, Command]] = {
    "train a model": {"init": init, "prepare": prepare, "train": train},
    "use it": {"eval": evaluate, "generate": generate, "report": report},
    "Hugging Face weights": {"export": export, "import": adopt, "convert": convert},
    "devices": {"plan": plan, "bench": bench, "doctor": doctor},
}
COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}
