"""A wheel of longfire works outside a clone: its commands run from an empty folder, with the recipes and models inside it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = """--training.steps 2 --training.batch_size 2 --training.seq_len 64 --lr_scheduler.warmup_steps 1 --training.max_seconds 0
    --eval.tokens 256 --eval.interval 0 --eval.compare_xz false --eval.sample_prompt= --checkpoint.export false
    --metrics.report false --data.num_workers 1 --tokenizer.path bytes --data.dataset input.txt"""


def run(command: list[str | Path], folder: Path) -> str:
    """A command in a folder, which must end well; what it prints. Nothing of the clone is on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, since a build leaves files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("longfire", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", folder, source], folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel, and of this environment all but longfire: a path in a .pth file
    does not run the .pth file of an editable install there."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run([*pip, "--no-index", "--no-deps", wheel], folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([python, "-c", code], folder).strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "libraries.pth").write_text("\n".join(sorted(here)) + "\n")
    return python.parent


def test_a_wheel_has_every_file_of_the_package_and_every_recipe(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in (ROOT / "longfire").rglob("*.py")]
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in package} <= inside
    assert {f"longfire/{path.relative_to(ROOT).as_posix()}" for path in recipes} <= inside
    assert "longfire/py.typed" in inside


def test_the_commands_of_an_installed_longfire_from_an_empty_folder(installed, tmp_path):
    where = "import longfire; print(longfire.__file__, longfire.__version__)"
    assert str(installed.parent) in run([installed / "python", "-c", where], tmp_path)
    longfire = installed / "longfire"
    (tmp_path / "input.txt").write_text("to be or not to be, that is the question\n" * 500)
    run([longfire, "init", "--data", "input.txt", "--size", "1m"], tmp_path)
    assert (tmp_path / "recipe.toml").is_file()
    plan = ["plan", "quickstart", "--gpus", "8", "--device", "h100-80gb"]
    assert "GiB" in run([longfire, *plan], tmp_path)
    message = run([longfire, "train", "quickstart", *SMALL.split()], tmp_path)
    assert str(installed.parent) in message, "the recipe and its model lie in the environment"
    assert (tmp_path / "runs/quickstart/checkpoints/step-2").is_dir()
    model = "import longfire; print(type(longfire.build('llama-debug')).__name__)"
    assert run([installed / "python", "-c", model], tmp_path) == "Model\n"
