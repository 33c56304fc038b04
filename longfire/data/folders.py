"""Which files of a folder or a glob are read, and which are left out and why.

Where that is not clear it is an error and not a guess: a link whose file is missing, a git-LFS
pointer, a missing part of a numbered series, names of which only some name a split.
"""

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from longfire import listing
from longfire.data import cards, formats
from longfire.data.chosen_files import ChosenFiles, relative
from longfire.data.file_checks import (
    check_files,
    check_formats,
    check_hub_cache,
    check_inside,
    check_links,
    check_pointers,
    leads_out,
    readable_formats,
)
from longfire.data.splits import keep_split
from longfire.errors import DataError
from longfire.listing import is_file, is_folder, matches

# Files of the library `datasets`.
ABOUT_DATA = re.compile(
    r"(^|/)((dataset_infos?|dataset_dict|state)\.json$|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow$)"
)
# Text files that are no documents where there are data files.
BESIDE_DATA = re.compile(r"(^|/)(README|LICENSE)[^/]*$|\.py$")
HIDDEN = re.compile(r"(^|/)\.")


def in_file(file: Path) -> ChosenFiles:
    """A file that was named itself. Raises DataError."""
    check_formats([file])
    check_pointers([file])
    return ChosenFiles(file.parent, (file,))


def in_folder(entry: str, root: Path, own: Mapping[str, str]) -> ChosenFiles:
    """The files of a folder that the settings choose, or its card, or the names of splits in it.

    own: data_dir, data_files, dataset_split and dataset_name of this source. Raises DataError.
    """
    for key in ("data_dir", "data_files"):
        if leads_out(own[key]):
            raise DataError(f"data.{key} = {own[key]!r} leads out of {root}; give a path inside it")
    check_hub_cache(root)
    card = cards.read_card(root)
    if own["dataset_name"] and not card:
        raise DataError(
            f"data.dataset_name = {own['dataset_name']!r} is for datasets of the hub and clones of "
            f"them, and {entry} has no README.md that names configurations; choose files with "
            "data_dir or data_files"
        )
    if card and not own["data_dir"] and not own["data_files"]:
        return by_card(entry, root, own, card)
    top = root
    if own["data_dir"]:
        top = check_inside(root / own["data_dir"], root)
        if not is_folder(top):
            raise DataError(f"data.data_dir = {own['data_dir']!r}: no such folder in {root}")
    if own["data_files"]:
        failure = f"data.data_files = {own['data_files']!r}: no such file in {top}"
        chosen = ChosenFiles(root, matching(top, [own["data_files"]], failure))
        check_formats(chosen.files)
    else:
        chosen = data_files(root, top)
    keep_split(entry, chosen, own)
    return check_files(chosen, is_folder=not own["data_files"])


def in_glob(entry: str, own: Mapping[str, str]) -> ChosenFiles:
    """The files that a pattern matches. Raises DataError."""
    if own["dataset_name"]:
        raise DataError(
            f"data.dataset_name = {own['dataset_name']!r} is for datasets of the hub and clones of "
            f"them, and {entry} is a pattern; name the folder"
        )
    parts = Path(entry).expanduser().parts
    first_pattern = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:first_pattern])
    pattern = str(Path(*parts[first_pattern:]))
    files = matching(root, [pattern], f"data.dataset: no file matches {entry!r}")
    chosen = ChosenFiles(root, files)
    check_formats(chosen.files)
    keep_split(entry, chosen, {**own, "data_files": "*"})
    return check_files(chosen, is_folder=False)


