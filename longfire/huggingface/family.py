"""How a family of Hugging Face models is described: what the tables of families consist of.

Free of torch, and of every single family: a family is an entry of a table (families.py).
family_reading.py and family_writing.py are the only readers of the tables. family_layers.py says
which layer has which mixer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.own_settings import check_type
from longfire.errors import SettingsError

# Values of settings: numbers, text, lists, tables. The Key of a setting knows its type and checks
# it when a config is read.
Settings = dict[str, Any]  # flat names: "hidden_size", "attention.num_heads"
Config = dict[str, Any]  # a config.json
Layers = tuple[tuple[str, ...], dict[str, Settings]]  # layer_types, and the settings of each name
Choices = Mapping[Any, object]  # their value (a str, a bool, None) -> ours
REQUIRED = object()  # the default of a key that their class cannot do without


@dataclass(frozen=True)
class Key:
    """One setting under its two names. Several keys may have the same `theirs`: their one setting
    is then several of ours.

    theirs: key of config.json, dotted where it is nested. ours: a field of ModelConfig, or
    "mixer.field".
    default: what their class takes when the key is missing, or our value as a function of the
    settings read before; REQUIRED.
    null: our value for their `null`, or a function of the settings read before.
    choices: their value -> ours, where these differ or only these are possible; the first of
    several is written.
    when: ("attention.rope", "yarn", ...): the key exists only while that setting of ours has one of
    these values.
    kind: its type, where the default does not show it.
    reads, writes: where neither value is the other: (theirs, the settings read before) -> ours,
    None if there is no such value; all our settings -> theirs.
    """

    theirs: str
    ours: str
    default: object
    null: object = None
    choices: Choices | None = None
    when: tuple[str, ...] = ()
    kind: type | None = None
    reads: Callable[[object, Settings], object] | None = None
    writes: Callable[[Settings], object] | None = None

    def applies(self, settings: Settings) -> bool:
        """Whether there is such a key with these settings."""
        return not self.when or settings[self.when[0]] in self.when[1:]

    def read(
        self,
        config: Config,
        settings: Settings,
        where: str,
    ) -> object:
        """Our value of this key of their config. Raises SettingsError when it has another type than
        the default, or is missing."""
        if self.theirs not in config:
            if self.default is REQUIRED:
                raise SettingsError(f"{where}: {self.theirs} is missing; their class needs it too")
            if callable(self.default):
                return self.default(settings)
        value = config.get(self.theirs, self.default)
        if value is None:
            return self._read_null(settings, where)
        if self.reads is not None:
            ours = self.reads(value, settings)
            if ours is None:
                raise SettingsError(f"{where}: {self.theirs} = {value!r} is none that longfire has")
            return ours
        if self.choices is not None:
            return self._read_choice(value, self.choices, where)
        return self._checked(value, where)

    def _read_null(self, settings: Settings, where: str) -> object:
        """Our value for their null."""
        if self.default is not None and self.null is None:
            raise SettingsError(f"{where}: {self.theirs} = null, but it needs a value")
        if callable(self.null):
            return self.null(settings)
        return self.null

    def _read_choice(
        self,
        value: object,
        choices: Choices,
        where: str,
    ) -> object:
        """Our value for one of these of theirs."""
        if not isinstance(value, str | bool) or value not in choices:
            known = [repr(self.write(ours)) for ours in dict.fromkeys(choices.values())]
            raise SettingsError(
                f"{where}: {self.theirs} = {value!r}: longfire has it with {' or '.join(known)} "
                "only"
            )
        return choices[value]

    def _checked(self, value: object, where: str) -> object:
        """The value, if it has the type of the key."""
        example = self.null if self.default is None else self.default
        kind = self.kind or type(example)
        if type(value) is int and kind in (int, float):
            check_type(f"{where}: {self.theirs}", value, int if kind is int else float)
            value = kind(value)
        if kind is not type(None) and type(value) is not kind:
            raise SettingsError(
                f"{where}: {self.theirs} = {value!r} must be of type {kind.__name__}"
            )
        return value

    def written(self, settings: Settings) -> object:
        """Their value for our settings."""
        if self.writes:
            return self.writes(settings)
        return self.write(settings[self.ours])

    def write(self, value: object) -> object:
        """Their value for ours. Their null only where a missing key means something else, or null
        too."""
        if self.choices is not None:
            return next(theirs for theirs, ours in self.choices.items() if ours == value)
        if value == self.null and value != self.default:
            return None
        return value

    def has_choice(self, ours: object) -> bool:
        """Whether they can have this value of ours, as far as `choices` decides it."""
        return self.choices is None or ours in self.choices.values()

    @property
    def leaf(self) -> str:
        """The name of our setting in the table of its mixer."""
        return leaf_of(self.ours)


@dataclass(frozen=True)
class Name:
    """Parameters under their two names: prefixes, after which the names are the same; {i} is the
    layer.

    ours: several where one tensor of theirs is several of ours, concatenated along the first dim.
    transposed: they keep matrices as (in, out), we as (out, in).
    halves_swapped: rotary positions rotate their heads in the other direction, which is ours with
    the two halves of each head's channels swapped.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transposed: bool = False
    halves_swapped: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Our names, in their order."""
        if isinstance(self.ours, str):
            return (self.ours,)
        return self.ours


class LayerRule(Protocol):
    """Which layer of a family has which mixer (family_layers.py)."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of their config that decide it."""
        ...

    @property
    def places(self) -> tuple[str, ...]:
        """The settings of ours that these keys hold."""
        ...

    def read(
        self,
        config: Config,
        settings: Settings,
        mixer: str,
        where: str,
    ) -> Layers:
        """The layers that a config describes. mixer: of the family. Raises SettingsError."""
        ...

    def refusals(
        self,
        model_config: ModelConfig,
        mixer: str,
    ) -> Iterator[str]:
        """Why the family cannot have these layers."""
        ...

    def write(self, model_config: ModelConfig) -> Config:
        """The keys of their config for these layers."""
        ...


