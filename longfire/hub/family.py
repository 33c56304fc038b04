"""How a family of Hugging Face models is one of our shapes: what the tables consist of, and what
reads them in both directions.

Free of torch, and of every single family: a family is an entry of a table (families.py), and this
file its only reader.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from longfire.errors import SettingsError
from longfire.shape import INIT_KEYS, ModelShape, mixer_of, nearest

Settings = dict[str, Any]  # flat: "hidden_size", "attention.num_heads"
# Keys that mean something in a config of ours. `dropout` stands in files of others too, whose
# classes ignore it.
KEYS_OF_OURS = frozenset(f.name for f in fields(ModelShape)) - {"dropout"}
REQUIRED = object()  # a key that their class cannot do without

# Settings that change training and not what a trained model computes: where a family has no key for
# one, an export leaves it out (and its card says so) instead of being refused.
TRAINING_ONLY = (
    "dropout",
    "embed_dropout",
    "residual_in_fp32",
    "attention.dropout",
    "use_l2warp",
    *INIT_KEYS,
)

# What each kind of rotary positions uses beside rope_theta; the rest of the settings is without
# effect then.
ROPE_USES = {
    "none": (),
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "yarn": (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_length", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
}
# Phi-3 and others have this length outside the table of rotary positions, where every class of
# transformers looks first, whether it declares the key or not.
ORIGINAL_LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True)
class Key:
    """One setting under its two names. Several keys may have the same `theirs`: their one setting
    is then several of ours.

    theirs: key of config.json, dotted where it is nested.  ours: a field of ModelShape, or "mixer.field".
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

    def refusals(self, shape: ModelShape, family: "Family") -> Iterator[str]:
        yield from others(shape, {family.mixer})

    def write(self, shape: ModelShape, family: "Family") -> dict[str, Any]:
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

    def refusals(self, shape: ModelShape, family: "Family") -> Iterator[str]:
        yield from others(shape, {family.mixer, "attention"})
        for name, given in shape.mixers.items():
            for key, value in self.fixed.items() if mixer_of(name) == "attention" else ():
                if given[key.partition(".")[2]] != value:
                    yield f"{name}.{key.partition('.')[2]} = {given[key.partition('.')[2]]!r}, it has {value!r} only"

    def write(self, shape: ModelShape, family: "Family") -> dict[str, Any]:
        tables = []
        for name in [name for name in shape.mixers if mixer_of(name) == "attention"]:
            numbers = [i for i, kind in enumerate(shape.layer_types) if kind == name]
            said = {
                key.theirs: key.write(shape.mixers[name][key.ours.partition(".")[2]])
                for key in self.keys
            }
            tables.append({"layers": numbers, **said})
        attn = tables[0] if len(tables) == 1 else tables or None
        return (
            {} if attn is None and self.silent(len(shape.layer_types)) is None else {"attn": attn}
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

    def refusals(self, shape: ModelShape, family: "Family") -> Iterator[str]:
        yield from others(shape, {"attention"})
        windows = [given.get("window_size", 0) for given in shape.mixers.values()]
        if len(set(windows) - {0}) > 1:
            yield f"attention.window_size = {windows}, its layers that slide have one window"

    def write(self, shape: ModelShape, family: "Family") -> dict[str, Any]:
        windows = [shape.mixers[name]["window_size"] for name in shape.layer_types]
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


# What every PreTrainedConfig may hold, or held, beside the model's shape: of tools, of heads that
# are none, of generation.
INERT = (
    "model_type",
    "architectures",
    "_name_or_path",
    "name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "auto_map",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "id2label",
    "label2id",
    "num_labels",
    "_num_labels",
    "problem_type",
    "is_encoder_decoder",
    "is_decoder",
    "chunk_size_feed_forward",
    "task_specific_params",
    "tokenizer_class",
    "torchscript",
    "use_bfloat16",
    "pruned_heads",
    "finetuning_task",
    "prefix",
    "output_past",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "transformers.js_config",
    "unsloth_version",
    "unsloth_fixed",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_return_sequences",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


def read_shape_of(
    family: Family, config: dict[str, Any], where: str, ignored: frozenset[str] = frozenset()
) -> ModelShape:
    """The shape that a config.json of this family describes. Raises SettingsError naming a key that
    we cannot express.

    ignored: flat names of keys that are passed over.
    """
    asked = {
        name: value
        for name, value in asked_of(family, config, where).items()
        if name not in ignored
    }
    settings = family.ours | family.begins
    for key in family.keys:
        if key.applies(settings):
            settings[key.ours] = key.read(asked, settings, where)
    layer_types, mixers = family.layers.read(asked, settings, family, where)
    used = {key.theirs for key in family.keys if key.applies(settings)} | set(family.layers.reads)
    check_rest(
        {name: value for name, value in asked.items() if name not in used},
        family,
        config,
        settings,
        where,
    )
    plain = {name: value for name, value in settings.items() if "." not in name}
    return ModelShape(**plain, layer_types=layer_types, mixers=mixers)


def asked_of(family: Family, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Flat name -> value of the keys that say something of the model. Raises SettingsError."""
    asked = flat({k: v for k, v in config.items() if k not in INERT}, family, where)
    return {k: v for k, v in asked.items() if k not in family.inert}


def idle_rope_keys(family: Family, asked: dict[str, Any]) -> list[str]:
    """Keys of rotary positions that have a value and that the kind in the config does not use:
    transformers warns and goes on.

    Where no kind is named, only the original length is such a key: a factor was meant to scale.
    """
    kind = asked.get("rope_parameters.rope_type")
    original = "rope_parameters.original_max_position_embeddings"
    keys = [
        key
        for key in family.keys
        if key.when[:1] == ("attention.rope",) and key.theirs.startswith("rope_")
    ]
    used = {key.theirs for key in keys if (kind or "default") in key.when}
    unused = dict.fromkeys(key.theirs for key in keys if key.theirs not in used)
    return [name for name in unused if asked.get(name) is not None and (kind or name == original)]


def names_of(family: Family) -> set[str]:
    """Every flat name that the family's table reads, older spellings too."""
    return {
        *(key.theirs for key in family.keys),
        *family.fixed,
        *family.replaced,
        *family.layers.reads,
        *family.older,
    }


def flat(config: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Their keys, dotted where the table has them nested, in today's spelling. Raises SettingsError
    where both say something else."""
    nested = {
        name.partition(".")[0]
        for name in (*(key.theirs for key in family.keys), *family.fixed)
        if "." in name
    }
    out: dict[str, Any] = {}
    for name, value in config.items():
        today = family.older.get(name, name)
        if today in nested:
            if value is not None and not isinstance(value, dict):
                raise SettingsError(f"{where}: {name} = {value!r} must be a table")
            said = {f"{today}.{inner_name}": v for inner_name, v in (value or {}).items()}
            said = {family.older.get(inner_name, inner_name): v for inner_name, v in said.items()}
        else:
            said = {today: value}
        for key, value in said.items():
            if out.get(key) is not None and value is not None and out[key] != value:
                raise SettingsError(
                    f"{where}: {key} is said twice, as {out[key]!r} and as {value!r}; remove one of them"
                )
            out[key] = out[key] if value is None and key in out else value
    if "rope_parameters" in nested and out.get(ORIGINAL_LENGTH) is not None:
        out[f"rope_parameters.{ORIGINAL_LENGTH}"] = out.pop(ORIGINAL_LENGTH)
    return out


def check_rest(
    asked: dict[str, Any], family: Family, config: dict[str, Any], settings: Settings, where: str
) -> None:
    """Raises SettingsError for a key that no row of the table has read, unless it says what holds
    anyway. A null asks for nothing."""
    model_type = config["model_type"]
    for name, value in asked.items():
        allowed = family.fixed.get(name)
        if name in family.replaced and config.get(family.replaced[name]) is not None:
            continue
        if allowed is None and value is not None:
            idle = [key for key in family.keys if key.theirs == name]
            if idle:
                other = idle[0].when[0]
                raise SettingsError(
                    f"{where}: {name} = {value!r} means nothing with {other} = {settings[other]!r}; remove it"
                )
            hint = nearest(name, names_of(family))
            if name in KEYS_OF_OURS:
                hint = "; it is a key of longfire's own: write it under [model] of the recipe, beside config"
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has no such setting for {model_type} models{hint}"
            )
        if allowed is not None and value not in allowed:
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has {model_type} models with {name} = {allowed[0]!r} only"
            )


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


def others(shape: ModelShape, possible: set[str]) -> Iterator[str]:
    for mixer in dict.fromkeys(map(mixer_of, shape.layer_types)):
        if mixer not in possible:
            yield f"layer_types has {mixer}, its layers are {' or '.join(sorted(possible))}"


def whole(shape: ModelShape) -> ModelShape:
    """The same model said in one way: every setting of its mixers, defaults too; those without
    effect at their default; variants numbered as they come."""
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch
    from longfire.mixers.mixer import read_mixer_shape

    mixers: dict[str, Settings] = {}
    names = {}
    for name in dict.fromkeys(shape.layer_types):
        mixer = MIXERS[mixer_of(name)]
        given = asdict(read_mixer_shape(mixer, name, shape.mixers.get(name, {}), shape.hidden_size))
        quiet(given, {f.name: f.default for f in fields(mixer.Shape)}, shape)
        names[name] = variant(mixers, given, mixer_of(name))
    plain = {f.name: f.default for f in fields(ModelShape)}
    idle = {"pad_vocab_multiple": 1}  # vocab_size has its rows
    if shape.mlp == "none":
        idle |= {"intermediate_size": plain["intermediate_size"], "mlp_bias": plain["mlp_bias"]}
    if shape.norm == "rmsnorm" or not shape.norm_affine:
        idle["norm_bias"] = plain["norm_bias"]
    return replace(
        shape, **idle, layer_types=tuple(names[name] for name in shape.layer_types), mixers=mixers
    )


def quiet(given: Settings, defaults: Settings, shape: ModelShape) -> None:
    """Give settings of a mixer that have no effect their default, and 0 where it means the same."""
    for name in ("num_kv_heads", "num_v_heads"):  # 0 means as many as num_heads
        if name in given and given[name] == given["num_heads"]:
            given[name] = 0
    for name, size in {
        "intermediate_size": 2 * shape.hidden_size,
        "dt_rank": -(-shape.hidden_size // 16),
    }.items():
        if given.get(name) == size:  # Mamba's, as it is when it is not said
            given[name] = 0
    if "rope" not in given:
        return
    if given["head_dim"] * given["num_heads"] == shape.hidden_size:
        given["head_dim"] = 0
    given["qk_norm_eps"] = (given["qk_norm_eps"] or shape.norm_eps) if given["qk_norm"] else 0.0
    for name in [name for name in given if name.startswith("rope_")]:
        if name.removeprefix("rope_") not in ("theta", *ROPE_USES[given["rope"]]):
            given[name] = defaults[name]
    if given["rope"] == "none":
        given |= {name: defaults[name] for name in ("rope_theta", "rotary_fraction")}


def said_in_full(shape: ModelShape) -> ModelShape:
    """A whole shape with numbers where 0 leaves them to others: some classes refuse a null."""
    mixers = {name: dict(given) for name, given in shape.mixers.items()}
    for given in mixers.values():
        for name in ("num_kv_heads", "num_v_heads"):
            if given.get(name) == 0:
                given[name] = given["num_heads"]
        if "rope" in given and not given["head_dim"]:
            given["head_dim"] = shape.hidden_size // given["num_heads"]
    return replace(shape, mixers=mixers)


def values_of(shape: ModelShape) -> dict[str, dict[str, Any]]:
    """Flat setting -> its value under each name of layer_types (of the model's own: under "")."""
    out = {
        name: {"": value}
        for name, value in asdict(shape).items()
        if name not in ("mixers", "layer_types")
    }
    for name, given in shape.mixers.items():
        for leaf, value in given.items():
            out.setdefault(f"{mixer_of(name)}.{leaf}", {})[name] = value
    return out


def refusals(family: Family, shape: ModelShape) -> Iterator[str]:
    """Why a whole shape cannot be one of this family; nothing if it can."""
    yield from family.layers.refusals(shape, family)
    values = values_of(shape)
    settings = {name: next(iter(said.values())) for name, said in values.items()}
    keys = {key.ours: key for key in family.keys}
    mixers = {key.partition(".")[0] for key in family.placed() if "." in key}
    for name, said in values.items():
        value, mixer = settings[name], name.partition(".")[0] if "." in name else ""
        key = keys.get(name)
        if name in family.layers.places or (mixer and mixer not in mixers) or idle(name, values):
            continue  # `layers` has spoken
        if name in INIT_KEYS:
            continue  # a trained model has no use for how it began
        if len(set(map(repr, said.values()))) > 1:
            yield (
                ", ".join(f"{full}.{name.partition('.')[2]} = {v!r}" for full, v in said.items())
                + ": its layers have one"
            )
        elif name in family.ours and value != family.ours[name]:
            yield f"{name} = {value!r}, it has {family.ours[name]!r} only"
        elif key and key.words is not None and value not in key.words.values():
            yield f"{name} = {value!r}, it has {' or '.join(map(repr, dict.fromkeys(key.words.values())))} only"
        elif key and key.writes is not None and key.reads(key.writes(settings), settings) != value:
            yield f"{name} = {value!r}, which its {key.theirs} cannot be"
        elif name not in family.placed() and name not in TRAINING_ONLY:
            yield f"{name} = {value!r}, which it does not know"
    yield from contradictions(family, settings)


def idle(name: str, values: dict[str, dict[str, Any]]) -> bool:
    """Whether a setting has no effect: the size of an MLP that is none, or one of rotary positions
    that theirs do not use."""
    if name == "intermediate_size":
        return values["mlp"][""] == "none"
    if not name.startswith("attention.rope_"):
        return False
    used = {leaf for kind in values["attention.rope"].values() for leaf in ROPE_USES[kind]}
    used |= {"theta"} if set(values["attention.rope"].values()) != {"none"} else set()
    return name.removeprefix("attention.rope_") not in used


def contradictions(family: Family, settings: Settings) -> Iterator[str]:
    """Settings of ours that are one of theirs, and differ."""
    said: dict[str, Key] = {}
    for key in family.keys:
        if not {key.ours, *key.when[:1]} <= settings.keys() or not key.applies(settings):
            continue
        if key.words is not None and settings[key.ours] not in key.words.values():
            continue
        first = said.setdefault(key.theirs, key)
        one, other = (k.said(settings) for k in (first, key))
        if one != other and None not in (one, other):
            yield f"{first.ours} = {settings[first.ours]!r} and {key.ours} = {settings[key.ours]!r}, which are one {key.theirs}"


def left_out(family: Family, shape: ModelShape) -> list[str]:
    """What a family's config cannot say of a shape, though it changes no logits: settings of
    training that are not at rest."""
    if not family.keys:  # our own class, whose config has every key
        return []
    values = values_of(whole(shape))
    at_rest = (
        {f.name: f.default for f in fields(ModelShape)} | {"attention.dropout": 0.0} | family.begins
    )
    placed = family.placed()
    said = {name: next(iter(values[name].values())) for name in TRAINING_ONLY if name in values}
    unplaced = {
        name: value for name, value in said.items() if name not in placed or name in INIT_KEYS
    }
    return [f"{name} = {value!r}" for name, value in unplaced.items() if value != at_rest[name]]


def config_of(family: Family, model_type: str, shape: ModelShape, length: int) -> dict[str, Any]:
    """The config.json of a whole shape that the family can express, without what is not the
    shape's.

    length: written as the number of positions where the shape sets no limit, since their classes
    want one.
    """
    full = said_in_full(shape)
    settings = {name: next(iter(said.values())) for name, said in values_of(full).items()}
    config: dict[str, Any] = {"model_type": model_type, "architectures": [family.architecture]}
    said = {name: allowed[0] for name, allowed in family.fixed.items() if None not in allowed}
    for key in family.keys:
        if key.applies(settings):
            value = key.said(settings)
            said[key.theirs] = said.get(key.theirs) if value is None else value
    for key in family.keys:
        if key.ours == "max_position_embeddings" and said[key.theirs] is None:
            said[key.theirs] = length
    if family.both_spellings:
        said |= {older: said[name] for older, name in family.older.items() if name in said}
    for name, value in said.items():
        outer, dot, leaf = name.partition(".")
        if not dot:
            config[name] = value
        elif value is not None:
            config.setdefault(outer, {})[leaf] = value
    return older_too(config | family.layers.write(full, family))


def older_too(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with rotary positions as readers before transformers 5 look for them
    (transformers 4, llama.cpp): theta at the top, the scaling in rope_scaling. They would take the
    default theta without a word."""
    rope = config.get("rope_parameters")
    if not rope:
        return config
    scaling = {
        name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")
    }
    kind = rope.get("rope_type", "default")
    older = (
        {"rope_type": kind, "type": kind, **scaling} if kind != "default" else None
    )  # "type": before 4.43
    return {**config, "rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": older}
