"""What the commands' parsers share: a command's own words, a recipe, every setting, help by
section; free of torch."""

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from longfire.cli.old_words import OLD_WORDS, show_old_words, systems
from longfire.config import recipe, shipped, values
from longfire.config.aliases import ALIASES, Started, as_text, bare_value
from longfire.config.aliases.experiments import experiment
from longfire.config.options import Checked
from longfire.config.paths import refuse_url
from longfire.config.settings import SECTIONS
from longfire.errors import SettingsError, UserError
from longfire.launch import ALONE, World
from longfire.listing import hints_in
from longfire.messages import log_in_first_process, nothing_logged

logger = logging.getLogger(__name__)

WIDTH = 118  # of --help
# Settings whose values torchtitan takes as several words: layers.4 layers.8
SEVERAL_WORDS = (
    "experimental.pipeline_parallel_split_points",
    "parallelism.pipeline_parallel_split_points",
)
LAYER = re.compile(r"layers\.\d+")
HELP = ("-h", "--help")
VALUES_OF_BARE_FLAGS = {*values.TRUTH, "auto"}
MOST_USED = (  # what `train --help` begins with
    "job.dump_folder",
    "model.config",
    "data.dataset",
    "tokenizer.path",
    "training.seq_len",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.steps",
    "optimizer.lr",
    "lr_scheduler.warmup_steps",
    "checkpoint.interval",
    "eval.interval",
)


def formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=WIDTH)


class Parser(argparse.ArgumentParser):
    """The standard library's parser for a command's own words; wrong ones become a SettingsError,
    not an exit."""

    def __init__(
        self, name: str, command: Callable, example: str, usage: str | None = None
    ) -> None:
        self.own: set[str] = set()
        super().__init__(
            prog=f"longfire {name}",
            usage=usage,
            description=f"{unwrapped(command)}\n\nexample:\n  {example}",
            epilog="--traceback shows where in the code an error arose.",
            formatter_class=formatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, is_prose: bool = False, **how: Any) -> argparse.Action:
        """is_prose: its text may hold a URL. In every other option and word one is refused with the
        reason."""
        self.own.update(names)
        if not is_prose and how.get("action") in (None, "append"):
            how["type"] = without_urls(names[-1], how.get("type", str))
        return super().add_argument(*names, **how)

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """The words of a command line, positional ones in any place: RUN --step 4 OUT."""
        return self.parse_intermixed_args(words)

    def add_fields(self, options: type[Checked], repeated: Sequence[str] = ()) -> None:
        """An option for each field of a dataclass. Lists are comma-separated, those of `repeated`
        options given one by one."""
        group = self.add_argument_group(options.__name__.lower())
        for field in fields(options):
            how: dict[str, Any] = {"metavar": kind_of(field.type)}
            if field.type is bool:
                how = {"action": "store_true"}
            elif field.name in repeated:
                how = {"action": "append", "metavar": kind_of(get_args(field.type)[0])}
            if field.type is not bool and not field.metadata["is_prose"]:
                how["type"] = without_urls(f"--{field.name}", str)
            group.add_argument(f"--{field.name}", default=None, help=help_of(field), **how)
            self.own.add(f"--{field.name}")

    def taken(self, options: type[Checked], words: argparse.Namespace) -> Any:
        """The dataclass with the values of the command line. Raises SettingsError naming option
        and value."""
        given: dict[str, Any] = {}
        for field in fields(options):
            text = getattr(words, field.name)
            if text is None:
                continue
            try:
                given[field.name] = values.as_type(field.type, text, text=isinstance(text, str))
            except ValueError as error:
                raise SettingsError(f"--{field.name} = {text!r} {error}") from error
        return options(**given)

    def error(self, message: str) -> NoReturn:
        """Raises SettingsError with the message of argparse, or a better one for an unknown
        option."""
        options = [word for word in message.split() if word.startswith("--") or "=" in word]
        if not message.startswith("unrecognized arguments") or not options:
            raise SettingsError(f"{message}; `{self.prog} --help` shows how")
        spelling = options[0].removeprefix("--").partition("=")[0]
        if spelling in recipe.SETTINGS:
            raise SettingsError(self.takes_no_settings(spelling))
        own = "" if "." in spelling else values.nearest(f"--{spelling}", self.own)
        if own:
            raise SettingsError(f"unknown option --{spelling}{own}")
        raise SettingsError(recipe.unknown(spelling, recipe.COMMAND_LINE))

    def takes_no_settings(self, key: str) -> str:
        """The message for a setting of a run where a command has options of its own only."""
        option = f"--{key.partition('.')[2]}"
        if option in self.own:
            own = f"; its own option is {option}"
        else:
            own = f"; `{self.prog} --help` lists its options"
        return f"{key} is a setting of a run, and `{self.prog}` takes none{own}"


