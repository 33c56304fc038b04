"""Which files of a folder or a glob are read, and which are left out and why.

What cannot be decided is an error and not a guess: a link whose file is not there, a git-LFS
pointer, a missing part of a numbered series, names of which only some name a split.
"""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from longfire.data import cards, formats
from longfire.errors import DataError

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval"},
}
ABOUT_DATA = re.compile(
    r"(^|/)((dataset_infos?|dataset_dict|state)\.json$|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow$)"
)  # of `datasets`
BESIDE_DATA = re.compile(
    r"(^|/)(README|LICENSE)[^/]*$|\.py$"
)  # text files, no documents where there are data files
HIDDEN = re.compile(r"(^|/)\.")
NUMBERED = re.compile(r"^(?P<before>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<after>.*)$")
HASH = re.compile(
    r"^-[0-9a-f]{8,}(?=\.)"
)  # of one part, which `push_to_hub` once put behind -of-00003
POINTERS = (b"version https://git-lfs.github.com/spec/", b"# xet version", b"/annex/objects/")
POINTER_BYTES = 1024  # a pointer is no larger
MAX_PARTS = 10**6  # of a numbered series; a larger number is no count of files
NAMED = 3  # files that a message lists


@dataclass
class Chosen:
    """The files that are read, in the order of their relative paths, and reason -> files that are
    not."""

    root: Path
    files: tuple[Path, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, files: Iterable[Path]) -> None:
        names = [relative(file, self.root) for file in files]
        if names:
            self.left_out.setdefault(reason, []).extend(names)

    def keep(self, files: Iterable[Path], reason: str) -> None:
        """Read only these; the others are left out."""
        kept = set(files)
        self.leave_out(reason, [file for file in self.files if file not in kept])
        self.files = tuple(file for file in self.files if file in kept)

    def describe(self) -> str:
        """`12 of 15 files read, left out: ...`; "" for a file that was named itself."""
        count = len(self.files) + sum(map(len, self.left_out.values()))
        parts = [
            f"{len(names)} {reason} ({some(names)})" for reason, names in self.left_out.items()
        ]
        text = f"{len(self.files):,} of {count:,} files read"
        return f"{text}, left out: {'; '.join(parts)}" if parts else text


def some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def known() -> str:
    return f"{', '.join(formats.FORMATS)}; the text ones also as .gz, .bz2, .xz and .zst"


def in_file(file: Path) -> Chosen:
    """A file that was named itself."""
    refuse_unreadable([file])
    refuse_pointers([file])
    return Chosen(file.parent, (file,))


def in_folder(entry: str, root: Path, own: dict[str, str]) -> Chosen:
    """The files of a folder that the settings choose, or its card, or the names of splits in it.

    own: data_dir, data_files, dataset_split and dataset_name of this source. Raises DataError.
    """
    for key in ("data_dir", "data_files"):
        if Path(own[key]).is_absolute() or ".." in Path(own[key]).parts:
            raise DataError(f"data.{key} = {own[key]!r} leads out of {root}; give a path inside it")
    refuse_cache_of_hub(root)
    card = cards.read_card(root)
    if own["dataset_name"] and not card:
        raise DataError(
            f"data.dataset_name = {own['dataset_name']!r} is for datasets of the hub and clones of them, and {entry} has no "
            "README.md that names configurations; choose files with data_dir or data_files"
        )
    if card and not own["data_dir"] and not own["data_files"]:
        return by_card(entry, root, own, card)
    top = root
    if own["data_dir"]:
        top = inside(root / own["data_dir"], root)
        if not top.is_dir():
            raise DataError(f"data.data_dir = {own['data_dir']!r}: no such folder in {root}")
    if own["data_files"]:
        chosen = Chosen(
            root,
            matching(
                top,
                [own["data_files"]],
                f"data.data_files = {own['data_files']!r}: no such file in {top}",
            ),
        )
        refuse_unreadable(chosen.files)
    else:
        chosen = data_files(root, top)
    keep_split(entry, chosen, own)
    return checked(chosen, whole=not own["data_files"])


