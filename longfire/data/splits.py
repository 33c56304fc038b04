"""Which files of a folder are of one split (train, validation, test), by the words in their paths.

Where that is not clear it is an error and not a guess.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from longfire.data import formats
from longfire.data.chosen_files import ChosenFiles, some
from longfire.errors import DataError
from longfire.listing import is_file
from longfire.own_files import read_json

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval"},
}
SPLIT_LIST = "dataset_dict.json"  # what `datasets` saves beside a folder for each split
OTHER_SPLITS = "of other splits"


def split_of(name: str) -> str:
    """The split that a relative path names; "" if none does.

    The deepest folder that has the name of a split decides (`test/train_schedules.jsonl` is of
    test), then the first word of the file's name that names one, then the words of its folders.
    """
    *folders, file = name.lower().split("/")
    for folder in reversed(folders):
        split = split_named(folder)
        if split:
            return split
    for part in (file, *reversed(folders)):
        for word in words_of(part):
            split = split_named(word)
            if split:
                return split
    return ""


def split_named(word: str) -> str:
    """The split that a word stands for; "" if it stands for none."""
    for split, names in SPLITS.items():
        if word in names:
            return split
    return ""


def words_of(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def keep_split(entry: str, chosen: ChosenFiles, own: Mapping[str, str]) -> None:
    """Read the files of data.dataset_split, by the words of their relative paths
    (`train-00000.parquet`, `test/a.jsonl`).

    Without the setting: those of `train` where data files are named by splits and were not chosen
    by data_files, else all. Text files are documents, whatever their names are. Raises DataError
    where only some data files name a split.
    """
    wanted = own["dataset_split"]
    is_chosen = bool(own["data_dir"] or own["data_files"])
    split_list = chosen.root / SPLIT_LIST
    if is_file(split_list) and not is_chosen:
        keep_listed_split(entry, chosen, wanted, split_list)
        return
    splits = {}
    for file in chosen.files:
        if not formats.is_text(file):
            splits[file] = split_of(chosen.relative(file))
    named = sorted(set(splits.values()) - {""})
    if wanted in ("", "train") and (own["data_files"] or not named):
        return
    if not wanted:
        check_all_named(entry, chosen, splits)
        kept = [file for file in chosen.files if splits.get(file, "train") == "train"]
    else:
        kept = [file for file in chosen.files if is_of_split(chosen.relative(file), wanted)]
    check_split(entry, wanted, named, kept)
    chosen.keep(kept, OTHER_SPLITS)


class SplitList(TypedDict):
    """dataset_dict.json."""

    splits: list[str]


def is_of_split(name: str, wanted: str) -> bool:
    """Whether a relative path names the wanted split, which may be any word."""
    split = split_of(wanted)
    if split:
        return split_of(name) == split
    return wanted.lower() in words_of(name)


def keep_listed_split(entry: str, chosen: ChosenFiles, wanted: str, split_list: Path) -> None:
    """Read the files of one split of a dataset that `datasets` saved: a folder for each split."""
    fix = "save the dataset again, or name its files with data.data_files"
    names = read_json(split_list, SplitList, DataError, fix)["splits"]
    folder = wanted or "train"
    kept = [file for file in chosen.files if chosen.relative(file).split("/")[0] == folder]
    check_split(entry, wanted, names, kept)
    chosen.keep(kept, OTHER_SPLITS)


def check_all_named(entry: str, chosen: ChosenFiles, splits: Mapping[Path, str]) -> None:
    """Raises DataError where only some data files name a split. splits: of each data file, or ""
    where it names none."""
    unnamed = [chosen.relative(file) for file, split in splits.items() if not split]
    if not unnamed:
        return
    named = [chosen.relative(file) for file, split in splits.items() if split]
    suffix = next(iter(splits)).suffix
    raise DataError(
        f"{entry}: some files name a split ({some(named)}), others do not ({some(unnamed)}), so it "
        "is not clear which to train on; choose with data.dataset_split = train, or with "
        f'data.data_files ("**/*{suffix}" takes all of this kind)'
    )


def check_split(entry: str, wanted: str, available: Sequence[str], kept: Sequence[Path]) -> None:
    """Raises DataError where a split has no files."""
    if not kept:
        raise DataError(
            f"{entry}: no files of split {wanted or 'train'!r} (splits there: "
            f"{', '.join(available) or 'none'}); set data.dataset_split or data.data_files"
        )
