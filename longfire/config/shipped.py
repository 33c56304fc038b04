"""Recipes and model configs that come with longfire, found by name from any folder; free of torch.

    recipe("quickstart")            ./quickstart.toml if it is there, else the shipped one
    recipe("recipes/quickstart.toml")
    model_config("gla-340m")        the shipped models/gla-340m.json

In an installed package they are `longfire/recipes`; in a clone the folder `recipes` beside the
package.
"""

from difflib import get_close_matches
from pathlib import Path

from longfire.errors import SettingsError
from longfire.listing import hints_in, paths_in

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
OF_RECIPES = ("recipes/", "longfire/recipes/")
OF_MODELS = ("recipes/models/", "models/")

A_TEXT = "is a text, not a recipe: `longfire init --data {}` writes a recipe for it"
NO_RECIPES = {  # what is easily taken for a recipe
    ".json": "is JSON, not a recipe: if it is a model's config, name it with --model.config {}",
    ".txt": A_TEXT,
    ".md": A_TEXT,
    ".jsonl": A_TEXT,
    ".parquet": A_TEXT,
}


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in paths_in(FOLDER, "*.toml")}


def models() -> dict[str, Path]:
    """The shipped model configs by name."""
    return {path.stem: path for path in paths_in(FOLDER / "models", "*.json")}


def recipe(name: str) -> Path:
    """The file that a recipe's name means: one in the working folder, else a shipped one.

    Raises SettingsError with the nearest name.
    """
    given = Path(name).expanduser()
    if given.is_dir() and (given / "run.toml").exists():
        raise SettingsError(
            f"{given} is a run folder, not a recipe: `longfire train {given / 'run.toml'}` "
            "resumes its run"
        )
    if given.suffix in NO_RECIPES and given.is_file():
        raise SettingsError(f"{given} {NO_RECIPES[given.suffix].format(given)}")
    for path in (given, given.with_name(f"{given.name}.toml")):
        if path.is_file():
            return path
    known = recipes()
    short = short_name(name, OF_RECIPES, ".toml")
    if short in known:
        return known[short]
    if model_config(name):
        raise SettingsError(
            f"{name} is a model config, not a recipe: `longfire init` writes a recipe, which "
            f"`--model.config {name}` gives this model"
        )
    beside = {path.stem: path for path in hints_in(given.parent, "*.toml")}
    near = get_close_matches(given.stem, [*beside, *known], 1)
    if near:
        meant = beside.get(near[0], near[0])
        raise SettingsError(f"{name}: no such recipe; did you mean `{meant}`?")
    raise SettingsError(
        f"{name}: no such recipe; `longfire init` writes one to start from, and these come with "
        f"longfire: {', '.join(known)}"
    )


def model_config(name: str) -> Path | None:
    """The shipped model config of this name, None if there is none."""
    return models().get(short_name(name, OF_MODELS, ".json"))


def nearest_model(name: str) -> str:
    """The shipped model config whose name is nearest, as a question; empty if none is near."""
    near = get_close_matches(short_name(name, OF_MODELS, ".json"), models(), 1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return ""


def is_shipped(path: Path) -> bool:
    return FOLDER in path.absolute().parents


def short_name(name: str, prefixes: tuple[str, ...], suffix: str) -> str:
    """recipes/quickstart.toml -> quickstart"""
    name = name.removeprefix("./")
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name.removesuffix(suffix)