def in_glob(entry: str, own: dict[str, str]) -> Chosen:
    """The files that a pattern matches."""
    if own["dataset_name"]:
        raise DataError(
            f"data.dataset_name = {own['dataset_name']!r} is for datasets of the hub and clones of them, and {entry} is a "
            "pattern; name the folder"
        )
    parts = Path(entry).expanduser().parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    chosen = Chosen(
        root,
        matching(root, [str(Path(*parts[plain:]))], f"data.dataset: no file matches {entry!r}"),
    )
    refuse_unreadable(chosen.files)
    keep_split(entry, chosen, {**own, "data_files": "*"})
    return checked(chosen, whole=False)


def by_card(entry: str, root: Path, own: dict[str, str], card: cards.Card) -> Chosen:
    """The files of the configuration that the card of a cloned dataset names, of one split."""
    name, patterns, folder = card.choose(
        own["dataset_name"], own["dataset_split"] or "train", entry
    )
    if patterns is None:  # the configuration is a folder, or all
        chosen = data_files(root, inside(root / folder, root) if folder else root)
        keep_split(entry, chosen, own)
        return checked(chosen, whole=True)
    top = inside(root / folder, root) if folder else root
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise DataError(f"{root / cards.CARD}: its pattern {pattern!r} leads out of {root}")
    files = matching(
        top, patterns, f"{root / cards.CARD}: configuration {name!r}: no file matches {patterns}"
    )
    chosen = Chosen(root, files)
    kept = [file for file in files if formats.format_of(file)]
    chosen.keep(kept, "of a kind that we do not read")
    leave_out_descriptions(chosen, root)
    others = [file for file in walk(root) if formats.format_of(file) and file not in set(files)]
    apart = (HIDDEN, ABOUT_DATA, BESIDE_DATA)
    others = [
        file for file in others if not any(kind.search(relative(file, root)) for kind in apart)
    ]
    chosen.leave_out(
        f"not of configuration {name!r}, split {own['dataset_split'] or 'train'!r}", others
    )
    if not chosen.files:
        raise DataError(
            f"{root / cards.CARD}: configuration {name!r} has no file that we read ({known()})"
        )
    return checked(chosen, whole=True)


def matching(top: Path, patterns: list[str], nothing: str) -> tuple[Path, ...]:
    """The files below a folder that patterns match, each once. Raises DataError, saying `nothing`,
    where there is none."""
    names = {
        name for pattern in patterns for name in glob.glob(pattern, root_dir=top, recursive=True)
    }
    found = sorted((top / name for name in names), key=lambda file: relative(file, top))
    refuse_dangling(found)
    files = tuple(file for file in found if file.is_file())
    if not files:
        raise DataError(nothing)
    return files


