"""How a family of Hugging Face models is one of our shapes: what the tables consist of.

Free of torch, and of every single family: a family is an entry of a table (families.py). family_reading.py
and family_writing.py are the only readers of the tables.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.errors import SettingsError

Settings = dict[str, Any]  # flat: "hidden_size", "attention.num_heads"
REQUIRED = object()  # a key that their class cannot do without


@dataclass(frozen=True)
class Key:
    """One setting under its two names. Several keys may have the same `theirs`: their one setting
    is then several of ours.

    theirs: key of config.json, dotted where it is nested.  ours: a field of ModelConfig, or "mixer.field".
    default: what their class takes when the config is silent, or our value as a function of the
    settings read before; REQUIRED.
    null: what their `null` is with us, or a function of the settings read before.
    words: their value -> ours, where these differ or only these are possible; the first of several
    is the one that we write.
    when: ("attention.rope", "yarn", ...): there is such a key only while that setting of ours has
    one of these values.
    reads, writes: where neither value is the other: (theirs, the settings read before) -> ours,
    None if we have no such; all our settings -> theirs.
    """

    theirs: str
    ours: str
    default: Any
    null: Any = None
    words: Mapping[Any, Any] | None = None
    when: tuple[str, ...] = ()
    kind: type | None = None
    reads: Callable[[Any, Settings], Any] | None = None
    writes: Callable[[Settings], Any] | None = None

    def applies(self, settings: Settings) -> bool:
        return not self.when or settings[self.when[0]] in self.when[1:]

    def read(self, config: dict[str, Any], settings: Settings, where: str) -> Any:
        """Our value of what their config says. Raises SettingsError when it has another type than
        the default, or is missing."""
        if self.theirs not in config:
            if self.default is REQUIRED:
                raise SettingsError(f"{where}: {self.theirs} is missing; their class needs it too")
            if callable(self.default):
                return self.default(settings)
        value = config.get(self.theirs, self.default)
        if value is None:
            if self.default is not None and self.null is None:
                raise SettingsError(f"{where}: {self.theirs} = null, but it needs a value")
            return self.null(settings) if callable(self.null) else self.null
        if self.reads is not None:
            ours = self.reads(value, settings)
            if ours is None:
                raise SettingsError(f"{where}: {self.theirs} = {value!r} is none that longfire has")
            return ours
        if self.words is not None:
            if not isinstance(value, str | bool) or value not in self.words:
                known = " or ".join(
                    repr(self.first_word(ours)) for ours in dict.fromkeys(self.words.values())
                )
                raise SettingsError(
                    f"{where}: {self.theirs} = {value!r}: longfire has it with {known} only"
                )
            return self.words[value]
        kind = self.kind or type(self.null if self.default is None else self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is not type(None) and type(value) is not kind:
            raise SettingsError(
                f"{where}: {self.theirs} = {value!r} must be of type {kind.__name__}"
            )
        return value

    def said(self, settings: Settings) -> Any:
        """What they say where we have these settings."""
        return self.writes(settings) if self.writes else self.write(settings[self.ours])

    def write(self, value: Any) -> Any:
        """Our value as theirs. Their null only where silence is something else, or null too."""
        if self.words is not None:
            return self.first_word(value)
        return None if value == self.null and value != self.default else value

    def first_word(self, ours: Any) -> Any:
        return next(theirs for theirs, known in self.words.items() if known == ours)


@dataclass(frozen=True)
class Name:
    """Parameters under their two names: prefixes, behind which the names are the same; {i} is the
    layer.

    ours: several where one tensor of theirs is several of ours, laid end to end along the first
    dim.
    turned: they keep matrices as (in, out), we as (out, in).
    halves_swapped: rotary positions turn their heads the other way, which is ours with the two
    halves of each head's channels swapped.
    """

    theirs: str
    ours: str | tuple[str, ...]
    turned: bool = False
    halves_swapped: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Same:
    """Every layer has the family's mixer."""

    reads: tuple[str, ...] = ()  # keys of the config that say what the layers are
    places: tuple[str, ...] = ()  # settings of ours that they say

    def read(
        self, config: dict[str, Any], settings: Settings, family: "Family", where: str
    ) -> "Layers":
        return (family.mixer,) * settings["num_hidden_layers"], {
            family.mixer: inner(settings, family.mixer)
        }

    def refusals(self, model_config: ModelConfig, family: "Family") -> Iterator[str]:
        yield from others(model_config, {family.mixer})

    def write(self, model_config: ModelConfig, family: "Family") -> dict[str, Any]:
        return {}


