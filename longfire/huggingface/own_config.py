"""config.json of LongfireForCausalLM, our own class: every key of a model's config, versioned; free
of torch.

    model_type, architectures    "longfire", ["LongfireForCausalLM"]
    longfire_version             the version that wrote it
    format_version               the version of this format; a newer one is refused
    hidden_size, vocab_size ...  SHARED: what transformers' tools read, and may change, under the
                                 same name
    max_position_embeddings ...  for those tools only, see `for_tools`
    shape                        every other key of ModelConfig, and a table for each mixer, with
                                 all defaults, so that a later default changes nothing
"""

from dataclasses import asdict, fields
from importlib.metadata import version

from longfire.config.model_config import TABLES, ModelConfig, leave_out_rare, mixer_of
from longfire.config.own_keys import read_own_keys
from longfire.errors import SettingsError
from longfire.huggingface.family import Config, Family, Name, Settings

MODEL_TYPE = "longfire"
FORMAT_VERSION = 1
# Keys of ModelConfig that are beside `shape`. resize_token_embeddings changes vocab_size there.
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "tie_word_embeddings",
    "initializer_range",
)
# Parameters have the names of our checkpoints, after the attribute that holds our model.
LONGFIRE = Family(
    architecture="LongfireForCausalLM",
    package="longfire",
    mixer="",
    keys=(),
    names=(Name("model.embed.", "embed."), Name("model.head.", "head."), Name("model.", "")),
    base="model.",
)


def is_own_export(config: Config) -> bool:
    """Whether a config.json is of our class. A model config of ours has the same model_type, and
    its keys at the top."""
    return config.get("model_type") == MODEL_TYPE and "shape" in config


def config_of(model_config: ModelConfig, length: int) -> Config:
    """The config.json of a model: the keys that describe it. The inverse of `read_model_config`.

    length: tokens of a sequence in training, for tools that ask how long a text may be.
    """
    from longfire.config.strict import read_own_settings
    from longfire.mixers import MIXERS  # the mixers own their defaults, and need torch

    keys: dict[str, object] = {}
    for field in fields(ModelConfig):
        if field.name not in TABLES:
            keys[field.name] = getattr(model_config, field.name)
    leave_out_rare(keys)
    keys["pad_vocab_multiple"] = 1  # vocab_size includes the padding
    shared = {name: keys.pop(name) for name in SHARED}
    mixers: dict[str, Settings] = {}
    for name in dict.fromkeys(model_config.layer_types):
        mixer = MIXERS[mixer_of(name)]
        given = model_config.mixers.get(name, {})
        mixers[name] = asdict(read_own_settings(mixer, name, given, model_config.hidden_size))
    return {
        "model_type": MODEL_TYPE,
        "architectures": [LONGFIRE.architecture],
        "longfire_version": version("longfire"),
        "format_version": FORMAT_VERSION,
        **shared,
        **for_tools(model_config, mixers, length),
        "shape": {
            **keys,
            "layer_types": list(model_config.layer_types),
            **mixers,
            **model_config.mlps,
        },
    }


def for_tools(
    model_config: ModelConfig,
    mixers: dict[str, Settings],
    length: int,
) -> Config:
    """What tools look for under the names of transformers; longfire reads `shape`.

    max_position_embeddings: the limit of the model, or the length in training where it has none.
    The heads are those of the first softmax layer, if there is one.
    """
    found: Config = {"max_position_embeddings": model_config.max_position_embeddings or length}
    for name, table in mixers.items():
        if mixer_of(name) == "attention":
            heads = table["num_heads"]
            found["num_attention_heads"] = heads
            found["num_key_value_heads"] = table["num_kv_heads"] or heads
            found["head_dim"] = table["head_dim"] or model_config.hidden_size // heads
            break
    return found


def keys_of_model_config(config: Config, where: str) -> Config:
    """The keys of ModelConfig in a config.json of our class, as `read_own_keys` takes them.

    Raises SettingsError for a newer format, for a `shape` that is no table, and for a key that is
    missing or in the wrong place.
    """
    format_version = config.get("format_version")
    model_config = config["shape"]
    if type(format_version) is not int or format_version < 1:
        raise SettingsError(
            f"{where}: format_version = {format_version!r} must be {FORMAT_VERSION}"
        )
    if format_version > FORMAT_VERSION:
        raise SettingsError(
            f"{where}: format_version = {format_version}, written by longfire "
            f"{config.get('longfire_version')}; this longfire ({version('longfire')}) reads "
            f"{FORMAT_VERSION}: install that version or a later one"
        )
    if not model_config:
        raise SettingsError(
            f"{where}: shape is empty: this is no config of an export; `longfire export` writes one"
        )
    if not isinstance(model_config, dict):
        raise SettingsError(
            f"{where}: shape = {model_config!r} must be a table of the model's settings"
        )
    for name in SHARED:
        if name in model_config:
            raise SettingsError(
                f"{where}: shape.{name} belongs beside shape, as {name}; remove it there"
            )
        if name not in config:
            raise SettingsError(f"{where}: {name} is missing")
    return {**{name: config[name] for name in SHARED}, **model_config}


def read_model_config(config: Config, where: str) -> ModelConfig:
    """The model config in a config.json of our class.

    Raises SettingsError naming an unknown key, with the version that wrote it where that is another
    one, and a mixer that does not exist.
    """
    from longfire.config.strict import read_own_settings
    from longfire.mixers import MIXERS
    from longfire.mlps import MLPS
    from longfire.mlps.reading import read_mlp_configs

    keys = keys_of_model_config(config, where)
    try:
        for name in dict.fromkeys(keys.get("layer_types", ())):
            if mixer_of(name) not in MIXERS:
                raise SettingsError(
                    f"{where}: layer_types names {name!r}, which is no mixer of this longfire "
                    f"({', '.join(MIXERS)}); name the file that defines it in model.plugins, or "
                    "call longfire.plugins.load_plugins"
                )
        model_config = read_own_keys(keys, where, tuple(MIXERS), tuple(MLPS))
        read_mlp_configs(model_config, where)
        for name in dict.fromkeys(model_config.layer_types):
            mixer = MIXERS[mixer_of(name)]
            given = model_config.mixers.get(name, {})
            read_own_settings(mixer, name, given, model_config.hidden_size, where)
    except SettingsError as error:
        raise SettingsError(f"{error}{of_another_version(config)}") from error
    return model_config


def of_another_version(config: Config) -> str:
    """Which version wrote a config that cannot be read, if that was not this one."""
    wrote = config.get("longfire_version")
    if wrote == version("longfire"):
        return ""
    return (
        f" (written by longfire {wrote}, this is {version('longfire')}: install that version or a "
        "later one)"
    )