def walk(root: Path, without: frozenset[str] = frozenset()) -> list[Path]:
    """All files below root in the order of their relative paths; a linked folder is one of them,
    and is not entered."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - without
        found += [Path(folder, name) for name in files]
        found += [link for name in folders if (link := Path(folder, name)).is_symlink()]
    return sorted(found, key=lambda file: relative(file, root))


def data_files(root: Path, top: Path) -> Chosen:
    """All that we read below a folder, without what describes or accompanies the data."""
    found = walk(top)
    visible = [file for file in found if not HIDDEN.search(relative(file, top))]
    refuse_dangling(visible)
    chosen = Chosen(root, tuple(visible))
    chosen.leave_out(
        "hidden", [f for f in found if HIDDEN.search(relative(f, top)) and formats.format_of(f)]
    )
    for folder in [file for file in visible if file.is_dir()]:
        inside(folder, root)
    chosen.keep(
        [f for f in chosen.files if not f.is_dir()],
        "linked folders, whose files count where they are",
    )
    chosen.keep([f for f in chosen.files if f.is_file()], "no regular files")
    for kind in kinds_not_read(chosen.files):
        chosen.keep(
            [f for f in chosen.files if formats.format_of(f) or kind_of(f) != kind],
            f"of kind {kind}",
        )
    leave_out_descriptions(chosen, top)
    if not chosen.files:
        raise DataError(f"{top}: no file in it that we read ({known()})")
    return chosen


def leave_out_descriptions(chosen: Chosen, top: Path) -> None:
    """What describes or accompanies the data below `top` is no data."""
    chosen.keep(
        [f for f in chosen.files if not ABOUT_DATA.search(relative(f, top))],
        "that describe the data",
    )
    if any(formats.format_of(file) not in formats.TEXT_FORMATS for file in chosen.files):
        chosen.keep(
            [f for f in chosen.files if not BESIDE_DATA.search(relative(f, top))], "beside the data"
        )


def kinds_not_read(files: Iterable[Path]) -> list[str]:
    return sorted({kind_of(file) for file in files if not formats.format_of(file)})


def kind_of(file: Path) -> str:
    return file.suffix or "(no suffix)"


def split_of(name: str) -> str:
    """The split that a relative path names; "" if none does.

    The deepest folder that is called like a split decides (`test/train_schedules.jsonl` is of
    test), then the first word of the file's name that names one, then the words of its folders.
    """
    *folders, file = name.lower().split("/")
    for folder in reversed(folders):
        for split, marks in SPLITS.items():
            if folder in marks:
                return split
    for part in (file, *reversed(folders)):
        for word in words_of(part):
            for split, marks in SPLITS.items():
                if word in marks:
                    return split
    return ""


def words_of(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def keep_split(entry: str, chosen: Chosen, own: dict[str, str]) -> None:
    """Read the files of data.dataset_split, by the words of their relative paths
    (`train-00000.parquet`, `test/a.jsonl`).

    Without the setting: those of `train` where data files are named by splits and were not chosen
    by data_files, else all. Text files are documents, whatever they are called. Raises DataError
    where only some data files name a split.
    """
    wanted, root = own["dataset_split"], chosen.root
    listed = root / "dataset_dict.json"  # what `datasets` saves beside a folder for each split
    if listed.is_file() and not own["data_dir"] and not own["data_files"]:
        names = json.loads(listed.read_text())["splits"]
        kept = [f for f in chosen.files if relative(f, root).split("/")[0] == (wanted or "train")]
        refuse_no_split(entry, wanted, names, kept)
        chosen.keep(kept, "of other splits")
        return
    data = [file for file in chosen.files if formats.format_of(file) not in formats.TEXT_FORMATS]
    splits = {file: split_of(relative(file, root)) for file in data}
    named = sorted({split for split in splits.values() if split})
    if wanted in ("", "train") and (own["data_files"] or not named):
        return
    if not wanted and "" in splits.values():
        unnamed = [relative(file, root) for file, split in splits.items() if not split]
        of_split = [relative(file, root) for file, split in splits.items() if split]
        raise DataError(
            f"{entry}: some files name a split ({some(of_split)}), others do not ({some(unnamed)}), so it is not clear which "
            f'to train on; choose with data.dataset_split = train, or with data.data_files ("**/*{data[0].suffix}" takes all '
            "of this kind)"
        )
    if not wanted:
        kept = [file for file in chosen.files if splits.get(file, "train") == "train"]
    elif split_of(wanted):
        kept = [file for file in chosen.files if split_of(relative(file, root)) == split_of(wanted)]
    else:
        kept = [file for file in chosen.files if wanted.lower() in words_of(relative(file, root))]
    refuse_no_split(entry, wanted, named, kept)
    chosen.keep(kept, "of other splits")


def refuse_no_split(entry: str, wanted: str, there: list[str], kept: list[Path]) -> None:
    if not kept:
        raise DataError(
            f"{entry}: no files of split {wanted or 'train'!r} (splits there: {', '.join(there) or 'none'}); set "
            f"data.dataset_split or data.data_files"
        )


def checked(chosen: Chosen, whole: bool) -> Chosen:
    """The same with each file once, unless a link leads out, or a file is not what its name says.
    whole: a folder was named, so a missing part of a numbered series is an error."""
    for file in chosen.files:
        inside(file, chosen.root)
    originals = {file.resolve() for file in chosen.files if not file.is_symlink()}
    once = [
        file for file in chosen.files if not (file.is_symlink() and file.resolve() in originals)
    ]
    chosen.keep(once, "links to files that are read")
    refuse_pointers(chosen.files)
    holes = missing_parts(chosen.files)
    if holes and whole:
        raise DataError(
            f"{chosen.root}: parts of a numbered series are missing: {some(holes)}; fetch them, or choose the parts that you "
            f'want with data.data_files, as data.data_files = "**/*{chosen.files[0].suffix}"'
        )
    if holes:
        chosen.left_out.setdefault("numbered parts that are not there or not chosen", []).extend(
            holes
        )
    return chosen


def missing_parts(files: Iterable[Path]) -> list[str]:
    """Names of the parts of `...-00001-of-00003...` that are missing. The first part has number 0
    or 1."""
    series: dict[tuple[Path, str, str, str], set[int]] = {}
    digits: Counter[tuple[Path, str, str, str]] = Counter()
    for file in files:
        found = NUMBERED.match(file.name)
        if found and int(found["number"]) <= int(found["count"]) <= MAX_PARTS:
            key = (file.parent, found["before"], found["count"], HASH.sub("", found["after"]))
            series.setdefault(key, set()).add(int(found["number"]))
            digits[key] = len(found["number"])
    missing = []
    for key, numbers in series.items():
        folder, before, count, after = key
        first = 1 if int(count) in numbers and 0 not in numbers else 0
        wanted = set(range(first, first + int(count)))
        for number in sorted(wanted - numbers):
            missing.append(str(folder / f"{before}{number:0{digits[key]}d}-of-{count}{after}"))
    return missing


def refuse_unreadable(files: Iterable[Path]) -> None:
    for file in files:
        if not formats.format_of(file):
            raise DataError(f"{file}: not a kind of file that we read ({known()})")


def refuse_dangling(files: Iterable[Path]) -> None:
    """A link without its file: of a cache of the hub, git-annex or DVC whose content was not
    fetched, or was removed."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise DataError(
                f"{file}: a link to {os.readlink(file)}, which is not there; fetch its content (git annex get, dvc pull, hf "
                "download), or remove the link"
            )


