"""The commands of `longfire`, one file each. What a command needs is imported inside it, so that
--help is instant.

    init.py      a starter recipe; docs/model_config.md
    prepare.py   text -> token stores
    train.py     a recipe -> a run folder
    eval.py      a model, text or tasks -> numbers
    generate.py  a model, prompts -> text
    report.py    a run folder -> report.html
    export.py    a checkpoint -> Hugging Face weights
    import_.py   Hugging Face weights -> a run folder (`import` is a word of Python)
    convert.py   a model -> another architecture with every matching weight
    plan.py      a recipe -> what it would hold, send and take on devices that are not here
    bench.py     a recipe -> tokens per second on this machine
    doctor.py    every op compared with its reference on this machine
"""

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
COMMANDS: dict[str, Command] = {
    name: command for group in GROUPS.values() for name, command in group.items()
}