@dataclass(frozen=True)
class Same:
    """Every layer has the family's mixer."""

    reads: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    def read(
        self,
        config: Config,
        settings: Settings,
        mixer: str,
        where: str,
    ) -> Layers:
        layer_types = (mixer,) * settings["num_hidden_layers"]
        return layer_types, {mixer: settings_of(settings, mixer)}

    def refusals(
        self,
        model_config: ModelConfig,
        mixer: str,
    ) -> Iterator[str]:
        yield from other_mixers(model_config, {mixer})

    def write(self, model_config: ModelConfig) -> Config:
        return {}


@dataclass(frozen=True)
class Family:
    """One model class of Hugging Face and how it is described by a ModelConfig.

    package: where the class is defined.
    mixer: of its layers; `layers` says which layers have another one, or other settings.
    names: of the parameters.
    base: the prefix that files of the model without a head leave out.
    buffers: ends of names in older files that are computed, so never read.
    aliases: ends of names -> what some of their files have instead.
    fixed: their keys that we have with these values only. The first is the meaning of a missing
    key, and is written.
    ours: our settings that their class has with this value only.
    initial: how a fresh model of their class is initialised, where that is no default of ours
    (init_* of the model config).
    inert: keys that change neither logits nor what can be learned.
    replaced: keys that another key overrules -> that key.
    older: their older spelling -> the key of today.
    both_spellings: the older ones are written too, for another package's class.
    """

    architecture: str
    package: str
    mixer: str
    keys: tuple[Key, ...]
    names: tuple[Name, ...]
    layers: LayerRule = Same()
    base: str = "model."
    buffers: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    ours: Settings = field(default_factory=dict)
    initial: Settings = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    replaced: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    both_spellings: bool = False

    def placed(self) -> set[str]:
        """Every setting of ours that has a key in this family."""
        return {*(key.ours for key in self.keys), *self.ours, *self.layers.places}

    def their_keys(self) -> list[str]:
        """Every key of theirs in the tables, flat."""
        return [*(key.theirs for key in self.keys), *self.fixed]


def unchanged(*values: str) -> dict[str, str]:
    """The `choices` of a key whose values have the same names with us."""
    return dict(zip(values, values))


def without(settings: Mapping[str, object], names: Iterable[str]) -> Settings:
    """A copy without some names."""
    rest = dict(settings)
    for name in names:
        rest.pop(name, None)
    return rest


def leaf_of(name: str) -> str:
    """attention.rope_theta -> rope_theta"""
    return name.partition(".")[2]


def settings_of(settings: Settings, mixer: str) -> Settings:
    """A mixer's own settings."""
    own = {}
    for name, value in settings.items():
        if name.startswith(f"{mixer}."):
            own[leaf_of(name)] = value
    return own


def other_mixers(model_config: ModelConfig, possible: set[str]) -> Iterator[str]:
    """Why a family with these mixers cannot be this model: for each mixer that is none of them."""
    for mixer in dict.fromkeys(map(mixer_of, model_config.layer_types)):
        if mixer not in possible:
            yield f"layer_types has {mixer}, its layers are {' or '.join(sorted(possible))}"
