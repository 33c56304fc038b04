"""`longfire init`."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from glob import has_magic
from pathlib import Path
from shlex import quote

from longfire.cli.arguments import Parser
from longfire.cli.starter import KINDS, OTHER_NAMES, SIZES, chosen, starter
from longfire.disk import write_whole
from longfire.errors import SettingsError
from longfire.listing import exists, has_match, hints_in

RECIPE = "recipe.toml"
OURS = "embedded"  # a name of data.dataset that is never a file


def init(words: Sequence[str]) -> int:
    """Write a starter recipe: one file, the model in it, every line explained; it trains as it
    is."""
    parser = Parser("init", init, "longfire init --data input.txt --model gla --size 10m")
    parser.add_argument(
        "recipe",
        nargs="?",
        default=RECIPE,
        help=f"the file to write, or a folder to write {RECIPE} into (default: {RECIPE})",
    )
    parser.add_argument(
        "--data",
        default="embedded",
        metavar="TEXT",
        help="files, folders, globs or datasets of the hub, comma-separated (default: embedded, "
        "Python's own library source)",
    )
    parser.add_argument(
        "--model",
        default="transformer",
        metavar="KIND",
        help=f"{', '.join(KINDS)} (default: transformer)",
    )
    parser.add_argument(
        "--size",
        default="10m",
        metavar="SIZE",
        help=f"{', '.join(SIZES)} parameters (default: 10m)",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")
    parser.add_argument(
        "--model-keys",
        action="store_true",
        help="instead: print every key of a model config, by mixer",
    )
    options = parser.parse_words(words)
    if options.model_keys:
        from longfire.cli.model_keys import page

        print(page(), end="")
        return 0
    kind = chosen(KINDS, options.model, "model", OTHER_NAMES)
    size = chosen(SIZES, options.size, "size")
    recipe = recipe_file(options.recipe)
    names = [options.data] if is_here(options.data) else options.data.split(",")
    text = starter(kind, size, tuple(data_of(name.strip(), recipe) for name in names))
    write(recipe, text, options.force)
    print(f"{recipe}: a {kind} of some {size} parameters on {options.data}")
    print(f"next: longfire train {quote(str(recipe))}")
    return 0


def recipe_file(name: str) -> Path:
    """The file that the recipe's name means: of a folder the recipe in it, else a file that ends in
    .toml.

    Raises SettingsError for the name of a text, which --force would otherwise replace.
    """
    from longfire.data.formats import format_of  # brings the readers of tables

    path = Path(os.path.expanduser(name))
    if path.is_dir() or name.endswith("/"):
        return path / RECIPE
    if path.suffix == ".toml":
        return path
    if path.exists() or format_of(path):
        raise SettingsError(
            f"{name}: a recipe is a .toml file, so this is no name for one; `longfire init "
            f"--data {quote(name)}` writes a recipe for that text"
        )
    return path.with_name(f"{path.name}.toml")


def is_here(name: str) -> bool:
    """Whether a file or folder has this name, or a glob matches one."""
    path = Path(os.path.expanduser(name))
    return bool(name) and (exists(path) or (has_magic(name) and has_match(Path(), str(path))))


def data_of(name: str, recipe: Path) -> str:
    """An entry of data.dataset: a local file, folder or glob relative to the recipe, anything else
    as it is.

    Raises SettingsError for a file that is not there, or that no reader is for.
    """
    from longfire.data.formats import FORMATS, format_of  # brings the readers of tables

    if not name:
        raise SettingsError(
            "--data has an empty name: write --data input.txt, or several with single commas "
            "between them"
        )
    if name == OURS:
        return name
    path = Path(os.path.expanduser(name))
    if is_here(name):
        if path.is_file() and not format_of(path):
            kinds = f"{', '.join(FORMATS)}, the text ones also as .gz and .zst"
            raise SettingsError(
                f"--data {name}: not a kind of file that is read ({kinds}); name a plain text .txt"
            )
        return in_utf8(os.path.relpath(path.absolute(), recipe.parent.absolute()))
    is_path = (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or has_magic(name)
        or bool(format_of(path))
    )
    if is_path:
        here = [beside.name for beside in hints_in(path.parent)]
        near = get_close_matches(path.name, here, 1)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise SettingsError(f"--data {name}: no such file{hint}")
    return name


def in_utf8(path: str) -> str:
    """The path, with / between folders. Raises SettingsError for one that a TOML file, which is
    UTF-8, cannot hold."""
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise SettingsError(
            f"--data {path!r}: the name is not UTF-8, which a recipe is; rename the file"
        ) from e
    return Path(path).as_posix()


def write(recipe: Path, text: str, force: bool) -> None:
    """Raises SettingsError where the file is there already, or cannot be written."""
    if recipe.exists() and not force:
        raise SettingsError(
            f"{recipe} is already there: `longfire train {quote(str(recipe))}` trains it; to "
            "replace it add --force, or name another file"
        )
    try:
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_whole(recipe, text)
    except OSError as e:
        raise SettingsError(f"{recipe} cannot be written: {e.strerror}; name another file") from e