Layers = tuple[
    tuple[str, ...], dict[str, Settings]
]  # layer_types, and the settings of each name in it


@dataclass(frozen=True)
class Listed:
    """fla's `attn`: a table, or several, of layers that are softmax attention, each table with
    settings of its own."""

    keys: tuple[Key, ...]
    fixed: Settings  # settings of attention that their layer has with this value only
    silent: Callable[[int], Any] = lambda layers: (
        None
    )  # number of layers -> their `attn` where the config has none
    reads = ("attn",)

    @property
    def places(self) -> tuple[str, ...]:
        return (*(key.ours for key in self.keys), *self.fixed)

    def read(
        self, config: dict[str, Any], settings: Settings, family: "Family", where: str
    ) -> Layers:
        types = [family.mixer] * settings["num_hidden_layers"]
        mixers = {family.mixer: inner(settings, family.mixer)}
        attn = config["attn"] if "attn" in config else self.silent(len(types))
        for entry in attn if isinstance(attn, list) else [attn] if attn is not None else []:
            entry = dict(entry)
            numbers = entry.pop("layers", [])
            free = [i for i, kind in enumerate(types) if kind == family.mixer]
            if (
                not all(type(i) is int for i in numbers)
                or not set(numbers) <= set(free)
                or len(set(numbers)) < len(numbers)
            ):
                raise SettingsError(
                    f"{where}: attn.layers = {numbers!r} must name layers 0 to {len(types) - 1}, each once"
                )
            said = {
                key.ours: key.read(entry, {}, f"{where}: attn") for key in self.keys
            } | self.fixed
            entry.pop(
                "max_position_embeddings", None
            )  # in older files; their attention layers do not read it
            if unknown := sorted(entry.keys() - {key.theirs for key in self.keys}):
                raise SettingsError(f"{where}: attn has unknown keys {unknown}")
            name = variant(mixers, inner(said, "attention"))
            for i in numbers:
                types[i] = name
        return tuple(types), {name: mixers[name] for name in dict.fromkeys(types)}

    def refusals(self, model_config: ModelConfig, family: "Family") -> Iterator[str]:
        yield from others(model_config, {family.mixer, "attention"})
        for name, given in model_config.mixers.items():
            for key, value in self.fixed.items() if mixer_of(name) == "attention" else ():
                if given[key.partition(".")[2]] != value:
                    yield f"{name}.{key.partition('.')[2]} = {given[key.partition('.')[2]]!r}, it has {value!r} only"

    def write(self, model_config: ModelConfig, family: "Family") -> dict[str, Any]:
        tables = []
        for name in [name for name in model_config.mixers if mixer_of(name) == "attention"]:
            numbers = [i for i, kind in enumerate(model_config.layer_types) if kind == name]
            said = {
                key.theirs: key.write(model_config.mixers[name][key.ours.partition(".")[2]])
                for key in self.keys
            }
            tables.append({"layers": numbers, **said})
        attn = tables[0] if len(tables) == 1 else tables or None
        return (
            {}
            if attn is None and self.silent(len(model_config.layer_types)) is None
            else {"attn": attn}
        )


