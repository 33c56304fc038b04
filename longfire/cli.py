"""The commands: a word and one function each. What a command needs is imported inside it, so that --help is instant."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from longfire import recipe
from longfire.aliases import ALIASES, as_text, bare_value
from longfire.errors import SettingsError, UserError
from longfire.launch import ALONE, World, stay_offline, world
from longfire.options import Checked, Sampling, Scoring
from longfire.settings import SECTIONS

WIDTH = 118  # of --help
VALUES_OF_BARE_FLAGS = {*recipe.TRUTH, "auto"}


class Parser(argparse.ArgumentParser):
    """The standard library's parser for a command's own words; wrong ones become a SettingsError, not an exit."""

    def __init__(self, command: Callable, example: str, usage: str | None = None) -> None:
        self.own: set[str] = set()
        super().__init__(
            prog=f"longfire {next(name for name, known in COMMANDS.items() if known is command)}",
            usage=usage,
            description=f"{command.__doc__}\n\nexample:\n  {example}",
            epilog="--traceback shows where in the code an error arose.",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=WIDTH),
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        self.own.update(names)
        return super().add_argument(*names, **how)

    def parse_args(self, words: Sequence[str]) -> argparse.Namespace:
        return self.parse_intermixed_args(words)  # a command's own words in any order: RUN --step 4 OUT

    def add_fields(self, options: type[Checked], repeated: Sequence[str] = ()) -> None:
        """An option for each field of a dataclass. Lists are comma-separated, those of `repeated` options given one by one."""
        group = self.add_argument_group(options.__name__.lower())
        for field in fields(options):
            how: dict[str, Any] = {"metavar": kind_of(field.type)}
            if field.type is bool:
                how = {"action": "store_true"}
            elif field.name in repeated:
                how = {"action": "append", "metavar": kind_of(get_args(field.type)[0])}
            group.add_argument(f"--{field.name}", default=None, help=help_of(field), **how)
            self.own.add(f"--{field.name}")

    def taken(self, options: type[Checked], words: argparse.Namespace) -> Any:
        """The dataclass as the command line says it. Raises SettingsError naming option and value."""
        given = {}
        for field in fields(options):
            text = getattr(words, field.name)
            if text is not None:
                try:
                    given[field.name] = recipe.as_type(field.type, text, text=isinstance(text, str))
                except ValueError as e:
                    raise SettingsError(f"--{field.name} = {text!r} {e}") from e
        return options(**given)

    def error(self, message: str) -> None:
        unknown = next((word for word in message.split() if word.startswith("--")), "")
        if message.startswith("unrecognized arguments") and unknown:
            spelling = unknown.removeprefix("--").partition("=")[0]
            own = recipe.nearest(f"--{spelling}", self.own)
            raise SettingsError(
                f"unknown option --{spelling}{own}" if own else recipe.unknown(spelling, recipe.COMMAND_LINE)
            )
        raise SettingsError(f"{message}; `{self.prog} --help` shows how")


class RecipeParser(Parser):
    """A parser of a recipe and of every setting. `.overrides` are the settings of the command line."""

    def __init__(self, command: Callable, example: str) -> None:
        super().__init__(command, example, usage="%(prog)s [RECIPE.toml] [--section.key VALUE ...]")
        self.overrides: dict[str, str] = {}

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        words, self.overrides = take_settings(list(words), self.own)
        for section, cls in SECTIONS.items():
            group = self.add_argument_group(section)
            for field in fields(cls):
                group.add_argument(f"--{section}.{field.name}", metavar=kind_of(field.type), help=help_of(field))
        return self.parse_args(words)


def take_settings(words: list[str], own: set[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into the words that are no settings, and {setting: text}.

    A setting is `--key value`, `--key=value`, a bare `--flag`, or `key=value`; keys are ours and every old spelling. An option
    of the command itself (`own`) is not one. Raises SettingsError where a value is missing.
    """
    rest, overrides = [], {}
    while words:
        word = words.pop(0)
        spelling, equals, value = word.removeprefix("--").partition("=")
        is_flag = word.startswith("--")
        known = spelling in recipe.SETTINGS or spelling in ALIASES
        if not known or (is_flag and word.partition("=")[0] in own) or not (is_flag or equals):
            rest.append(word)
            continue
        if not equals:
            bare = bare_value(spelling)
            if bare and not (words and words[0].lower() in VALUES_OF_BARE_FLAGS):
                value = bare
            elif words:
                value = words.pop(0)
            else:
                raise SettingsError(f"--{spelling} needs a value: --{spelling} VALUE")
        overrides[spelling] = value
    return rest, overrides


