"""CITATION.cff, docs/citation.md, environment.yml, Dockerfile: well formed, and true of this version. Nothing is built."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from longfire.mixers import MIXERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "RUN", "ENV", "COPY", "USER", "ENTRYPOINT", "CMD"}


def entries_of(page: str) -> dict[str, str]:
    """Key -> body of each BibTeX entry; its braces are balanced."""
    found: dict[str, str] = {}
    for start in re.finditer(r"^@(\w+)\{(\w+),", page, re.M):
        depth = 0
        for place in range(start.start(), len(page)):
            depth += {"{": 1, "}": -1}.get(page[place], 0)
            if page[place] == "}" and depth == 0:
                break
        assert depth == 0, f"{start[2]}: braces are not balanced"
        assert start[2] not in found, f"{start[2]} is there twice"
        found[start[2]] = page[start.end() : place]
    return found


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["title"] == PROJECT["name"] and citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    own = entries_of((ROOT / "docs/citation.md").read_text())["longfire"]
    assert f"version = {{{PROJECT['version']}}}" in own


def test_every_mixer_has_a_paper_and_every_entry_is_whole():
    page = (ROOT / "docs/citation.md").read_text()
    entries = entries_of(page)
    for body in entries.values():
        for field in ("title", "author", "year"):
            assert re.search(rf"^  {field} = \{{.+\}},?$", body, re.M), body
    cited = set()
    rows = re.findall(r"^\| (.+) \| (.+) \|$", page, re.M)[1:]
    for _, keys in rows:
        cited |= set(re.findall(r"`(\w+)`", keys))
    assert cited == set(entries) - {"longfire"}
    named = " ".join(name for name, _ in rows)
    assert [name for name in MIXERS if f"`{name}`" not in named] == []


def test_the_conda_environment_installs_this_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = [name for name in environment["dependencies"] if str(name).startswith("python=")]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= tuple(
        map(int, oldest.split("."))
    )
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert "dev" in PROJECT["optional-dependencies"]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what follows them, with lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_the_dockerfile_is_well_formed(dockerfile):
    assert {name for name, _ in dockerfile} <= INSTRUCTIONS
    assert dockerfile[0][0] == "FROM"
    for name, rest in dockerfile:
        if name in ("RUN", "COPY", "ENV"):
            shlex.split(rest)  # quotes are closed


def test_base_images_have_a_tag_and_stages_a_name(dockerfile):
    stages = []
    for name, rest in dockerfile:
        if name == "FROM":
            image, as_, stage = rest.split()
            assert as_ == "AS" and re.fullmatch(r"[\w./-]+:[\w.-]+", image)
            assert not image.endswith(":latest")
            stages.append(stage)
    assert stages == ["build", "run"]
    copied_from = re.findall(r"--from=(\w+)", " ".join(rest for _, rest in dockerfile))
    assert set(copied_from) <= set(stages)


def test_the_container_is_not_root_and_starts_longfire(dockerfile):
    users = [rest for name, rest in dockerfile if name == "USER"]
    assert users == ["longfire"]
    names = [name for name, _ in dockerfile]
    assert "RUN" not in names[names.index("USER") :]
    assert ("ENTRYPOINT", '["longfire"]') in dockerfile and "longfire" in PROJECT["scripts"]


def test_both_devices_install_extras_that_exist(dockerfile):
    text = " ".join(rest for _, rest in dockerfile)
    chosen = dict(re.findall(r"(\w+)\) extras=([\w,]+)", text))
    assert set(chosen) == {"cpu", "cuda"} and ("ARG", "DEVICE=cpu") in dockerfile
    for extras in chosen.values():
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_what_is_copied_is_there_and_not_ignored(dockerfile):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    left_out = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    copied = set()
    for name, rest in dockerfile:
        if name == "COPY" and "--from" not in rest:
            copied |= set(rest.split()[:-1])
    assert lines[1] == "*" and copied == kept
    assert all((ROOT / name).exists() for name in copied)
    for secret in (".env", ".env.local", "a.pem", "a.key"):
        assert any(fnmatch(secret, pattern) for pattern in left_out), secret