class RecipeParser(Parser):
    """A parser of a recipe and of every setting. `.overrides` are the settings of the command line.

    sections: those that matter most to the command, or none where a list of settings (`most_used`)
    says it better.
    """

    def __init__(
        self,
        name: str,
        command: Callable,
        example: str,
        sections: Sequence[str] = (),
        most_used: Sequence[str] = (),
    ) -> None:
        super().__init__(
            name, command, example, usage="%(prog)s [RECIPE] [--section.key VALUE ...]"
        )
        self.sections = sections
        self.most_used = most_used
        self.overrides: dict[str, str] = {}
        self.add_argument(
            "recipe",
            nargs="?",
            metavar="RECIPE",
            help="a TOML file that is a whole run, or the name of a recipe that comes with "
            "longfire, as quickstart; settings "
            "on the command line win over it",
        )
        self.add_argument(
            "--job.config_file", dest="named", metavar="TOML", help="the recipe, as flame spells it"
        )

        self.add_argument(
            OLD_WORDS,
            metavar="SYSTEM",
            help="print what the words of an earlier system mean here, and exit: "
            f"{', '.join(systems())}",
        )

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        show_old_words(words)
        words, self.overrides = take_settings(list(words), self.own)
        topic = topic_of(words)
        if topic is not None:
            self.show_help(topic)
        for word in words:
            if word.lstrip("-") in recipe.SETTINGS:  # with one dash, or none
                key = word.lstrip("-")
                raise SettingsError(f"{word}: a setting is written --{key} VALUE, or {key}=VALUE")
        return self.parse_words(words)

    def show_help(self, topic: str) -> NoReturn:
        """Print the command's own options, a section's settings, or all of both, and exit.

        Raises SettingsError with the nearest name where there is no such section.
        """
        if topic in SECTIONS:
            print(section_help(self.prog, topic))
        elif topic == "all":
            for section in SECTIONS:
                add_section(self, section)
            self.print_help()
        elif topic:
            raise SettingsError(
                f"--help {topic}: no section of "
                f"settings{values.nearest(topic, [*SECTIONS, 'all'])}; they are: "
                f"{', '.join(SECTIONS)}, all"
            )
        else:
            if self.most_used:
                group = self.add_argument_group(
                    f"the {len(self.most_used)} settings that people use most"
                )
                for key in self.most_used:
                    add_setting(group, key)
            self.epilog = f"{self.overview_of_sections()}\n\n{self.epilog}"
            self.print_help()
        raise SystemExit(0)

    def overview_of_sections(self) -> str:
        """A line for each section: what it is about."""
        lines = [
            f"settings, by section (`{self.prog} --help SECTION` lists a section's, `--help all` "
            "all):"
        ]
        for section in (*self.sections, *(name for name in SECTIONS if name not in self.sections)):
            mark = "*" if section in self.sections else " "
            lines.append(f" {mark}{section:<23}{summary_of(SECTIONS[section])}")
        if self.sections:
            lines.append(f" * what `{self.prog.split()[-1]}` uses most")
        return "\n".join(lines)


def topic_of(words: Sequence[str]) -> str | None:
    """What --help asks for: a section, "all", "" for the command itself; None where nobody asks."""
    for place, word in enumerate(words):
        option, equals, topic = word.partition("=")
        if option in HELP:
            following = words[place + 1] if place + 1 < len(words) else ""
            if equals:
                return topic
            if following.startswith("-"):
                return ""
            return following
    return None


def section_help(prog: str, section: str) -> str:
    """The settings of one section; of [model] also the keys of the model itself."""
    parser = argparse.ArgumentParser(
        prog=prog, add_help=False, usage=argparse.SUPPRESS, formatter_class=formatter
    )
    add_section(parser, section)
    if section == "model":
        group = parser.add_argument_group("the model itself, instead of model.config or over it")
        for key, field in recipe.SHAPE_KEYS.items():
            group.add_argument(f"--{key}", metavar=kind_of(field.type), help=help_of_key(field))
        group.add_argument(
            "--model.MIXER.KEY",
            metavar="VALUE",
            help="a key of a mixer's own table; `longfire init --model-keys` lists them",
        )
    return parser.format_help().rstrip()


def add_section(parser: argparse.ArgumentParser, section: str) -> None:
    group = parser.add_argument_group(section, summary_of(SECTIONS[section]))
    for field in fields(SECTIONS[section]):
        add_setting(group, f"{section}.{field.name}")


