"""Pages that are made from the code are as the code is now; the picture of the packages is one of these imports, without circles."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = str(ROOT / "scripts")


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules. They are no part of the package, so their folder is on the path here only."""
    sys.path.insert(0, SCRIPTS)
    try:
        import packages
        import reference
    finally:
        sys.path.remove(SCRIPTS)
    return packages, reference


def same_words(text: str) -> list[str]:
    """Other versions of Python break the lines of --help elsewhere."""
    return text.split()


def test_every_made_page_is_as_the_code_says(scripts):
    _, reference = scripts
    for path, text in reference.pages().items():
        old = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        assert same_words(old) == same_words(text), f"{name} is out of date: run `make reference`"


def test_the_picture_has_every_package(scripts):
    packages, _ = scripts
    shown = packages.picture()
    for path in (ROOT / "longfire").glob("*/__init__.py"):
        assert f'"{path.parent.name}/"' in shown


def test_an_arrow_that_follows_from_others_is_left_out(scripts):
    packages, _ = scripts
    assert packages.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {
        "a": {"b"},
        "b": {"c"},
        "c": set(),
    }


def test_the_list_of_files_has_every_file_with_a_purpose(scripts):
    packages, _ = scripts
    listed = packages.listing()
    for path in (ROOT / "longfire").rglob("*.py"):
        in_a_package_of_a_package = len(path.relative_to(ROOT / "longfire").parts) > 2
        if path.stem in ("__init__", "__main__") or in_a_package_of_a_package:
            continue
        assert re.search(rf"^ +{re.escape(path.name)} +\S", listed, re.M), path


def test_the_settings_page_has_every_setting_with_its_default(scripts):
    from longfire.config.recipe import SETTINGS

    page = (ROOT / "docs/reference/settings.md").read_text()
    rows = re.findall(r"^\| `(\w+\.\w+)` \|", page, re.M)
    assert rows == list(SETTINGS)


def test_the_migration_page_has_every_spelling_of_the_four_systems(scripts):
    from longfire.config.aliases import ALIASES

    page = (ROOT / "docs/migration.md").read_text()
    assert all(f"| `{spelling}` |" in page for spelling in ALIASES)
    assert "S0-" not in page and "S3-" not in page, (
        "numbers of requirements say nothing to a reader"
    )
