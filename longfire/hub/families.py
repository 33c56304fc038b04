"""Their names <-> our names: one table for each Hugging Face family, read in both directions; free of torch.

A family is one entry of FAMILIES: which key of its config.json is which setting of ours, which keys and settings can only
have one value, and which prefix of a parameter's name is which of ours. A new family is a new entry; no code below the
tables knows any family.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from longfire.errors import SettingsError
from longfire.shape import ModelShape

Settings = dict[str, Any]  # flat: "hidden_size", "gla.num_heads"


@dataclass(frozen=True)
class Key:
    """One setting under its two names.

    theirs: key of config.json, dotted where it is nested.  ours: a field of ModelShape, or "mixer.field".
    default: what their class takes when the config is silent.  null: what their `null` is with us.
    """

    theirs: str
    ours: str
    default: Any
    null: Any = None

    def read(self, value: Any, where: str) -> Any:
        """Their value as ours. Raises SettingsError when it has another type than the default."""
        if value is None:
            if self.default is not None and self.null is None:
                raise SettingsError(f"{where}: {self.theirs} = null, but it needs a value such as {self.default!r}")
            return self.null
        kind = type(self.null if self.default is None else self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is not type(None) and type(value) is not kind:
            raise SettingsError(f"{where}: {self.theirs} = {value!r} must be of type {kind.__name__}")
        return value

    def write(self, value: Any) -> Any:
        """Our value as theirs."""
        return None if value == self.null else value


@dataclass(frozen=True)
class Family:
    """One model class of Hugging Face and how it is one of our shapes.

    package: where the class is defined.  mixer: of every layer that `attn` does not list.
    fixed: their keys that we have with these values only; the first is what silence means and what we write.
    ours: our settings that their class has with this value only.
    inert: keys that change neither logits nor what can be learned.  replaced: keys that the named other one overrules.
    attn: keys of their `attn`, which makes the layers it lists softmax attention; empty if they have no hybrids.
    names: (their prefix, our prefix) of parameters; {i} is the layer. What follows the prefix is the same.
    """

    architecture: str
    package: str
    mixer: str
    keys: tuple[Key, ...]
    names: tuple[tuple[str, str], ...]
    fixed: dict[str, tuple] = field(default_factory=dict)
    ours: Settings = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    replaced: dict[str, str] = field(default_factory=dict)
    older: dict[str, str] = field(default_factory=dict)  # their older spelling -> the key as it is today
    attn: tuple[Key, ...] = ()

    def to_ours(self, name: str) -> str | None:
        """Our name of their parameter; None if it is none of ours."""
        return renamed(name, self.names)

    def to_theirs(self, name: str) -> str | None:
        """Their name of our parameter; None if they have no such parameter."""
        return renamed(name, tuple((ours, theirs) for theirs, ours in self.names))


def renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str | None:
    layer = re.search(r"(?<![^.])layers\.(\d+)\.", name)
    number = layer[1] if layer else ""
    for old, new in prefixes:
        old = old.format(i=number)
        if name.startswith(old) and len(name) > len(old):
            return new.format(i=number) + name[len(old) :]
    return None


# What every PreTrainedConfig may hold beside the model's shape.
INERT = (
    "model_type", "architectures", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map",
    "bos_token_id", "eos_token_id", "pad_token_id", "return_dict", "output_hidden_states", "output_attentions", "id2label",
    "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward",
)  # fmt: skip
BUFFERS = ("rotary_emb.inv_freq", "rotary.inv_freq")  # in old files; computed from rope_theta, so never read

PLAIN = {
    "norm": "rmsnorm", "norm_affine": True, "norm_bias": True, "mlp": "swiglu", "mlp_bias": False, "block": "pre",
    "residual_in_fp32": False, "dropout": 0.0, "embed_dropout": 0.0, "embed_norm": False, "learned_positions": False,
    "pad_vocab_multiple": 1,
}  # fmt: skip
PLAIN_SOFTMAX = {
    "attention.rope": "default", "attention.rope_factor": 1.0, "attention.rope_original_length": 0,
    "attention.rope_low_freq_factor": 1.0, "attention.rope_high_freq_factor": 4.0, "attention.rope_beta_fast": 32.0,
    "attention.rope_beta_slow": 1.0, "attention.rope_attention_factor": 0.0, "attention.rope_truncate": True,
    "attention.rotary_fraction": 1.0, "attention.o_bias": False, "attention.qk_norm": False, "attention.qk_norm_eps": 0.0,
    "attention.dropout": 0.0, "attention.scale_by_inverse_layer": False,
}  # fmt: skip
COMMON = (
    Key("vocab_size", "vocab_size", 32000),
    Key("initializer_range", "initializer_range", 0.02),
    Key("tie_word_embeddings", "tie_word_embeddings", False),
)

LLAMA_NAMES = (
    ("model.embed_tokens.", "embed."),
    ("model.layers.{i}.input_layernorm.", "layers.{i}.mixer_norm."),
    ("model.layers.{i}.self_attn.", "layers.{i}.mixer."),
    ("model.layers.{i}.post_attention_layernorm.", "layers.{i}.mlp_norm."),
    ("model.layers.{i}.mlp.", "layers.{i}.mlp."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
)
LLAMA_KEYS = (
    *COMMON,
    Key("hidden_size", "hidden_size", 4096),
    Key("num_hidden_layers", "num_hidden_layers", 32),
    Key("num_attention_heads", "attention.num_heads", 32),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("rope_parameters.rope_theta", "attention.rope_theta", 10000.0),
)
LLAMA_FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0,),
    "rope_parameters.rope_type": ("default",),
}
LLAMA_OLDER = {"rope_theta": "rope_parameters.rope_theta"}  # before transformers 5

FLA_NAMES = (
    ("model.embeddings.", "embed."),
    ("model.layers.{i}.attn_norm.", "layers.{i}.mixer_norm."),
    ("model.layers.{i}.attn.", "layers.{i}.mixer."),
    ("model.layers.{i}.mlp_norm.", "layers.{i}.mlp_norm."),
    ("model.layers.{i}.mlp.", "layers.{i}.mlp."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
)
FLA_KEYS = (
    *COMMON,
    Key("hidden_size", "hidden_size", 2048),
    Key("intermediate_size", "intermediate_size", None, null=0),
    Key("max_position_embeddings", "max_position_embeddings", 2048),
    Key("norm_eps", "norm_eps", 1e-6),
)
FLA_FIXED = {"hidden_act": ("swish",), "hidden_ratio": (4, None), "attnres_block_size": (None,)}
FLA_INERT = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
FLA_ATTENTION = (
    Key("num_kv_heads", "attention.num_kv_heads", None, null=0),
    Key("qkv_bias", "attention.qkv_bias", False),
    Key("window_size", "attention.window_size", None, null=0),
    Key("rope_theta", "attention.rope_theta", 10000.0),
)
FLA_ATTN = (Key("num_heads", "attention.num_heads", 0), *FLA_ATTENTION)
# fla's softmax layer always has hidden_size / num_heads channels a head; its q/k norms have eps 1e-5 whatever norm_eps is.
FLA_SOFTMAX = {**PLAIN_SOFTMAX, "attention.head_dim": 0}

# Looked through in this order when a shape asks for a family: what transformers alone can load comes first.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            *LLAMA_KEYS,
            Key("intermediate_size", "intermediate_size", 11008),
            Key("max_position_embeddings", "max_position_embeddings", 2048),
            Key("num_key_value_heads", "attention.num_kv_heads", None, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
        ),
        names=LLAMA_NAMES,
        fixed={**LLAMA_FIXED, "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,)},
        ours={**PLAIN, **PLAIN_SOFTMAX, "attention.window_size": 0, "attention.qkv_bias": False},
        older=LLAMA_OLDER,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        package="transformers",
        mixer="attention",
        keys=(
            *LLAMA_KEYS,
            Key("intermediate_size", "intermediate_size", 14336),
            Key("max_position_embeddings", "max_position_embeddings", 131072),
            Key("num_key_value_heads", "attention.num_kv_heads", 8, null=0),
            Key("head_dim", "attention.head_dim", None, null=0),
            Key("sliding_window", "attention.window_size", 4096, null=0),
        ),
        names=LLAMA_NAMES,
        fixed=LLAMA_FIXED,
        ours={**PLAIN, **PLAIN_SOFTMAX, "attention.qkv_bias": False},
        older=LLAMA_OLDER,
    ),
    "transformer": Family(
        architecture="TransformerForCausalLM",
        package="fla",
        mixer="attention",
        keys=(
            *FLA_KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "attention.num_heads", 32),
            *FLA_ATTENTION,
        ),
        names=FLA_NAMES,
        fixed={**FLA_FIXED, "elementwise_affine": (True,), "qk_norm": (False,)},
        ours={**PLAIN, **FLA_SOFTMAX},
        inert=FLA_INERT,
        replaced={"hidden_ratio": "intermediate_size"},
    ),
    "gla": Family(
        architecture="GLAForCausalLM",
        package="fla",
        mixer="gla",
        keys=(
            *FLA_KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 24),
            Key("num_heads", "gla.num_heads", 4),
            Key("num_kv_heads", "gla.num_kv_heads", None, null=0),
            Key("expand_k", "gla.expand_k", 0.5),
            Key("expand_v", "gla.expand_v", 1.0),
            Key("feature_map", "gla.feature_map", None, null="none"),
            Key("use_short_conv", "gla.use_short_conv", False),
            Key("conv_size", "gla.conv_size", 4),
            Key("use_output_gate", "gla.use_output_gate", True),
            Key("clamp_min", "gla.clamp_min", None),
        ),
        names=FLA_NAMES,
        # fuse_norm = false is the same mathematics, but the output norm's weight then has another name.
        fixed={**FLA_FIXED, "elementwise_affine": (True,), "fuse_norm": (True,)},
        ours={**PLAIN, **FLA_SOFTMAX, "gla.gate_logit_normalizer": 16.0, "gla.gate_low_rank": 16},
        inert=(*(key for key in FLA_INERT if key != "fuse_norm"), "use_gk", "use_gv"),
        replaced={"hidden_ratio": "intermediate_size"},
        attn=FLA_ATTN,
    ),
    "gated_deltanet": Family(
        architecture="GatedDeltaNetForCausalLM",
        package="fla",
        mixer="gated_delta_net",
        keys=(
            *FLA_KEYS,
            Key("num_hidden_layers", "num_hidden_layers", 21),
            Key("num_heads", "gated_delta_net.num_heads", 6),
            Key("num_v_heads", "gated_delta_net.num_v_heads", None, null=0),
            Key("head_dim", "gated_delta_net.head_dim", 256),
            Key("expand_v", "gated_delta_net.expand_v", 2.0),
            Key("use_gate", "gated_delta_net.use_gate", True),
            Key("use_short_conv", "gated_delta_net.use_short_conv", True),
            Key("conv_size", "gated_delta_net.conv_size", 4),
            Key("allow_neg_eigval", "gated_delta_net.allow_neg_eigval", False),
        ),
        names=FLA_NAMES,
        fixed={**FLA_FIXED, "output_gate_activation": ("swish", "silu")},
        ours={**PLAIN, **FLA_SOFTMAX},
        inert=FLA_INERT,
        replaced={"hidden_ratio": "intermediate_size"},
        attn=FLA_ATTN,
    ),
}  # fmt: skip


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family that a config.json names. Raises SettingsError with the known ones."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise SettingsError(
            f"{where}: model_type = {model_type!r} is none that longfire can read ({', '.join(FAMILIES)}, and longfire's own)"
        )
    return FAMILIES[model_type]


def shape_from_config(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes. Raises SettingsError naming a key that we cannot express."""
    family = family_of(config, where)
    asked = flat({k: v for k, v in config.items() if k not in (*INERT, *family.inert)}, family)
    settings = dict(family.ours)
    attn = asked.pop("attn", None) if family.attn else None
    for key in family.keys:
        settings[key.ours] = key.read(asked.pop(key.theirs, key.default), where)
    layers = settings["num_hidden_layers"]
    layer_types = [family.mixer] * layers
    if attn is not None:
        listed, softmax = read_attn(attn, family, layers, where)
        settings |= softmax
        layer_types = ["attention" if i in listed else family.mixer for i in range(layers)]
    check_fixed(asked, family, config, where)
    return shape_of(settings, tuple(layer_types))