def kind_of(kind: Any) -> str:
    """A type as --help writes it."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{kind_of(get_args(kind)[0])},..."
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}[kind]


def help_of(field: Any) -> str:
    interval = field.metadata["within"]
    notes = [f"default: {as_text(field.default) or 'none'}"] + ([f"in {interval}"] if interval else [])
    return f"{field.metadata['help']} ({'; '.join(notes)})".replace("%", "%%")


def read_run(
    parser: RecipeParser, words: Sequence[str], needs_model: bool = True, world: World | None = ALONE
) -> tuple[Any, argparse.Namespace]:
    """The run that a recipe and the words after it describe, for the processes of `world` (None: as many as --gpus says), and the
    command's own options."""
    parser.add_argument(
        "recipe", nargs="?", type=Path, help="a TOML file: a whole run; settings on the command line win over it"
    )
    parser.add_argument(
        "--job.config_file", dest="named", type=Path, metavar="TOML", help="the recipe, as flame spells it"
    )
    options = parser.parse(words)
    if options.named and options.recipe:
        raise SettingsError(f"two recipes: {options.recipe} and --job.config_file {options.named}; give one")
    from longfire.run import Run

    world = World(options.gpus) if world is None else world
    recipe_file, note = options.recipe or options.named, world.by_first(print)
    try:
        return Run.compose(recipe_file, parser.overrides, needs_model=needs_model, world=world, note=note), options
    except SettingsError as error:
        # the first process of each machine reads the same files, and says it
        error.told_elsewhere = world.local_rank > 0
        raise


def add_which_model(parser: Parser) -> None:
    """The options of every command that reads a run folder."""
    parser.add_argument(
        "--step", type=int, default=-1, metavar="N", help="the checkpoint of this step (default: the newest)"
    )
    add_plugins(parser)


def add_plugins(parser: Parser) -> None:
    parser.add_argument(
        "--plugins", type=comma_separated(str), default=(), metavar="FILE,...",
        help="your own files that the run's mixers come from; they are run",
    )  # fmt: skip


def comma_separated(kind: type) -> Callable[[str], tuple]:
    """A reader of lists on the command line; argparse names it in its errors."""

    def read(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(","))

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