def by_card(entry: str, root: Path, own: Mapping[str, str], card: cards.Card) -> ChosenFiles:
    """The files of the configuration that the card of a cloned dataset names, of one split. Raises
    DataError."""
    split = own["dataset_split"] or "train"
    name, patterns, folder = card.choose(own["dataset_name"], split, entry)
    top = check_inside(root / folder, root) if folder else root
    if patterns is None:  # the configuration is a folder, or everything
        chosen = data_files(root, top)
        keep_split(entry, chosen, own)
        return check_files(chosen, is_folder=True)
    for pattern in patterns:
        if leads_out(pattern):
            raise DataError(f"{card.file}: its pattern {pattern!r} leads out of {root}")
    failure = f"{card.file}: configuration {name!r}: no file matches {patterns}"
    files = matching(top, patterns, failure)
    chosen = ChosenFiles(root, files)
    chosen.keep_where(formats.format_of, "of a kind that we do not read")
    leave_out_descriptions(chosen, root)
    others = data_files_beside(root, files)
    chosen.leave_out(f"not of configuration {name!r}, split {split!r}", others)
    if not chosen.files:
        raise DataError(
            f"{card.file}: configuration {name!r} has no file that we read ({readable_formats()})"
        )
    return check_files(chosen, is_folder=True)


def data_files_beside(root: Path, files: Sequence[Path]) -> list[Path]:
    """The data files of a folder that are not among these."""
    named = set(files)
    others = []
    for file in all_files(root):
        name = relative(file, root)
        is_apart = HIDDEN.search(name) or ABOUT_DATA.search(name) or BESIDE_DATA.search(name)
        if formats.format_of(file) and file not in named and not is_apart:
            others.append(file)
    return others


def matching(top: Path, patterns: Iterable[str], failure: str) -> tuple[Path, ...]:
    """The files below a folder that patterns match, each once, in the order of their relative
    paths. Raises DataError with the message `failure` where there is none."""
    named: set[Path] = set()
    for pattern in patterns:
        named.update(matches(top, pattern))
    found = sorted(named, key=lambda file: relative(file, top))
    check_links(found)
    files = tuple(file for file in found if is_file(file))
    if not files:
        raise DataError(failure)
    return files


def all_files(root: Path, without: frozenset[str] = frozenset()) -> list[Path]:
    """All files below a folder in the order of their relative paths. A linked folder is one of
    them, and is not entered. without: names of folders that are skipped."""
    found = []
    for folder, folders, files in listing.walk(root):
        folders[:] = set(folders) - without
        found += [Path(folder, name) for name in files]
        for name in folders:
            if Path(folder, name).is_symlink():
                found.append(Path(folder, name))
    return sorted(found, key=lambda file: relative(file, root))


def data_files(root: Path, top: Path) -> ChosenFiles:
    """All files below a folder that can be read, without those that describe or accompany the
    data. Raises DataError."""
    visible = []
    hidden = []
    for file in all_files(top):
        if not HIDDEN.search(relative(file, top)):
            visible.append(file)
        elif formats.format_of(file):
            hidden.append(file)
    check_links(visible)
    chosen = ChosenFiles(root, tuple(visible))
    chosen.leave_out("hidden", hidden)
    for file in visible:
        if is_folder(file):
            check_inside(file, root)
    chosen.keep_where(
        lambda file: not is_folder(file), "linked folders, whose files count where they are"
    )
    chosen.keep_where(is_file, "no regular files")
    leave_out_other_formats(chosen)
    leave_out_descriptions(chosen, top)
    if not chosen.files:
        raise DataError(f"{top}: no file in it that we read ({readable_formats()})")
    return chosen


def leave_out_other_formats(chosen: ChosenFiles) -> None:
    """Files that cannot be read are left out, by their suffixes."""
    others: dict[str, list[Path]] = {}
    for file in chosen.files:
        if not formats.format_of(file):
            others.setdefault(file.suffix or "(no suffix)", []).append(file)
    for suffix in sorted(others):
        chosen.leave_out(f"of kind {suffix}", others[suffix])
    chosen.files = tuple(file for file in chosen.files if formats.format_of(file))


def leave_out_descriptions(chosen: ChosenFiles, top: Path) -> None:
    """Files that describe or accompany the data below `top` are no data."""
    chosen.keep_where(
        lambda file: not ABOUT_DATA.search(relative(file, top)), "that describe the data"
    )
    if not all(formats.is_text(file) for file in chosen.files):
        chosen.keep_where(
            lambda file: not BESIDE_DATA.search(relative(file, top)), "beside the data"
        )
