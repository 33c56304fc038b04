"""Which layer of a family has which mixer and settings: fla's table `attn`, and the windows of
transformers; free of torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.huggingface.family import (
    Config,
    Key,
    Layers,
    Settings,
    leaf_of,
    other_mixers,
    settings_of,
)

FULL = "full_attention"
SLIDING = "sliding_attention"
ATTENTION = "attention"
SLIDING_ATTENTION = "attention:sliding"


def no_attn(layers: int) -> Config | None:
    """The table `attn` of a class without softmax layers."""
    return None


@dataclass(frozen=True)
class Listed:
    """fla's `attn`: a table, or several, of layers that are softmax attention, each table with
    settings of its own.

    fixed: settings of attention that their layer has with this value only. default: number of
    layers -> their `attn` where the config has none.
    """

    keys: tuple[Key, ...]
    fixed: Settings
    default: Callable[[int], Config | None] = no_attn
    reads: tuple[str, ...] = ("attn",)

    @property
    def places(self) -> tuple[str, ...]:
        return (*(key.ours for key in self.keys), *self.fixed)

    def read(
        self,
        config: Config,
        settings: Settings,
        mixer: str,
        where: str,
    ) -> Layers:
        types = [mixer] * settings["num_hidden_layers"]
        mixers = {mixer: settings_of(settings, mixer)}
        attn = config["attn"] if "attn" in config else self.default(len(types))
        for table in tables_of(attn):
            given = self._read_table(table, where)
            numbers = table.get("layers", [])
            check_numbers(numbers, types, mixer, where)
            name = variant(mixers, given)
            for number in numbers:
                types[number] = name
        return used_layers(types, mixers)

    def _read_table(self, table: Config, where: str) -> Settings:
        """The settings of attention in a table. Raises SettingsError."""
        settings: Settings = {}
        for key in self.keys:
            settings[key.ours] = key.read(table, {}, f"{where}: attn")
        # max_position_embeddings is in older files; their attention layers do not read it.
        known = {"layers", "max_position_embeddings"}
        for key in self.keys:
            known.add(key.theirs)
        unknown = sorted(table.keys() - known)
        if unknown:
            raise SettingsError(f"{where}: attn has unknown keys {unknown}")
        return settings_of(settings | self.fixed, ATTENTION)

    def refusals(
        self,
        model_config: ModelConfig,
        mixer: str,
    ) -> Iterator[str]:
        yield from other_mixers(model_config, {mixer, ATTENTION})
        for name, given in model_config.mixers.items():
            if mixer_of(name) != ATTENTION:
                continue
            for key, value in self.fixed.items():
                leaf = leaf_of(key)
                if given[leaf] != value:
                    yield f"{name}.{leaf} = {given[leaf]!r}, it has {value!r} only"

    def write(self, model_config: ModelConfig) -> Config:
        tables: list[Config] = []
        for name, given in model_config.mixers.items():
            if mixer_of(name) == ATTENTION:
                tables.append(self._write_table(model_config.layer_types, name, given))
        if not tables and self.default(len(model_config.layer_types)) is None:
            return {}
        if not tables:
            return {"attn": None}
        return {"attn": tables[0] if len(tables) == 1 else tables}

    def _write_table(
        self,
        layer_types: tuple[str, ...],
        name: str,
        given: Settings,
    ) -> Config:
        """The table of one name of softmax layers."""
        layers: list[int] = []
        for layer, kind in enumerate(layer_types):
            if kind == name:
                layers.append(layer)
        table: Config = {"layers": layers}
        for key in self.keys:
            table[key.theirs] = key.write(given[key.leaf])
        return table


def tables_of(attn: Config | list[Config] | None) -> list[Config]:
    """The tables of fla's `attn`, which may be one table, several or none."""
    if attn is None:
        return []
    if isinstance(attn, list):
        return attn
    return [attn]


def used_layers(types: list[str], mixers: dict[str, Settings]) -> Layers:
    """The layers, with the settings of the names that they use."""
    return tuple(types), {name: mixers[name] for name in dict.fromkeys(types)}


def check_numbers(
    numbers: list[object],
    types: list[str],
    mixer: str,
    where: str,
) -> None:
    """Raises SettingsError unless these are numbers of layers that no table has named before."""
    free = {i for i, kind in enumerate(types) if kind == mixer}
    are_numbers = all(type(number) is int for number in numbers)
    if not are_numbers or not free.issuperset(numbers) or len(set(numbers)) < len(numbers):
        raise SettingsError(
            f"{where}: attn.layers = {numbers!r} must name layers 0 to {len(types) - 1}, each once"
        )