def flat(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Their keys, dotted where the table has them nested, in today's spelling."""
    nested = {name.partition(".")[0] for name in (*(k.theirs for k in family.keys), *family.fixed) if "." in name}
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in nested and value is not None and not isinstance(value, dict):
            raise SettingsError(f"config.json: {name} = {value!r} must be a table")
        if name in nested:
            out |= {f"{name}.{inner}": v for inner, v in (value or {}).items()}
        elif name in family.older:
            out.setdefault(family.older[name], value)
        else:
            out[name] = value
    return out


def read_attn(attn: Any, family: Family, layers: int, where: str) -> tuple[set[int], Settings]:
    """The layers that fla's `attn` lists and the settings it gives them: one table, or several that say the same."""
    listed: set[int] = set()
    said: list[Settings] = []
    for entry in attn if isinstance(attn, list) else [attn]:
        entry = dict(entry)
        numbers = entry.pop("layers", [])
        if not all(type(i) is int and 0 <= i < layers for i in numbers) or listed & set(numbers):
            raise SettingsError(f"{where}: attn.layers = {numbers!r} must name layers 0 to {layers - 1}, each once")
        listed |= set(numbers)
        said.append({key.ours: key.read(entry.pop(key.theirs, key.default), f"{where}: attn") for key in family.attn})
        entry.pop("max_position_embeddings", None)  # in older files; their attention layers do not read it
        if entry:
            raise SettingsError(f"{where}: attn has unknown keys {sorted(entry)}")
    if any(one != said[0] for one in said):
        raise SettingsError(
            f"{where}: attn gives its layers different settings; here all softmax layers of a model have the same"
        )
    return listed, said[0] if listed else {}


def check_fixed(asked: dict[str, Any], family: Family, config: dict[str, Any], where: str) -> None:
    """Raises SettingsError for a key with a value that we cannot express. A null asks for nothing."""
    for name, value in asked.items():
        allowed = family.fixed.get(name)
        if name in family.replaced and config.get(family.replaced[name]) is not None:
            continue
        if allowed is None and value is not None:
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has no such setting for {config['model_type']} models"
            )
        if allowed is not None and value not in allowed:
            raise SettingsError(
                f"{where}: {name} = {value!r}: longfire has {config['model_type']} models with {name} = {allowed[0]!r} only"
            )


