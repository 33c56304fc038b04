"""The files of a source that are read, and those that are not, with the reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

NAMES_SHOWN = 3  # files that a message lists


@dataclass
class ChosenFiles:
    """The files below `root` that are read, in the order of their relative paths.

    left_out: reason -> files that are not read.
    """

    root: Path
    files: tuple[Path, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, files: Iterable[Path]) -> None:
        """Record files that are not read."""
        names = [relative(file, self.root) for file in files]
        if names:
            self.left_out.setdefault(reason, []).extend(names)

    def keep(self, files: Iterable[Path], reason: str) -> None:
        """Read only these; the reason is that of the others."""
        kept = set(files)
        self.keep_where(lambda file: file in kept, reason)

    def keep_where(self, condition: Callable[[Path], object], reason: str) -> None:
        """Read only the files with a condition; the reason is that of the others."""
        kept = []
        others = []
        for file in self.files:
            if condition(file):
                kept.append(file)
            else:
                others.append(file)
        self.leave_out(reason, others)
        self.files = tuple(kept)

    def relative(self, file: Path) -> str:
        """The path below the root, with / between folders."""
        return relative(file, self.root)

    def describe(self) -> str:
        """`12 of 15 files read, left out: ...`."""
        count = len(self.files) + sum(map(len, self.left_out.values()))
        text = f"{len(self.files):,} of {count:,} files read"
        if not self.left_out:
            return text
        reasons = []
        for reason, names in self.left_out.items():
            reasons.append(f"{len(names)} {reason} ({some(names)})")
        return f"{text}, left out: {'; '.join(reasons)}"


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    if more > 0:
        text += f" and {more:,} more"
    return text


def relative(file: Path, root: Path) -> str:
    """The path of a file below a folder, with / between folders."""
    return file.relative_to(root).as_posix()