def plan(words: Sequence[str]) -> int:
    """What a recipe will hold, send and take on devices that are not here, and which plans would do better."""
    parser = RecipeParser(plan, "longfire plan recipes/transformer-340m-fineweb.toml --gpus 64 --device h100-80gb")
    parser.add_argument("--gpus", type=at_least(1), default=1, metavar="N", help="devices, a process each (default: 1)")
    parser.add_argument(
        "--device", default="h100-80gb", metavar="NAME",
        help="a100-40gb, a100-80gb, h100-80gb, h100-pcie, h200-141gb, b200-180gb, l40s-48gb (default: h100-80gb)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", default="", metavar="SIZE", help="of a device, as 80GB or 80GiB (default: that of --device)"
    )
    parser.add_argument(
        "--alternatives", type=at_least(0), default=8, metavar="N", help="other plans to tell; 0: none (default: 8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument(
        "--context", action="store_true",
        help="instead: the longest row that fits so many devices, for each mixer, and Ring Attention's tables beside ours",
    )  # fmt: skip
    run, options = read_run(parser, words, world=None)
    from longfire.parallel.cost import device_of
    from longfire.parallel.planner import Planner
    from longfire.parallel.tables import plan_run

    device = device_of(options.device, options.memory)
    if options.context:
        from longfire.parallel.context_tables import plan_context

        plan_context(run, device, options.json)
    else:
        plan_run(Planner(run, device), options.alternatives, options.json)
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers on the command line; argparse names it in its errors."""

    def read(text: str) -> int:
        if int(text) < least:
            raise ValueError(text)
        return int(text)

    read.__name__ = f"whole number from {least} on"
    return read


def prepare(words: Sequence[str]) -> int:
    """Text -> tokens: make the token stores of a recipe, once; train does it too, but this needs no device."""
    run, _ = read_run(
        RecipeParser(prepare, "longfire prepare recipes/quickstart.toml --data.num_workers 8"), words, False
    )
    from longfire.data.prepare import prepare as make_stores

    make_stores(run.data, run.tokenizer)
    return 0


def train(words: Sequence[str]) -> int:
    """Train a recipe to its last step, or go on from the newest whole checkpoint of its run folder."""
    parser = RecipeParser(train, "longfire train recipes/quickstart.toml --training.steps 300 --optimizer.lr 1e-3")
    run, _ = read_run(parser, words, world=world())
    if run.job.print_args and run.world.is_first:
        import tomli_w

        print(tomli_w.dumps(run.settings()))
    from longfire.train import train as train_run

    return train_run(run)


def evaluate(words: Sequence[str]) -> int:
    """Loss, perplexity and bits per byte on held-out documents or other texts; hidden needles; tasks of lm-eval."""
    parser = Parser(evaluate, "longfire eval runs/quickstart --step 100 --plot by-position.png")
    parser.add_argument("run", type=Path, help="a run folder, or a folder of Hugging Face weights")
    add_which_model(parser)
    parser.add_fields(Scoring)
    options = parser.parse_args(words)
    scoring = parser.taken(Scoring, options)
    if scoring.tasks and not scoring.allow_download:
        stay_offline()
    from longfire.scores import main as score

    return score(options.run, scoring, options.step, options.plugins)


def generate(words: Sequence[str]) -> int:
    """Continue prompts with a run's newest checkpoint, or with Hugging Face weights."""
    parser = Parser(generate, 'longfire generate runs/quickstart --prompt "def " --max_new_tokens 64')
    parser.add_argument("folder", type=Path, help="a run folder, or a folder of Hugging Face weights")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line, or JSON lines with a `prompt` (.jsonl)"
    )
    parser.add_argument(
        "--interactive", action="store_true", help="ask for lines and keep what was said (default: without a prompt)"
    )
    add_which_model(parser)
    parser.add_argument(
        "--batch_size", type=int, default=1, metavar="N", help="prompts that are continued together (default: 1)"
    )
    parser.add_argument("--stats", action="store_true", help="at the end tell tokens/s, ms a token, bytes of the cache")
    parser.add_fields(Sampling, repeated=("stop",))
    options = parser.parse_args(words)
    from longfire.prompts import main as continue_prompts

    return continue_prompts(
        options.folder, parser.taken(Sampling, options), options.prompt, options.prompts, options.interactive,
        options.batch_size, options.stats, options.step, options.plugins,
    )  # fmt: skip


def adopt(words: Sequence[str]) -> int:
    """Hugging Face weights -> a run folder to train, evaluate and generate from, compared with their own class before it counts."""
    parser = Parser(adopt, "longfire import downloads/SmolLM2-135M runs/continued")
    parser.add_argument("source", help="a folder with config.json, weights and tokenizer, or a model's name on the hub")
    parser.add_argument("run", type=Path, help="the run folder to make; its step 0 is this model")
    options = parser.parse_args(words)
    from longfire.hub.adopt import adopt as make_run

    print(make_run(options.source, options.run))
    run = options.run
    print(
        f"{run} is a run at step 0; `longfire train {run}/run.toml --data.dataset FILES --training.steps 100` goes on from it"
    )
    return 0