def add_setting(group: Any, key: str) -> None:
    field = recipe.SETTINGS[key]
    # not through Parser.add_argument: a setting is no option of the command's own
    group.add_argument(f"--{key}", metavar=kind_of(field.type), help=help_of(field))


def unwrapped(documented: object) -> str:
    """Its docstring with each paragraph on one line."""
    paragraphs = (documented.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def summary_of(documented: object) -> str:
    """The first paragraph of its docstring, on one line."""
    return unwrapped(documented).split("\n\n")[0]


def take_settings(words: list[str], own: set[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into the words that are no settings, and {setting: text}.

    A setting is `--key value`, `--key=value`, a bare `--flag`, or `key=value`; keys are ours and
    every old spelling. An option of the command itself (`own`) is not one. Raises SettingsError
    where a value is missing.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    while words:
        word = words.pop(0)
        spelling, equals, value = word.removeprefix("--").partition("=")
        if equals:
            spelling = spelling.lstrip("+")  # with which Hydra adds a key, and sets one
        is_flag = word.startswith("--")
        is_own = is_flag and word.partition("=")[0] in own
        if is_own or not is_setting(spelling) or not (is_flag or equals):
            rest.append(word)
        elif equals:
            overrides[spelling] = value
        else:
            overrides[spelling] = take_value(spelling, words)
    return rest, overrides


def take_value(spelling: str, words: list[str]) -> str:
    """The value of a setting: the next word, which is taken, or what the bare flag means.

    Another setting is no value. Raises SettingsError where a value is missing.
    """
    of_mixer = recipe.is_model_key(spelling) and spelling not in recipe.SHAPE_KEYS
    if of_mixer:
        bare = ""
    elif recipe.is_model_key(spelling):
        bare = "true" if recipe.is_flag_of_model(spelling) else ""
    else:
        bare = bare_value(spelling)
    if bare and not (words and words[0].lower() in VALUES_OF_BARE_FLAGS):
        return bare
    if words and not (words[0].startswith("--") and is_setting(words[0][2:].partition("=")[0])):
        value = words.pop(0)
        while spelling in SEVERAL_WORDS and words and LAYER.fullmatch(words[0]):
            value += f",{words.pop(0)}"
        return value
    if of_mixer:
        return "true"  # its type is known to the mixers only, which refuse it where it is a number
    raise SettingsError(f"--{spelling} needs a value: --{spelling} VALUE")


def is_setting(spelling: str) -> bool:
    """Whether this is a setting, under our name or another spelling, or a key of the model."""
    return spelling in recipe.SETTINGS or spelling in ALIASES or recipe.is_model_key(spelling)


def kind_of(kind: Any) -> str:
    """A type as --help writes it."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{kind_of(get_args(kind)[0])},..."
    if isinstance(kind, UnionType):
        return "|".join(kind_of(one) for one in get_args(kind))
    return {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}[kind]


def help_of(field: Field[object]) -> str:
    """The help of a setting, with its default and its interval."""
    interval = field.metadata["within"]
    notes = [f"default: {as_text(field.default) or 'none'}"]
    if interval:
        notes.append(f"in {interval}")
    return f"{field.metadata['help']} ({'; '.join(notes)})".replace("%", "%%")


def help_of_key(field: Field[object]) -> str:
    """The help of a key of a model's config."""
    if field.default is MISSING:
        default = "required"
    else:
        default = f"default: {as_text(field.default) or 'none'}"
    return f"{field.metadata['help']} ({default})".replace("%", "%%")


def read_run(
    parser: RecipeParser,
    words: Sequence[str],
    needs_model: bool = True,
    world: World | None = ALONE,
) -> tuple[Any, argparse.Namespace]:
    """The run that a recipe and the words after it describe, for the processes of `world`, and the
    command's own options.

    world: None plans it for as many processes as --gpus says.
    """
    options = parser.parse(words)
    if options.named and options.recipe:
        raise SettingsError(
            f"two recipes: {options.recipe} and --job.config_file {options.named}; give one"
        )
    planned = world is None
    if world is None:
        processes = processes_asked(parser)
        world = World(options.gpus if options.gpus > 1 else processes)
    elif not needs_model:  # the data alone: how many processes will train on them does not matter
        processes_asked(parser)
    log_in_first_process(world.is_first)
    try:
        take_experiment(parser, options)
        recipe_file = recipe_of(parser, options.recipe or options.named)
        from longfire.config.run import Run

        run = Run.compose(
            recipe_file, parser.overrides, needs_model=needs_model, planned=planned, world=world
        )
        return run, options
    except UserError as error:
        # the first process of each machine reads the same files, and says it
        error.reported_elsewhere = world.local_rank > 0
        raise


def processes_asked(parser: RecipeParser) -> int:
    """How many processes the words of a launcher ask for (gpus=8 nodes=2), which are taken out of
    the settings: a command that starts none has nothing to compare them with. Raises
    SettingsError."""
    processes = 1
    for spelling in list(parser.overrides):
        meaning = ALIASES.get(spelling)
        if not isinstance(meaning, Started):
            continue
        value = parser.overrides.pop(spelling)
        if meaning.word in ("processes of this machine", "machines"):
            if not value.isdigit() or value == "0":
                raise SettingsError(f"{spelling} = {value!r} must be a whole number from 1 on")
            processes *= int(value)
    return processes


def take_experiment(parser: RecipeParser, options: argparse.Namespace) -> None:
    """The recipe that flash-attention's `experiment=NAME` is, with its settings beside those of the
    command line, which win. Raises SettingsError."""
    name = parser.overrides.pop("experiment", "")
    if not name:
        return
    found = experiment(name)
    refuse_unknown_word(options.recipe)
    if options.recipe or options.named:
        raise SettingsError(
            f"experiment = {name!r} is the recipe {found.recipe}: leave the other one out"
        )
    options.recipe = found.recipe
    with nothing_logged():  # these words are read again with the recipe, and logged then
        given = recipe.in_own_names(recipe.read_words(parser.overrides))
    for key, value in found.overrides.items():
        if key not in given:
            parser.overrides[key] = value
    logger.info(f"experiment = {name!r} is the recipe {found.recipe} with its own settings")


def recipe_of(parser: RecipeParser, name: str | None) -> Path | None:
    """The file of a recipe's name; which one was taken is logged where the name alone does not say
    it.

    Raises SettingsError where neither a recipe nor a setting is given: what to type first.
    """
    refuse_unknown_word(name)
    if name:
        path = shipped.recipe(name)
        if shipped.is_shipped(path) and path.absolute() != Path(name).absolute():
            logger.info(f"recipe {name}: {path}, which comes with longfire")
        elif str(path) != str(Path(name)):
            logger.info(f"recipe {name}: {path}")
        return path
    if not parser.overrides:
        raise SettingsError(first_steps(parser.prog))
    return None


def refuse_unknown_word(name: str | None) -> None:
    """Raises SettingsError for `key=value` in the place of a recipe: the key is unknown."""
    if name and "=" in name and not Path(name).exists():
        spelling = name.partition("=")[0].lstrip("+~")
        raise SettingsError(recipe.unknown(spelling, recipe.COMMAND_LINE))


def first_steps(prog: str) -> str:
    """What to type where nothing was typed."""
    here = [path.name for path in hints_in(Path(), "*.toml") if path.name != "pyproject.toml"]
    lines = [f"{prog} needs a recipe, a TOML file that says what to train on what. To start:"]
    if here:
        lines.append(f"  {prog} {here[0]:<24} which is in this folder")
    lines += [
        "  longfire init --data input.txt         writes recipe.toml for a text of your own, "
        "every line explained",
        f"  {prog} recipe.toml",
        f"or name a recipe that comes with longfire, as `{prog} quickstart`: "
        f"{', '.join(shipped.recipes())}",
    ]
    return "\n".join(lines)


def add_which_model(parser: Parser) -> None:
    """The options of every command that reads a run folder."""
    parser.add_argument(
        "--step",
        type=int,
        default=-1,
        metavar="N",
        help="the checkpoint of this step (default: the newest)",
    )
    add_plugins(parser)


def add_plugins(parser: Parser) -> None:
    parser.add_argument(
        "--plugins",
        type=comma_separated(str),
        default=(),
        metavar="FILE,...",
        help="your own files that the run's mixers come from; they are run",
    )


def without_urls(option: str, kind: Callable[[str], object]) -> Callable[[str], object]:
    """The reader `kind` of an option's text, which refuses a URL; argparse names it in its errors
    as it names `kind`."""

    def read(text: str) -> object:
        return kind(refuse_url(text, option))

    read.__name__ = kind.__name__
    return read


def comma_separated(kind: type) -> Callable[[str], tuple]:
    """A reader of lists on the command line; argparse names it in its errors."""

    def read(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(","))

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers on the command line; argparse names it in its errors."""

    def read(text: str) -> int:
        if int(text) < least:
            raise ValueError(text)
        return int(text)

    read.__name__ = f"whole number from {least} on"
    return read
