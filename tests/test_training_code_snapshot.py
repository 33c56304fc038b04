"""code_snapshot.py: what git does not have of a run's code is kept, and no secret with it."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from logged import logged_to

from longfire.config.run import Run
from longfire.training import code_snapshot
from longfire.training.code_snapshot import MAX_BYTES, contents_of, save_code

MODEL = {
    "model.hidden_size": "16",
    "model.num_hidden_layers": "1",
    "model.layer_types": "attention",
    "model.attention.num_heads": "2",
    "job.dump_folder": "run",
}


def git(*words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The working folder is a checkout with a package in which things have changed."""
    monkeypatch.chdir(tmp_path)
    package = Path("package")
    package.mkdir()
    for name in ("__init__.py", "a.py"):
        (package / name).write_text("before = 1\n")
    Path(".env.shared").write_text("TOKEN=old\n")
    Path(".gitignore").write_text("ignored*\nrun/\n")
    git("init", "-q")
    git("add", "-f", ".")
    git("commit", "-qm", "first")
    (package / "a.py").write_text("after = 2\n")
    (package / "new.py").write_text("new = 3\n")
    (package / "ignored.py").write_text("ignored = 4\n")
    (package / "secrets.py").write_text("password = 5\n")
    (package / "link.py").symlink_to("/etc/hostname")
    Path(".env.shared").write_text("TOKEN=hidden\n")
    Path("plugin.py").write_text("MIXERS = {}\n")
    Path("recipe.toml").write_text("# a recipe\n")
    monkeypatch.setattr(code_snapshot, "PACKAGE", package.absolute())
    return tmp_path


def run_with(*plugins: str) -> Run:
    run = Run.compose(None, MODEL)
    model = replace(run.model, plugins=tuple(str(Path(name).absolute()) for name in plugins))
    return replace(run, model=model, recipe=Path("recipe.toml").absolute())


def test_differences_plugins_recipe_and_untracked_sources_are_kept(checkout):
    messages = []
    with logged_to(messages):
        save_code(run_with("plugin.py"), 0)
    kept = contents_of(Path("run/code/step-0"))
    assert set(kept) == {
        "revision.txt",
        "changes.diff",
        "plugins/plugin.py",
        "recipe.toml",
        "untracked/package/new.py",
    }
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=True).stdout
    assert kept["revision.txt"].startswith(head) and b"package/a.py" in kept["revision.txt"]
    assert b"-before = 1\n+after = 2" in kept["changes.diff"]
    assert b"hidden" not in b"".join(kept.values())
    assert messages[-1].startswith("code: 5 files -> run/code/step-0 (left out: ")
    assert "link.py" in messages[-1] and "secrets.py" in messages[-1]


def test_the_difference_makes_the_code_again(checkout, tmp_path):
    save_code(run_with(), 0)
    diff = Path("run/code/step-0/changes.diff").absolute()
    git("clone", "-q", ".", "again")
    subprocess.run(["git", "apply", str(diff)], cwd="again", check=True)
    assert Path("again/package/a.py").read_text() == "after = 2\n"


def test_a_start_with_other_code_is_kept_beside_the_first(checkout):
    save_code(run_with(), 0)
    messages = []
    with logged_to(messages):
        save_code(run_with(), 5)
    assert messages == ["code: as in run/code/step-0"]
    Path("package/a.py").write_text("after = 6\n")
    save_code(run_with(), 7)
    Path("plugin.py").unlink()
    Path("package/a.py").write_text("after = 8\n")
    save_code(run_with(), 7)
    assert b"after = 8" in contents_of(Path("run/code/step-7"))["changes.diff"]
    assert [place.name for place in sorted(Path("run/code").iterdir())] == ["step-0", "step-7"]


@pytest.mark.parametrize("name", ["ignored_plugin.py", "link.py"])
def test_a_plugin_that_is_ignored_or_a_link_is_left_out(name, checkout):
    Path("ignored_plugin.py").write_text("MIXERS = {}\n")
    Path("link.py").symlink_to("plugin.py")
    save_code(run_with(name), 0)
    assert not any(kept.startswith("plugins/") for kept in contents_of(Path("run/code/step-0")))


def test_plugins_of_one_name_are_both_kept(checkout):
    Path("other").mkdir()
    Path("other/plugin.py").write_text("OPTIMIZERS = {}\n")
    save_code(run_with("plugin.py", "other/plugin.py"), 0)
    kept = contents_of(Path("run/code/step-0"))
    assert kept["plugins/plugin.py"] == b"MIXERS = {}\n"
    assert kept["plugins/1/plugin.py"] == b"OPTIMIZERS = {}\n"


def test_what_is_too_large_is_left_out(checkout):
    Path("package/a.py").write_text("#" * (MAX_BYTES + 1))
    Path("plugin.py").write_text("#" * (MAX_BYTES + 1))
    save_code(run_with("plugin.py"), 0)
    kept = contents_of(Path("run/code/step-0"))
    assert "changes.diff" not in kept and "plugins/plugin.py" not in kept
    assert b"changes.diff is left out: it has " in kept["revision.txt"]


def test_it_can_be_turned_off(checkout):
    run = run_with("plugin.py")
    save_code(replace(run, job=replace(run.job, save_code=False)), 0)
    assert not Path("run/code").exists()


def test_without_git_plugins_and_recipe_are_kept(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    save_code(run_with("plugin.py"), 0)
    assert set(contents_of(Path("run/code/step-0"))) == {"plugins/plugin.py", "recipe.toml"}


def test_a_folder_that_cannot_be_written_is_a_warning(checkout):
    Path("run").write_text("a file")
    messages = []
    with logged_to(messages):
        save_code(run_with(), 0)
    assert "code: not kept: run/code cannot be written" in messages[-1]