def refuse_cache_of_hub(root: Path) -> None:
    """Its folder of a dataset has a folder for each revision, with a card in each."""
    if (root / "snapshots").is_dir() and (root / "blobs").is_dir():
        revisions = sorted(
            folder.name for folder in (root / "snapshots").iterdir() if folder.is_dir()
        )
        raise DataError(
            f"{root}: the hub's cache of a dataset, which keeps each revision in a folder of its own; name one: "
            f"{some([str(root / 'snapshots' / name) for name in revisions])}"
        )


def refuse_pointers(files: Iterable[Path]) -> None:
    """A small text that stands for a large file which was not fetched."""
    for file in files:
        if file.stat().st_size <= POINTER_BYTES:
            with open(file, "rb") as opened:
                begins = opened.read(POINTER_BYTES)
            if begins.startswith(POINTERS):
                raise DataError(
                    f"{file}: a pointer of git-LFS (or git-annex), not the file that it stands for; fetch it with `git lfs pull`"
                )


def inside(path: Path, root: Path) -> Path:
    """The path, unless a link leads it out of the source's folder. Two stores of content that tools
    keep beside what they link from are part of the folder: the blobs of the hub's cache, and the
    objects of git-annex."""
    target = path.resolve()
    if not any(
        target.is_relative_to(place) for place in (root.resolve(), *content_stores(root.resolve()))
    ):
        raise DataError(
            f"{path}: a link to {target}, outside of {root}; name that place as a source itself"
        )
    return path


def content_stores(root: Path) -> list[Path]:
    """<repository>/blobs of <repository>/snapshots/<commit>/..., and <clone>/.git/annex/objects of
    <clone>/..."""
    stores = []
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
            stores.append(folder.parent / "blobs")
        if (folder / ".git" / "annex" / "objects").is_dir():
            stores.append(folder / ".git" / "annex" / "objects")
    return stores
