"""`longfire init`."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from longfire.arguments import Parser
from longfire.disk import write_whole
from longfire.errors import SettingsError
from longfire.starter import KINDS, OTHER_NAMES, SIZES, chosen, starter

TEXT_FILES = (".txt", ".md", ".json", ".jsonl", ".parquet", ".arrow", ".gz", ".zst")


def init(words: Sequence[str]) -> int:
    """Write a starter recipe: one file, the model in it, every line explained; it trains as it is."""
    parser = Parser("init", init, "longfire init --data input.txt --model gla --size 10m")
    parser.add_argument(
        "recipe", nargs="?", type=Path, default=Path("recipe.toml"), help="the file to write (default: recipe.toml)"
    )
    parser.add_argument(
        "--data",
        default="embedded",
        metavar="TEXT",
        help="files, folders, globs or datasets of the hub, comma-separated (default: embedded, Python's own library source)",
    )
    parser.add_argument(
        "--model", default="transformer", metavar="KIND", help=f"{', '.join(KINDS)} (default: transformer)"
    )
    parser.add_argument("--size", default="10m", metavar="SIZE", help=f"{', '.join(SIZES)} parameters (default: 10m)")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")
    parser.add_argument(
        "--model-keys", action="store_true", help="instead: print every key of a model config, by mixer"
    )
    options = parser.parse_args(words)
    if options.model_keys:
        from longfire.model_keys import page  # brings the mixers, which need torch

        print(page(), end="")
        return 0
    kind, size = chosen(KINDS, options.model, "model", OTHER_NAMES), chosen(SIZES, options.size, "size")
    recipe = options.recipe if options.recipe.suffix else options.recipe.with_suffix(".toml")
    names = [options.data] if Path(options.data).expanduser().exists() else options.data.split(",")
    text = starter(kind, size, tuple(data_of(name.strip(), recipe) for name in names))
    write(recipe, text, options.force)
    print(f"{recipe}: a {kind} of some {size} parameters on {options.data}")
    print(f"next: longfire train {recipe}")
    return 0


def data_of(name: str, recipe: Path) -> str:
    """An entry of data.dataset: a local file or folder relative to the recipe, anything else as it is.

    Raises SettingsError for a file that is not there.
    """
    path = Path(name).expanduser()
    if path.exists():
        inside = Path(os.path.relpath(path.absolute(), recipe.parent.absolute()))
        return inside.as_posix()
    if path.suffix in TEXT_FILES and not any(sign in name for sign in "*?["):
        here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, here, 1)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise SettingsError(f"--data {name}: no such file{hint}")
    return name


def write(recipe: Path, text: str, force: bool) -> None:
    """Raises SettingsError where the file is there already, or cannot be written."""
    if recipe.exists() and not force:
        raise SettingsError(
            f"{recipe} is already there: `longfire train {recipe}` trains it; to replace it add --force, or name another file"
        )
    try:
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_whole(recipe, text)
    except OSError as e:
        raise SettingsError(f"{recipe} cannot be written: {e.strerror}; name another file") from e