@dataclass(frozen=True)
class Windows:
    """transformers' `layer_types`: full_attention, or sliding_attention with one window for all
    layers that have one.

    switch: their key that turns the windows on; "" if a window is enough. first: their key of the
    first layer with a window, in configs that do not list the layers; "" if all have one then.
    default: their window when the config has none.
    """

    switch: str = "use_sliding_window"
    first: str = "max_window_layers"
    first_default: int = 28
    default: int = 4096
    places: tuple[str, ...] = ("attention.window_size",)

    @property
    def reads(self) -> tuple[str, ...]:
        keys = (self.switch, "sliding_window", self.first, "layer_types")
        return tuple(filter(None, keys))

    def read(
        self,
        config: Config,
        settings: Settings,
        mixer: str,
        where: str,
    ) -> Layers:
        window = self._read_window(config, where)
        types = self._read_types(config, window, settings["num_hidden_layers"], where)
        given = settings_of(settings, ATTENTION)
        full = {**given, "window_size": 0}
        sliding = {**given, "window_size": window}
        if FULL not in types:
            return (ATTENTION,) * len(types), {ATTENTION: sliding}
        names = {FULL: ATTENTION, SLIDING: SLIDING_ATTENTION}
        mixers = {ATTENTION: full, SLIDING_ATTENTION: sliding}
        return used_layers([names[kind] for kind in types], mixers)

    def _read_window(self, config: Config, where: str) -> int:
        """The window in tokens; 0: none."""
        if self.switch and not Key(self.switch, "", False).read(config, {}, where):
            return 0
        window = Key("sliding_window", "", self.default, null=0).read(config, {}, where)
        return cast(int, window)  # the key has checked it

    def _read_types(
        self,
        config: Config,
        window: int,
        count: int,
        where: str,
    ) -> list[str]:
        """FULL or SLIDING for each layer. Raises SettingsError."""
        first = 0
        if self.first:
            found = Key(self.first, "", self.first_default).read(config, {}, where)
            first = cast(int, found)  # the key has checked it
        types = config.get("layer_types")
        if not types:
            types = [FULL] * count
            if window:
                for layer in range(max(0, first), count):
                    types[layer] = SLIDING
        if len(types) != count or not set(types) <= {FULL, SLIDING}:
            raise SettingsError(
                f"{where}: layer_types = {types!r} must be {count} times {FULL} or {SLIDING}"
            )
        if SLIDING in types and not window:
            raise SettingsError(
                f"{where}: layer_types has {SLIDING}, but {' and '.join(self.reads[:-1])} give it "
                "no window"
            )
        return types

    def refusals(
        self,
        model_config: ModelConfig,
        mixer: str,
    ) -> Iterator[str]:
        yield from other_mixers(model_config, {ATTENTION})
        windows = [given.get("window_size", 0) for given in model_config.mixers.values()]
        if len(set(windows) - {0}) > 1:
            yield f"attention.window_size = {windows}, its layers with a window have the same"

    def write(self, model_config: ModelConfig) -> Config:
        windows = [model_config.mixers[name]["window_size"] for name in model_config.layer_types]
        config: Config = {
            "layer_types": [SLIDING if window else FULL for window in windows],
            "sliding_window": max(windows) or None,
        }
        if self.switch:
            config[self.switch] = any(windows)
        if self.first:
            config[self.first] = first_of_tail(windows)
        return config


def first_of_tail(windows: list[int]) -> int:
    """For readers that do not know layer_types: the layer from which on all have a window, if that
    is so, else the number of layers."""
    with_window = [i for i, window in enumerate(windows) if window]
    first = len(windows) - len(with_window)
    if with_window == list(range(first, len(windows))):
        return first
    return len(windows)


def variant(
    mixers: dict[str, Settings],
    given: Settings,
    mixer: str = ATTENTION,
) -> str:
    """The name in `mixers` under which these settings are: one that exists already, or the next:
    attention, attention:2 ..."""
    count = 0
    for name, settings in mixers.items():
        if mixer_of(name) != mixer:
            continue
        if settings == given:
            return name
        count += 1
    name = f"{mixer}:{count + 1}" if count else mixer
    mixers[name] = given
    return name
