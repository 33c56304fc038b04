"""The card of a dataset of the hub: which files its configurations consist of, as `datasets` reads
them from its README.md.

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
from longfire.listing import is_file
from longfire.regular_files import open_regular

CARD = "README.md"
HEAD_BYTES = 2**20  # of a README.md that are read
MESSAGE_CHARACTERS = 200  # of an error of the YAML library


@dataclass(frozen=True)
class Configuration:
    """One configuration of a dataset.

    folder: where its files are; "": in the folder of the card. splits: split -> patterns of files,
    or None for all files of the folder. is_default: whether the card calls it the default one.
    """

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
        """(name, patterns or None, folder) of a split of a configuration. name: "" for the default
        configuration. Raises DataError."""
        found = self.named(name, entry)
        if found.splits is None:
            return found.name, None, found.folder
        if split not in found.splits:
            raise DataError(
                f"{self.file}: configuration {found.name!r} has no split {split!r}; set "
                f"data.dataset_split to one of: {', '.join(found.splits)}"
            )
        return found.name, found.splits[split], found.folder

    def named(self, name: str, entry: str) -> Configuration:
        """The configuration of a name, or the default one. Raises DataError."""
        for configuration in self.configurations:
            if name and configuration.name == name:
                return configuration
        default = self.default()
        if not name and default:
            return default
        problem = "and names no default among"
        if name:
            problem = f"data.dataset_name = {name!r} is none of"
        names = ", ".join(configuration.name for configuration in self.configurations)
        raise DataError(
            f"{entry}: its {CARD} has several configurations, {problem} them; set "
            f"data.dataset_name to one of: {names}"
        )

    def default(self) -> Configuration | None:
        """The one that the card calls the default, or whose name is `default`, or the only one."""
        for configuration in self.configurations:
            if configuration.is_default:
                return configuration
        for configuration in self.configurations:
            if configuration.name == "default":
                return configuration
        if len(self.configurations) == 1:
            return self.configurations[0]
        return None


def read_card(folder: Path) -> Card | None:
    """The card of a cloned dataset; None where the README.md has no configurations. Raises
    DataError for one that cannot be read."""
    file = folder / CARD
    if not is_file(file) or not names_configurations(file):
        return None
    import huggingface_hub  # brings the reader of YAML; only clones of datasets need it

    try:
        data = huggingface_hub.metadata_load(file) or {}
        configurations = [configuration_of(entry) for entry in data.get("configs") or ()]
    except Exception as error:  # the library does not name the classes of YAML's errors
        reason = " ".join(str(error).split())[:MESSAGE_CHARACTERS]
        raise DataError(
            f"{file}: its configurations cannot be read ({reason}); choose files with "
            "data.data_files"
        ) from error
    if not configurations:
        return None
    return Card(file, tuple(configurations))


def names_configurations(file: Path) -> bool:
    """Whether the README.md begins with a head of YAML that has `configs`."""
    try:
        with open_regular(file) as opened:
            text = opened.read(HEAD_BYTES).decode(errors="replace").lstrip()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; repair or remove it") from error
    if not text.startswith("---"):
        return False
    head = text[3:].partition("\n---")[0]
    return any(line.startswith("configs:") for line in head.splitlines())


def configuration_of(entry: object) -> Configuration:
    """One entry of `configs`. data_files may be a pattern, a list of them, or patterns by split.
    Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is no configuration")
    folder = str(entry.get("data_dir") or "")
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ValueError(f"data_dir = {folder!r} leads out of the folder")
    files = entry.get("data_files")
    return Configuration(
        name=str(entry.get("config_name", "default")),
        folder=folder,
        splits=None if files is None else splits_of(files),
        is_default=bool(entry.get("default")),
    )


def splits_of(files: object) -> dict[str, list[str]]:
    """split -> patterns, from any form of data_files. Raises ValueError."""
    if isinstance(files, dict):
        return {str(split): patterns_of(paths) for split, paths in files.items()}
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        splits: dict[str, list[str]] = {}
        for entry in files:
            patterns = splits.setdefault(str(entry.get("split", "train")), [])
            patterns.extend(patterns_of(entry["path"]))
        return splits
    return {"train": patterns_of(files)}


def patterns_of(paths: object) -> list[str]:
    """One pattern or a list of them. Raises ValueError."""
    patterns = [paths] if isinstance(paths, str) else paths
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{paths!r} is no pattern of files")
    return patterns
