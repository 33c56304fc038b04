"""The card of a dataset of the hub: which files its configurations consist of, as `datasets` reads
its README.md.

configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*.parquet
- config_name: sample
  data_dir: sample
"""

from dataclasses import dataclass
from pathlib import Path

from longfire.errors import DataError

CARD = "README.md"
HEAD_BYTES = 2**20  # of a README.md that is looked at


@dataclass(frozen=True)
class Configuration:
    """split -> patterns of files, or None for all files of the folder; is_default: the card says
    so."""

    name: str
    folder: str
    splits: dict[str, list[str]] | None
    is_default: bool


@dataclass(frozen=True)
class Card:
    """The configurations of a dataset; at least one."""

    file: Path
    configurations: tuple[Configuration, ...]

    def choose(self, name: str, split: str, entry: str) -> tuple[str, list[str] | None, str]:
        """(name, patterns or None, folder) of a configuration, or "" for the default one, and a
        split. Raises DataError."""
        found = self.named(name, entry)
        if found.splits is None:
            return found.name, None, found.folder
        if split not in found.splits:
            raise DataError(
                f"{self.file}: configuration {found.name!r} has no split {split!r}; set data.dataset_split to one of: "
                f"{', '.join(found.splits)}"
            )
        return found.name, found.splits[split], found.folder

    def named(self, name: str, entry: str) -> Configuration:
        there = self.configurations
        if name:
            found = [one for one in there if one.name == name]
        else:
            found = [one for one in there if one.is_default] or [
                one for one in there if one.name == "default"
            ]
            found = found or (list(there) if len(there) == 1 else [])
        if not found:
            wanted = (
                f"data.dataset_name = {name!r} is none of" if name else "and names no default among"
            )
            raise DataError(
                f"{entry}: its {CARD} has several configurations, {wanted} them; set data.dataset_name to one of: "
                f"{', '.join(one.name for one in there)}"
            )
        return found[0]


def read_card(folder: Path) -> Card | None:
    """The card of a cloned dataset; None where the README.md has no configurations. Raises
    DataError for one that cannot be read."""
    file = folder / CARD
    if not file.is_file() or not names_configurations(file):
        return None
    import huggingface_hub  # brings the reader of YAML; only clones of datasets need it

    try:
        data = huggingface_hub.metadata_load(file) or {}
        configurations = tuple(configuration(entry) for entry in data.get("configs") or ())
    except Exception as error:  # the errors of YAML have no class that the library shows
        raise DataError(
            f"{file}: its configurations cannot be read ({' '.join(str(error).split())[:200]}); choose files with "
            "data.data_files"
        ) from error
    return Card(file, configurations) if configurations else None


def names_configurations(file: Path) -> bool:
    """Whether the README.md begins with a head of YAML that has `configs`."""
    with open(file, encoding="utf-8", errors="replace") as opened:
        text = opened.read(HEAD_BYTES).lstrip()
    if not text.startswith("---"):
        return False
    head = text[3:].partition("\n---")[0]
    return any(line.startswith("configs:") for line in head.splitlines())


def configuration(entry: dict) -> Configuration:
    """One entry of `configs`. data_files may be a pattern, a list of them, or patterns by split.
    Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no configuration")
    folder = str(entry.get("data_dir") or "")
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError(f"data_dir = {folder!r} leads out of the folder")
    files = entry.get("data_files")
    splits = None if files is None else splits_of(files)
    return Configuration(
        str(entry.get("config_name", "default")), folder, splits, bool(entry.get("default"))
    )


def splits_of(files: object) -> dict[str, list[str]]:
    if isinstance(files, dict):
        return {str(split): patterns_of(paths) for split, paths in files.items()}
    if isinstance(files, list) and all(isinstance(one, dict) for one in files):
        splits: dict[str, list[str]] = {}
        for one in files:
            splits.setdefault(str(one.get("split", "train")), []).extend(patterns_of(one["path"]))
        return splits
    return {"train": patterns_of(files)}


def patterns_of(paths: object) -> list[str]:
    patterns = [paths] if isinstance(paths, str) else paths
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{paths!r} is no pattern of files")
    return patterns
