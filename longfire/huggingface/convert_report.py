"""What `longfire convert` did, tensor by tensor and setting by setting: printed as tables and
lines, written as conversion.json."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

TABLE = "conversion.json"
LOG_COLUMNS = 200  # of tables that no terminal shows: names in a log are whole


@dataclass(frozen=True)
class Moved:
    """How one parameter of the new model came to be, in words, from which of the source ("" if it
    is fresh)."""

    name: str
    how: str
    source: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return count(self.shape)


@dataclass(frozen=True)
class Left:
    """A tensor of the source that nothing in the new model was made of, and why."""

    name: str
    why: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return count(self.shape)


@dataclass(frozen=True)
class Setting:
    """One setting of the new model beside the source's.

    how: "inherited" (the target's config did not say it), "differs" (it says another value), "left behind" (the mixer that it
    belongs to was replaced; `value` is the new mixer).  layers: of a mixer's setting; empty for the model's own.
    """

    name: str
    how: str
    value: Any
    source: Any
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """All that became of a source: `moved` has each parameter of the new model, `left` each tensor
    of the source that is in none of them.

    files: our name of a tensor of the source -> its name in the source's files.
    """

    moved: list[Moved]
    left: list[Left]
    settings: list[Setting]
    files: Mapping[str, str]

    def to_json(self) -> str:
        """The text of conversion.json."""
        tables = {
            "parameters": [
                {**asdict(one), "in its files": self.files.get(one.source, "")}
                for one in self.moved
            ],
            "left behind": [
                {**asdict(one), "in its files": self.files[one.name]} for one in self.left
            ],
            "settings": [asdict(one) for one in self.settings],
        }
        return json.dumps(tables, indent=1) + "\n"

    def facts(self) -> dict[str, str]:
        """What the model card says of it."""
        kinds: Counter[str] = Counter()
        for one in self.moved:
            kinds[one.how.partition(":")[0]] += one.numbers
        differing = [
            f"{one.name} = {one.value!r} ({one.source!r})"
            for one in self.settings
            if one.how == "differs"
        ]
        facts = {
            "parameters": ", ".join(f"{numbers:,} {kind}" for kind, numbers in kinds.items()),
            "left behind": f"{sum(one.numbers for one in self.left):,} parameters of the source"
            if self.left
            else "",
            "settings that differ from the source's": ", ".join(differing),
        }
        return {name: text for name, text in facts.items() if text}

    def show(self, config: str, note: Callable[[str], None]) -> None:
        """Print the tables, and a line for each setting that is inherited, differs or is left
        behind.

        config: the file that says the target's own settings.
        """
        heads = ("parameter", "layers", "shape", "how")
        show_tensors(heads, [(one.name, one.shape, one.how, "") for one in self.moved])
        if self.left:
            heads = ("left behind of the source", "layers", "shape", "why", "in its files")
            show_tensors(
                heads, [(one.name, one.shape, one.why, self.files[one.name]) for one in self.left]
            )
        for line in lines(self.settings, config):
            note(line)


def lines(settings: Iterable[Setting], config: str) -> list[str]:
    """A line for each setting, except that those which go with a mixer are in one."""
    out: list[str] = []
    gone: dict[tuple[tuple[int, ...], str, str], list[str]] = {}
    for one in settings:
        where = place(one.layers)
        if one.how == "inherited":
            out.append(f"{where}{one.name} = {one.value!r}, as in the source")
        elif one.how == "differs":
            out.append(
                f"{where}{one.name} = {one.value!r} by {config}; in the source {one.source!r}"
            )
        else:
            mixer, _, leaf = one.name.partition(".")
            gone.setdefault((one.layers, one.value, mixer), []).append(f"{leaf} = {one.source!r}")
    for (layers, mixer, replaced), names in gone.items():
        out.append(f"{place(layers)}{mixer} in place of {replaced}, without its {', '.join(names)}")
    return out


def place(layers: tuple[int, ...]) -> str:
    if not layers:
        return ""
    return f"{'layer' if len(layers) == 1 else 'layers'} {ranges(layers)}: "


def show_tensors(
    heads: tuple[str, ...], tensors: Iterable[tuple[str, tuple[int, ...], str, str]]
) -> None:
    """A table with one line for tensors that are alike in every layer.

    tensors: name, shape, text and name in the files of each.
    """
    rows: dict[tuple[str, tuple[int, ...], str, str], list[int]] = {}
    for name, shape, text, file_name in tensors:
        parts = name.split(".")
        in_layer = parts[0] == "layers"
        if in_layer:
            name = ".".join(["layers", "*", *parts[2:]])
            file_name = file_name.replace(f".{parts[1]}.", ".*.", 1)
        layers = rows.setdefault((name, shape, text, file_name), [])
        if in_layer:
            layers.append(int(parts[1]))
    table = Table(*heads)
    for (name, shape, text, file_name), layers in rows.items():
        cells = (name, ranges(layers), " x ".join(map(str, shape)), text, file_name)
        table.add_row(*cells[: len(heads)])
    is_terminal = Console().is_terminal
    Console(width=None if is_terminal else LOG_COLUMNS).print(table)


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def count(shape: tuple[int, ...]) -> int:
    numbers = 1
    for size in shape:
        numbers *= size
    return numbers
