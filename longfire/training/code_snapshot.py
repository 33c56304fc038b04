"""The code that a run was started with, in its run folder: what git does not have of it.

    code/step-0/
        revision.txt     the commit of longfire's checkout, and which files differ from it
        changes.diff     how the tracked files differ from that commit
        untracked/       Python files of the package that git does not track
        plugins/         the files of model.plugins
        recipe.toml      the recipe

A start with other code is kept beside the earlier ones. Kept is little, and no secret: files that
git ignores, files of environment variables and keys, and what a link leads to are left out. git
runs no program that its configuration names.
"""

import logging
import os
import stat
import subprocess
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from longfire.aside import folder_aside
from longfire.config.run import Run
from longfire.disk import put_in_place
from longfire.listing import files_below, is_file, paths_in
from longfire.plural import counted
from longfire.regular_files import read_regular

logger = logging.getLogger(__name__)

CODE = "code"
PACKAGE = Path(__file__).parents[1]
MAX_BYTES = 1_000_000  # of the differences, and of all copied files together
GIT_SECONDS = 10
SECRETS = (".env", ".env.*", "*.env", "*.pem", "*.key", "*credentials*", "*secret*", ".netrc")
# Neither programs of diff drivers nor hooks
QUIET_GIT = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules")

Contents = dict[str, bytes]  # path inside the snapshot -> bytes


def save_code(run: Run, step: int) -> None:
    """Keep the code that this start of the run uses, unless job.save_code is off or the newest
    snapshot is the same. Says what was kept; a folder that cannot be written is a warning."""
    if not run.job.save_code:
        return
    contents, left_out = code_of(run)
    if not contents:
        return
    folder = run.folder / CODE
    try:
        newest = newest_snapshot(folder)
        if newest is not None and contents_of(newest) == contents:
            logger.info(f"code: as in {newest}")
            return
        place = folder / f"step-{step}"
        write_contents(place, contents)
    except OSError as error:
        logger.warning(f"code: not kept: {folder} cannot be written ({error.strerror})")
        return
    logger.info(f"code: {counted(len(contents), 'file')} -> {place}{left_out}")


def code_of(run: Run) -> tuple[Contents, str]:
    """What is kept of a run's code, and a sentence about what is too large."""
    contents = differences(PACKAGE)
    copies: dict[str, Path] = {}
    for number, plugin in enumerate(run.model.plugins):
        name = f"plugins/{Path(plugin).name}"
        if name in copies:  # of another folder
            name = f"plugins/{number}/{Path(plugin).name}"
        copies[name] = Path(plugin)
    is_own = run.recipe is not None and run.folder.absolute() in run.recipe.absolute().parents
    if run.recipe is not None and not is_own:
        copies["recipe.toml"] = run.recipe
    for file in untracked_sources(PACKAGE):
        copies[f"untracked/{file.relative_to(PACKAGE.parent).as_posix()}"] = file
    left_out: list[str] = []
    size = 0
    for name, file in copies.items():
        content = own_content(file)
        if content is None or size + len(content) > MAX_BYTES:
            left_out.append(str(file))
            continue
        size += len(content)
        contents[name] = content
    if not left_out:
        return contents, ""
    return contents, f" (left out: {', '.join(left_out)}: a link, ignored, secret or too large)"


def differences(package: Path) -> Contents:
    """The commit of the checkout that the package is in, and how its tracked files differ from it;
    empty where git does not track the package."""
    if git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    revision = git(package, "rev-parse", "HEAD")
    status = git(package, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules")
    if revision is None or status is None:
        return {}
    contents = {"revision.txt": revision + status}
    paths = [":/", *(f":(exclude,icase,top,glob)**/{pattern}" for pattern in SECRETS)]
    changes = git(package, *DIFF, "--", *paths)
    if changes and len(changes) <= MAX_BYTES:
        contents["changes.diff"] = changes
    elif changes:
        note = f"changes.diff is left out: it has {len(changes):,} bytes\n"
        contents["revision.txt"] += note.encode()
    return contents


def untracked_sources(package: Path) -> list[Path]:
    """The Python files of the package that git neither tracks nor ignores."""
    listed = git(package, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py")
    if not listed or git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return []
    names = listed.decode(errors="surrogateescape").split("\0")
    return [package / name for name in names if name]


def own_content(file: Path) -> bytes | None:
    """The bytes of a file; None for a link, for anything but a file, and for one that is secret,
    ignored by git or too large."""
    if is_secret(file.name) or is_ignored(file):
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # O_NOFOLLOW: of a link too
        return None
    with open(descriptor, "rb") as opened:
        facts = os.fstat(opened.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BYTES:
            return None
        return opened.read(MAX_BYTES + 1)


def is_secret(name: str) -> bool:
    """Whether the name of a file is one that secrets have."""
    return any(fnmatch(name.lower(), pattern) for pattern in SECRETS)


def is_ignored(file: Path) -> bool:
    """Whether the repository that a file is in ignores it."""
    return git(file.parent, "check-ignore", "--quiet", "--", file.name) is not None


def git(folder: Path, *words: str) -> bytes | None:
    """What git prints in a folder; None where it fails, or is not there."""
    command = ["git", "-C", str(folder), *QUIET_GIT, *words]
    try:
        result = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def newest_snapshot(folder: Path) -> Path | None:
    """The snapshot of the latest step; None where there is none."""
    found: dict[int, Path] = {}
    for place in paths_in(folder, "step-*"):
        number = place.name.removeprefix("step-")
        if number.isascii() and number.isdigit():
            found[int(number)] = place
    return found[max(found)] if found else None


def contents_of(snapshot: Path) -> Contents:
    """The files of a snapshot."""
    files = [path for path in files_below(snapshot) if is_file(path)]
    return {file.relative_to(snapshot).as_posix(): read_regular(file) for file in files}


def write_contents(place: Path, contents: Mapping[str, bytes]) -> None:
    """Write a snapshot, complete or not at all; one that is there makes way. Raises OSError."""
    with folder_aside(place) as aside:
        for name, content in contents.items():
            file = aside / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        put_in_place(aside, place)
