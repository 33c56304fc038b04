"""What `longfire convert` did, tensor by tensor and setting by setting: printed as tables and
lines, written as conversion.json."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from rich.table import Table

from longfire.plain_console import plain_console

logger = logging.getLogger(__name__)

TABLE = "conversion.json"
LOG_COLUMNS = 200  # of tables that no terminal shows, so that names in a log are not cut
IN_FILES = "in its files"


@dataclass(frozen=True)
class Moved:
    """How one parameter of the new model was made, in words, and from which tensor of the source
    ("" if it is fresh)."""

    name: str
    how: str
    source: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Left:
    """A tensor of the source that no part of the new model was made of, and why."""

    name: str
    why: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Setting:
    """One setting of the new model beside the source's.

    how: "inherited" (the target's config did not set it), "differs" (it sets another value), "left
    behind" (the mixer that it belongs to was replaced; `value` is the new mixer).
    layers: of a mixer's setting; empty for the model's own.
    """

    name: str
    how: str
    value: object
    source: object
    layers: tuple[int, ...] = ()


class TensorLine(NamedTuple):
    """A line of a printed table: a tensor, what became of it, and its name in the files."""

    name: str
    shape: tuple[int, ...]
    text: str
    file_name: str = ""


@dataclass(frozen=True)
class Conversion:
    """What became of a source: `moved` has each parameter of the new model, `left` each tensor of
    the source that is in none of them.

    files: our name of a tensor of the source -> its name in the source's files.
    """

    moved: list[Moved]
    left: list[Left]
    settings: list[Setting]
    files: Mapping[str, str]

    def to_json(self) -> str:
        """The text of conversion.json."""
        parameters = []
        for moved in self.moved:
            parameters.append({**asdict(moved), IN_FILES: self.files.get(moved.source, "")})
        left_behind = []
        for left in self.left:
            left_behind.append({**asdict(left), IN_FILES: self.files[left.name]})
        tables = {
            "parameters": parameters,
            "left behind": left_behind,
            "settings": list(map(asdict, self.settings)),
        }
        return json.dumps(tables, indent=1) + "\n"

    def facts(self) -> dict[str, str]:
        """What the model card says of it."""
        numbers: Counter[str] = Counter()
        for moved in self.moved:
            kind = moved.how.partition(":")[0]
            numbers[kind] += moved.numbers
        differing = []
        for setting in self.settings:
            if setting.how == "differs":
                differing.append(f"{setting.name} = {setting.value!r} ({setting.source!r})")
        facts = {"parameters": ", ".join(f"{count:,} {kind}" for kind, count in numbers.items())}
        if self.left:
            left = sum(tensor.numbers for tensor in self.left)
            facts["left behind"] = f"{left:,} parameters of the source"
        facts["settings that differ from the source's"] = ", ".join(differing)
        return {name: text for name, text in facts.items() if text}

    def show(self, config: str) -> None:
        """Print the tables, and a line for each setting that is inherited, differs or is left
        behind.

        config: the file with the target's own settings.
        """
        moved = [TensorLine(one.name, one.shape, one.how) for one in self.moved]
        show_tensors(("parameter", "layers", "shape", "how"), moved)
        if self.left:
            left = []
            for one in self.left:
                left.append(TensorLine(one.name, one.shape, one.why, self.files[one.name]))
            show_tensors(("left behind of the source", "layers", "shape", "why", IN_FILES), left)
        for line in lines(self.settings, config):
            logger.info(line)


def lines(settings: Iterable[Setting], config: str) -> list[str]:
    """A line for each setting, and one for all settings of a replaced mixer."""
    found: list[str] = []
    replaced: dict[tuple[tuple[int, ...], object, str], list[str]] = {}
    for setting in settings:
        start = f"{place(setting.layers)}{setting.name} = {setting.value!r}"
        if setting.how == "inherited":
            found.append(f"{start}, as in the source")
        elif setting.how == "differs":
            found.append(f"{start} by {config}; in the source {setting.source!r}")
        else:
            mixer, _, leaf = setting.name.partition(".")
            leaves = replaced.setdefault((setting.layers, setting.value, mixer), [])
            leaves.append(f"{leaf} = {setting.source!r}")
    for (layers, new_mixer, mixer), leaves in replaced.items():
        found.append(
            f"{place(layers)}{new_mixer} in place of {mixer}, without its {', '.join(leaves)}"
        )
    return found


def place(layers: tuple[int, ...]) -> str:
    """`layers 0-3: `; "" for the model's own settings."""
    if not layers:
        return ""
    if len(layers) == 1:
        return f"layer {layers[0]}: "
    return f"layers {ranges(layers)}: "


def show_tensors(heads: Sequence[str], tensors: Iterable[TensorLine]) -> None:
    """A table with one line for tensors that are alike in every layer."""
    layers_of: dict[TensorLine, list[int]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        if parts[0] != "layers":
            layers_of.setdefault(tensor, [])
            continue
        same_in_layers = tensor._replace(
            name=".".join(["layers", "*", *parts[2:]]),
            file_name=tensor.file_name.replace(f".{parts[1]}.", ".*.", 1),
        )
        layers_of.setdefault(same_in_layers, []).append(int(parts[1]))
    table = Table(*heads)
    for tensor, layers in layers_of.items():
        shape = " x ".join(map(str, tensor.shape))
        cells = (tensor.name, ranges(layers), shape, tensor.text, tensor.file_name)
        table.add_row(*cells[: len(heads)])
    is_terminal = plain_console().is_terminal
    plain_console(width=None if is_terminal else LOG_COLUMNS).print(table)


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = []
    for run in runs:
        texts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(texts)