@dataclass(frozen=True)
class Windows:
    """transformers' `layer_types`: full_attention, or sliding_attention with one window for all
    layers that slide.

    switch: their key that turns the windows on; "" if a window is enough. first: their key of the
    first layer that slides, in configs that do not list the layers; "" if all slide then. default:
    their window when the config is silent.
    """

    switch: str = "use_sliding_window"
    first: str = "max_window_layers"
    first_default: int = 28
    default: int = 4096
    places = ("attention.window_size",)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(
            key for key in (self.switch, "sliding_window", self.first, "layer_types") if key
        )

    def read(
        self, config: dict[str, Any], settings: Settings, family: "Family", where: str
    ) -> Layers:
        on = Key(self.switch, "", False).read(config, {}, where) if self.switch else True
        window = (
            Key("sliding_window", "", self.default, null=0).read(config, {}, where) if on else 0
        )
        count = settings["num_hidden_layers"]
        first = Key(self.first, "", self.first_default).read(config, {}, where) if self.first else 0
        types = config.get("layer_types") or [
            SLIDING if window and i >= first else FULL for i in range(count)
        ]
        if len(types) != count or not set(types) <= {FULL, SLIDING}:
            raise SettingsError(
                f"{where}: layer_types = {types!r} must be {count} times {FULL} or {SLIDING}"
            )
        if SLIDING in types and not window:
            raise SettingsError(
                f"{where}: layer_types has {SLIDING}, but {' and '.join(self.reads[:-1])} give it no window"
            )
        given = inner(settings, "attention")
        if FULL not in types:
            return ("attention",) * count, {"attention": {**given, "window_size": window}}
        names = {FULL: "attention", SLIDING: "attention:sliding"}
        mixers = {
            "attention": {**given, "window_size": 0},
            "attention:sliding": {**given, "window_size": window},
        }
        used = tuple(names[kind] for kind in types)
        return used, {name: mixers[name] for name in dict.fromkeys(used)}

    def refusals(self, model_config: ModelConfig, family: "Family") -> Iterator[str]:
        yield from others(model_config, {"attention"})
        windows = [given.get("window_size", 0) for given in model_config.mixers.values()]
        if len(set(windows) - {0}) > 1:
            yield f"attention.window_size = {windows}, its layers that slide have one window"

    def write(self, model_config: ModelConfig, family: "Family") -> dict[str, Any]:
        windows = [model_config.mixers[name]["window_size"] for name in model_config.layer_types]
        sliding = [i for i, window in enumerate(windows) if window]
        # For readers that know no layer_types: from which layer on all slide, if that is so.
        tail = len(windows) - len(sliding)
        first = tail if sliding == list(range(tail, len(windows))) else len(windows)
        config = {
            "layer_types": [SLIDING if window else FULL for window in windows],
            "sliding_window": max(windows) or None,
        }
        if self.switch:
            config |= {self.switch: bool(sliding)}
        if self.first:
            config |= {self.first: first}
        return config


FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """One model class of Hugging Face and how it is one of our shapes.

    package: where the class is defined.  mixer: of its layers; `layers` says which layers have another one, or other settings.
    names: of the parameters.  base: the prefix that files of the model without a head leave out.  buffers: ends of names in older
    files that are computed, so never read.  aliases: ends of names -> what some of their files have instead.
    fixed: their keys that we have with these values only; the first is what silence means and what
    we write.
    ours: our settings that their class has with this value only.
    begins: how a fresh model of their class begins, where that is no default of ours (init_* of the
    model config).
    inert: keys that change neither logits nor what can be learned.  replaced: keys that the named other one overrules.
    older: their older spelling -> the key as it is today.  both_spellings: we write the older ones too, for another package's class.
    """

    architecture: str
    package: str
    mixer: str
    keys: tuple[Key, ...]
    names: tuple[Name, ...]
    layers: Same | Listed | Windows = Same()
    base: str = "model."
    buffers: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, tuple] = field(default_factory=dict)
    ours: Settings = field(default_factory=dict)
    begins: Settings = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    replaced: dict[str, str] = field(default_factory=dict)
    older: dict[str, str] = field(default_factory=dict)
    both_spellings: bool = False

    def placed(self) -> set[str]:
        """Every setting of ours that has a place in this family."""
        return {*(key.ours for key in self.keys), *self.ours, *self.layers.places}


def inner(settings: Settings, mixer: str) -> Settings:
    """A mixer's own settings."""
    return {
        name.partition(".")[2]: value
        for name, value in settings.items()
        if name.startswith(f"{mixer}.")
    }


def variant(mixers: dict[str, Settings], given: Settings, mixer: str = "attention") -> str:
    """The name in `mixers` under which these settings stand: one that is there already, or the
    next: attention, attention:2 ..."""
    known = [name for name in mixers if mixer_of(name) == mixer]
    same = [name for name in known if mixers[name] == given]
    name = same[0] if same else f"{mixer}:{len(known) + 1}" if known else mixer
    mixers[name] = given
    return name


def others(model_config: ModelConfig, possible: set[str]) -> Iterator[str]:
    for mixer in dict.fromkeys(map(mixer_of, model_config.layer_types)):
        if mixer not in possible:
            yield f"layer_types has {mixer}, its layers are {' or '.join(sorted(possible))}"