def shape_of(settings: Settings, layer_types: tuple[str, ...]) -> ModelShape:
    """A shape from flat settings; settings of mixers that no layer has are left out."""
    mixers = {
        mixer: {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{mixer}.")}
        for mixer in dict.fromkeys(layer_types)
    }
    plain = {name: value for name, value in settings.items() if "." not in name}
    return ModelShape(**plain, layer_types=layer_types, mixers=mixers)


def whole(shape: ModelShape) -> ModelShape:
    """The same shape with every setting of its mixers said, defaults too, and two ways to say the same made one."""
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch
    from longfire.mixers.mixer import read_mixer_shape

    mixers = {
        name: asdict(read_mixer_shape(MIXERS[name], name, shape.mixers.get(name, {}), shape.hidden_size))
        for name in dict.fromkeys(shape.layer_types)
    }
    for given in mixers.values():
        for name in ("num_kv_heads", "num_v_heads"):  # 0 means as many as num_heads
            if given.get(name) == given["num_heads"]:
                given[name] = 0
    softmax = mixers.get("attention", {})
    if softmax and softmax["head_dim"] * softmax["num_heads"] == shape.hidden_size:
        softmax["head_dim"] = 0
    return replace(shape, mixers=mixers, pad_vocab_multiple=1)  # the rows are padded already


def said_in_full(shape: ModelShape) -> Settings:
    """Flat settings of a whole shape, with numbers where 0 leaves them to others: some classes refuse a null."""
    settings = settings_of(shape)
    for name, value in settings.items():
        mixer, _, leaf = name.partition(".")
        if value == 0 and leaf in ("num_kv_heads", "num_v_heads"):
            settings[name] = settings[f"{mixer}.num_heads"]
        elif value == 0 and name == "attention.head_dim":
            settings[name] = shape.hidden_size // settings["attention.num_heads"]
    return settings


def settings_of(shape: ModelShape) -> Settings:
    """Flat settings of a whole shape, without the layers' types."""
    fields = {k: v for k, v in asdict(shape).items() if k not in ("mixers", "layer_types")}
    return fields | {f"{mixer}.{name}": v for mixer, given in shape.mixers.items() for name, v in given.items()}


def refusals(family: Family, shape: ModelShape) -> Iterator[str]:
    """Why a whole shape cannot be one of this family; nothing if it can."""
    expressed = {key.ours for key in (*family.keys, *family.attn)}
    possible = {family.mixer, "attention"} if family.attn else {family.mixer}
    for mixer in dict.fromkeys(shape.layer_types):
        if mixer not in possible:
            yield f"layer_types has {mixer}, its layers are {' or '.join(sorted(possible))}"
    for name, value in settings_of(shape).items():
        mixer = name.partition(".")[0]
        if mixer in shape.layer_types and mixer not in possible:
            continue
        if name in family.ours and value != family.ours[name]:
            yield f"{name} = {value!r}, it has {family.ours[name]!r} only"
        elif name not in family.ours and name not in expressed:
            yield f"{name} = {value!r}, which it does not know"


def choose_family(shape: ModelShape) -> str:
    """The model_type of the first family that can express a shape. Raises SettingsError naming the settings in the way."""
    shape, reasons = whole(shape), {}
    for model_type, family in FAMILIES.items():
        if family.mixer in shape.layer_types:
            reasons[model_type] = list(refusals(family, shape))
            if not reasons[model_type]:
                return model_type
    fewest = min(map(len, reasons.values()), default=0)
    why = [f"{name} ({'; '.join(r)})" for name, r in reasons.items() if len(r) == fewest]
    raise SettingsError(
        "no Hugging Face family has a model of this shape; nearest: "
        + (", ".join(why) or "none, of " + ", ".join(shape.layer_types))
    )


def config_from_shape(
    shape: ModelShape,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    length: int = 2048,
    dtype: str = "float32",
) -> dict[str, Any]:
    """The config.json of a shape in the family that can express it: the inverse of `shape_from_config`.

    length: written as max_position_embeddings where the shape sets no limit, since their classes want a number (the length
    that the model was trained at). Raises SettingsError naming the settings that no family has.
    """
    assert shape.vocab_size > 0, "the tokenizer decides an open vocabulary: shape.with_vocabulary(words)"
    model_type, shape = choose_family(shape), whole(shape)
    family, settings = FAMILIES[model_type], said_in_full(shape)
    settings["max_position_embeddings"] = shape.max_position_embeddings or length
    config: dict[str, Any] = {"model_type": model_type, "architectures": [family.architecture], "dtype": dtype}
    # No padding word: their embeddings never train the row of one, and ours would have to be EOS.
    config |= {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": None}
    flat_config = {name: allowed[0] for name, allowed in family.fixed.items() if None not in allowed}
    flat_config |= {key.theirs: key.write(settings[key.ours]) for key in family.keys}
    for name, value in flat_config.items():
        outer, dot, inner = name.partition(".")
        if dot:
            config.setdefault(outer, {})[inner] = value
        else:
            config[name] = value
    softmax = [i for i, mixer in enumerate(shape.layer_types) if mixer == "attention" != family.mixer]
    if softmax:
        config["attn"] = {"layers": softmax, **{key.theirs: key.write(settings[key.ours]) for key in family.attn}}
    return config