def export(words: Sequence[str]) -> int:
    """A checkpoint -> Hugging Face weights, config and tokenizer, reloaded and compared before it counts as done."""
    parser = Parser(export, "longfire export runs/quickstart exported --dtype bfloat16")
    parser.add_argument("run", type=Path, help="a run folder; the run may still be training")
    parser.add_argument("out", type=Path, nargs="?", help="where to (default: <run>/hf)")
    add_which_model(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="", help="(default: checkpoint.export_dtype)"
    )
    parser.add_argument(
        "--compare", choices=("logits", "bytes"), default="logits",
        help="what is compared before it counts as done; bytes alone need one shard in memory and not the model (default: logits)",
    )  # fmt: skip
    options = parser.parse_args(words)
    from longfire.hub.convert import export_run

    out, logits = options.out or options.run / "hf", options.compare == "logits"
    print(export_run(options.run, options.step, out, options.dtype, options.plugins, logits))
    return 0


def convert(words: Sequence[str]) -> int:
    """Begin another architecture from pretrained weights: what matches is copied, the rest is fresh."""
    parser = Parser(
        convert, "longfire convert --model mistral-7b --config recipes/models/gla-7b-mistral.json --output gla-7b"
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a run folder, or a folder of Hugging Face weights"
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="JSON", help="config.json of the model to be made"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where to; train it with --model.config DIR --model.weights DIR",
    )
    parser.add_argument(
        "--keep-attention", type=comma_separated(int), default=(), metavar="0,7,...",
        help="layers, counted from 0, that keep the attention of the source (default: none)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of what stays fresh (default: 42)")
    add_plugins(parser)
    options = parser.parse_args(words)
    from longfire.hub.transplant import convert as convert_model

    kept, plugins = options.keep_attention, options.plugins
    print(convert_model(options.model, options.config, options.output, kept, options.seed, plugins))
    return 0


def report(words: Sequence[str]) -> int:
    """One or several runs as one page: loss, learning rate, gradient norm, throughput, a table."""
    parser = Parser(report, "longfire report runs/gla runs/softmax --out compared.html")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders; several are drawn over each other"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: report.html in the first run folder)")
    options = parser.parse_args(words)
    from longfire.pages import html

    out = options.out or options.runs[0] / "report.html"
    html(options.runs, out)
    print(out)
    return 0


def doctor(words: Sequence[str]) -> int:
    """Check every fast kernel against its slow truth on this machine, forward and backward."""
    Parser(doctor, "longfire doctor").parse_args(words)
    from longfire.doctor import main as check_machine

    return check_machine()


def bench(words: Sequence[str]) -> int:
    """How fast this machine trains a recipe, on random tokens: tokens a second, where a step's time goes, memory."""
    parser = RecipeParser(bench, "longfire bench recipes/quickstart.toml --training.batch_size 16 --steps 20")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="steps to measure, after 2 of warm-up (default: 10)"
    )
    run, options = read_run(parser, words, world=world())
    from longfire.bench import bench as measure

    measure(run, options.steps)
    return 0


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "import": adopt,
    "export": export,
    "convert": convert,
    "report": report,
    "doctor": doctor,
    "bench": bench,
    "plan": plan,
}


def overview() -> str:
    lines = [f"  {name:<10}{command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([
        "longfire: from raw text to Hugging Face weights.", "", "usage: longfire COMMAND ...   (COMMAND --help says more)", "",
        *lines, "", "example:", "  longfire train recipes/quickstart.toml --training.steps 300", "",
        "--traceback shows where in the code an error arose; --version says which longfire this is.",
    ])  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What a user can mend is one message on stderr, without a traceback."""
    words = list(sys.argv[1:] if words is None else words)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if words[0] == "--version":
            print(f"longfire {version('longfire')}")
            return 0
        if words[0] not in COMMANDS:
            raise SettingsError(
                f"unknown command {words[0]!r}{recipe.nearest(words[0], COMMANDS)}; `longfire --help` lists them"
            )
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        if show_traceback:
            raise
        if not error.told_elsewhere:
            print(f"longfire: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longfire: interrupted", file=sys.stderr)
        return 130
