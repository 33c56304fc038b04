"""What is installed: every package of the source, and the recipes with their models."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import longfire

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed():
    """A package that is missing here would be missing in an installed longfire, and in no clone."""
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "longfire").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert packages | {"longfire.recipes", "longfire.recipes.models"} == set(SETUPTOOLS["packages"])


def test_the_version_is_that_of_the_installation():
    assert longfire.__version__ == version("longfire")
    with pytest.raises(AttributeError, match="no attribute 'versions'"):
        longfire.versions  # noqa: B018


def test_a_type_checker_finds_the_types_and_a_reader_the_license():
    assert (
        "py.typed" in SETUPTOOLS["package-data"]["longfire"]
        and (ROOT / "longfire/py.typed").is_file()
    )
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_recipe_and_model_is_installed():
    assert SETUPTOOLS["package-dir"] == {"longfire.recipes": "recipes"}
    data = SETUPTOOLS["package-data"]
    for package, folder in {
        "longfire.recipes": "recipes",
        "longfire.recipes.models": "recipes/models",
    }.items():
        here = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        installed = {
            path.name for pattern in data[package] for path in (ROOT / folder).glob(pattern)
        }
        assert installed == here
