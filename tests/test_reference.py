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


def test_the_picture_has_every_file_once_and_no_circle(scripts):
    packages, _ = scripts
    files = packages.file_graph()
    nodes = packages.nodes_of(files)
    drawn = sorted(module for node in nodes for module in node.files)
    assert drawn == sorted(files)
    assert not packages.circles(nodes, files)
    shown = {module.partition(".")[0] for module in files if packages.package_of(module)}
    labels = " ".join(map(packages.label, nodes))
    assert all(f"{package}/" in labels for package in shown)


def test_an_arrow_that_follows_from_others_is_left_out(scripts):
    packages, _ = scripts
    a, b, c = (packages.Node("", frozenset([name]), True) for name in "abc")
    assert packages.reduced({a: {b, c}, b: {c}, c: set()}) == {a: {b}, b: {c}, c: set()}


def test_packages_that_import_each_other_are_split_where_their_files_do_not(
    scripts, tmp_path, monkeypatch
):
    """low/ is below mid.py, its other file above it."""
    packages, _ = scripts
    (tmp_path / "low").mkdir()
    for name, text in {
        "low/__init__.py": "",
        "low/ground.py": "import math\n",
        "low/roof.py": "from longfire.mid import f\nfrom longfire.low import ground\n",
        "mid.py": "from typing import TYPE_CHECKING\nfrom longfire.low.ground import g\n"
        "if TYPE_CHECKING:\n    from longfire.low.roof import h\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(packages, "PACKAGE", tmp_path)
    arrows = packages.picture()
    assert '[["low/, in part:<br>ground"]]' in arrows
    assert '[["low/, in part:<br>roof"]]' in arrows
    assert len(re.findall("-->", arrows)) == 2


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
